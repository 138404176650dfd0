"""Tokens and paths of this machine are in nothing that is written, logged or sent."""

import logging
import traceback

import diffusers
import pytest
import torch

from diffusers_terdit import TerDiTPipeline, TernaryLinear, convert_original_checkpoint, training
from diffusers_terdit.cli import main
from diffusers_terdit.hub.push import push_saved


@pytest.fixture
def loud():
    """Every logger at its lowest level."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_debug()
    diffusers.utils.logging.enable_propagation()
    levels = {name: logging.getLogger(name).level for name in (None, "huggingface_hub", "httpx", "httpcore")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    diffusers.utils.logging.disable_propagation()
    diffusers.utils.logging.set_verbosity(verbosity)


def words_of(error):
    """Everything that an exception could print, also with its causes."""
    return "".join(traceback.format_exception(error, chain=True)) + repr(error)


@pytest.mark.parametrize("source", ["argument", "environment", "login"])
def test_a_token_is_in_no_log_message_file_or_request(
    fake_hub, loud, tiny_pipeline, tmp_path, monkeypatch, capfd, caplog, source
):
    given = {"token": fake_hub.token} if source == "argument" else {}
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    elif source == "login":
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "token").write_text(fake_hub.token)
    pipe = tiny_pipeline(vae=True, weight_format="packed")
    pipe.push_to_hub("user/mine", private=True, **given)
    loaded = TerDiTPipeline.from_pretrained("user/mine", **given)
    loaded.save_pretrained("saved", push_to_hub=True, repo_id="user/again", **given)
    training.export.save_pipeline(pipe, "trained")
    push_saved(pipe, "trained", training.export.card_options(pipe, {"steps": "1"}), "user/trained", **given)
    with pytest.raises((OSError, ValueError)) as missing:
        convert_original_checkpoint("user/mine", **given)
    if source != "argument":
        assert main(["push", "saved", "user/by-command"]) == 0
        assert main(["push", "saved", "somebody-else/there", "--license", "mit"]) in (0, 1)
    places = [words_of(missing.value).encode(), repr(loaded).encode(), str(loaded.config).encode()]
    places += [caplog.text.encode(), "".join(capfd.readouterr()).encode(), *fake_hub.bodies]
    places += [f"{method} {path}".encode() for method, path in fake_hub.requests]
    places += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "hf"]
    for repo in fake_hub.repos.values():
        places += [data for title, files in repo.commits.values() for data in (title.encode(), *files.values())]
    assert any(b"DEBUG" in place for place in places)
    assert not [place[:200] for place in places if fake_hub.token.encode() in place]


@pytest.mark.parametrize("work", ["load", "push", "convert"])
def test_a_token_that_is_refused_is_in_no_message(fake_hub, loud, tiny_pipeline, caplog, capfd, work):
    fake_hub.add_files("user/secret", {}, private=True)
    do = {"load": TerDiTPipeline.from_pretrained, "push": tiny_pipeline().push_to_hub}
    do["convert"] = convert_original_checkpoint
    for token in (fake_hub.stranger_token, "hf_expired0123456789"):
        with pytest.raises((OSError, ValueError)) as error:
            do[work]("user/secret", token=token)
        assert token not in words_of(error.value) + caplog.text + "".join(capfd.readouterr())


def test_no_path_of_this_machine_is_saved_or_pushed(fake_hub, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    home = tmp_path / "home" / "somebody"
    tiny_pipeline(vae=True, weight_format="packed").save_pretrained(home / "first")
    TernaryLinear(8, 8).save_pretrained(home / "layer")
    pipe = TerDiTPipeline.from_pretrained(home / "first")
    assert "somebody" in pipe.vae.config["_name_or_path"]
    pipe.save_pretrained("whole", push_to_hub=True, repo_id="user/saved")
    pipe.push_to_hub("user/pushed")
    pipe.transformer.save_pretrained("model")
    TernaryLinear.from_pretrained(home / "layer").save_pretrained("layer")
    training.export.save_pipeline(pipe, "trained")
    training.export.save_card(pipe, "trained", "trained", training.export.card_options(pipe, {"steps": "1"}))
    optimizer = torch.optim.AdamW(pipe.transformer.parameters())
    training.checkpointing.save(tmp_path / "checkpoint-1", pipe.transformer, pipe.transformer, optimizer, {"step": 1})
    # A folder that was saved by something else, with paths in it
    for name in ("vae/config.json", "transformer/config.json", "model_index.json"):
        config = home / "first" / name
        config.write_text(config.read_text().replace("{", f'{{\n  "_name_or_path": "{home}/vae",', 1))
    assert main(["push", str(home / "first"), "user/by-command"]) == 0
    saved = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(home)]
    places = {path: path.read_bytes() for path in saved if "hf" not in path.parts}
    for name, repo in fake_hub.repos.items():
        places |= {f"{name}/{path}": data for path, data in repo.files().items()}
    assert len(places) > 40
    found = [
        n
        for n, data in places.items()
        if any(w in data for w in (b"somebody", str(tmp_path).encode(), b"_name_or_path"))
    ]
    assert found == []
