"""Nothing leaves a folder but the files of its model, and nothing is read through links that lead elsewhere."""

import json
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from diffusers_terdit import TerDiTPipeline, training
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.cli import main
from diffusers_terdit.hub import known_files as module
from diffusers_terdit.hub import push as push_module
from diffusers_terdit.hub.known_files import known_files, open_inside
from diffusers_terdit.hub.model_card import CardOptions
from diffusers_terdit.hub.push import push_saved


SECRET = b'{"token": "hf_of_somebody"}'
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the digits beside a secret."""
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "private").mkdir()
    for name in ("config.json", "pic.png", "step-1.png"):
        (tmp_path / "private" / name).write_bytes(SECRET)
    return Path(shutil.copytree(bundled(), tmp_path / "mine"))


def show(folder, *names):
    with open(folder / "README.md", "a") as card:
        card.writelines(f"\n![a picture]({name})\n" for name in names)


def push(hub, folder):
    pipe = TerDiTPipeline.from_pretrained(bundled())
    push_saved(pipe, folder, CardOptions(), "user/new", token=hub.token)
    return hub.repos["user/new"].files()


def everything_sent(hub):
    contents = [data for repo in hub.repos.values() for _, files in repo.commits.values() for data in files.values()]
    return b"\n".join([*contents, *hub.bodies, *hub.lfs.values()])


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "transformer/notes.txt", "scheduler/x.json.bak", "wandb", ".env", "x.py", "samples/notes.txt"),
        *("config.json", "transformer/deeper/config.json", "model.safetensors", "tokenizer"),
        "transformer/optimizer.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_unknown_is_left_out_and_named(fake_hub, folder, name, kind, monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    (folder / name).parent.mkdir(exist_ok=True)
    if kind == "link":
        (folder / name).symlink_to("/" if name in ("wandb", "tokenizer") else folder.parent / "secret")
    else:
        (folder / name).write_bytes(SECRET)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    files = push(fake_hub, folder)
    assert set(files) - {".gitattributes"} == set(known_files(bundled()))
    assert SECRET not in everything_sent(fake_hub)
    assert repr(name) in said[0] or repr(name.split("/")[0]) in said[0]
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("target", ["../secret", "../../secret", "/absolute", "to a link", "inside"])
@pytest.mark.parametrize("name", ["pic.png", "samples/pic.png", "README.md", "scheduler/scheduler_config.json",
                                  "model_index.json", f"transformer/{WEIGHTS}", "LICENSE", "log.jsonl",
                                  "log.png"])  # fmt: skip
def test_a_known_name_that_is_a_link_is_refused_before_anything_is_sent(fake_hub, folder, name, target):
    show(folder, "pic.png", "samples/pic.png")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    to = os.path.relpath(folder.parent / "secret", path.parent)
    if target == "/absolute":
        to = folder.parent / "secret"
    elif target == "to a link":
        to = folder / "first"
        to.symlink_to(folder.parent / "secret")
    elif target == "inside":
        to = folder / "there"
        to.write_bytes(SECRET)
    path.symlink_to(to)
    with pytest.raises(OSError, match=f"{name} is a link.*may lead to any file of yours"):
        push(fake_hub, folder)
    assert not fake_hub.requests


@pytest.mark.parametrize("name", ["transformer", "samples", "card_images"])
def test_a_folder_that_is_a_link_is_not_entered(fake_hub, folder, name):
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to("../private")
    if name == "transformer":
        with pytest.raises(OSError, match="transformer is a link"):
            push(fake_hub, folder)
    else:
        assert set(push(fake_hub, folder)) - {".gitattributes"} == set(known_files(bundled()))
        show(folder, f"{name}/pic.png")  # without a file behind the link, a broken picture in the card
        with pytest.raises(OSError, match=f"{name}/pic.png is a link, or in a folder that is one"):
            push(fake_hub, folder)
    assert SECRET not in everything_sent(fake_hub)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/x.png", "..//secret.png", "samples/../../secret.png",
                                  "notes.txt", ".git/config", ".git/pic.png", "\0.png", "C:/secret.png"])  # fmt: skip
def test_a_card_shows_pictures_of_its_folder_alone(fake_hub, folder, name):
    (folder.parent / "secret.png").write_bytes(SECRET)
    (folder / ".git").mkdir()
    for inside in ("notes.txt", ".git/config", ".git/pic.png"):
        (folder / inside).write_bytes(SECRET)
    show(folder, name)
    assert set(push(fake_hub, folder)) - {".gitattributes"} == set(known_files(bundled()))
    assert SECRET not in everything_sent(fake_hub)


@pytest.mark.parametrize("name", [".env", "id_rsa", "notes.txt"])
def test_a_file_that_the_index_calls_a_component_is_none(fake_hub, folder, name):
    """Such an index loads, and its author could guess the names of files that others have."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "DDIMScheduler"]}))
    (folder / name).write_bytes(SECRET)
    TerDiTPipeline.from_pretrained(folder)
    assert set(push(fake_hub, folder)) - {".gitattributes"} == set(known_files(bundled()))
    assert name not in known_files(folder, whole=True)
    assert SECRET not in everything_sent(fake_hub)


@pytest.mark.parametrize("unit", ["![", "![]("])
def test_the_time_to_read_a_card_is_linear_in_it(folder, unit):
    (folder / "README.md").write_text(unit * 200_000)  # a quadratic search took minutes
    start = time.perf_counter()
    known_files(folder)
    assert time.perf_counter() - start < 5


def test_the_folder_itself_may_be_a_link_as_its_user_names_it(fake_hub, folder):
    (folder.parent / "latest").symlink_to(folder)
    assert set(push(fake_hub, folder.parent / "latest")) > set(known_files(bundled()))


def test_a_pipe_or_device_is_refused_without_waiting(fake_hub, folder):
    os.mkfifo(folder / "log.jsonl")
    with pytest.raises(OSError, match=r"log\.jsonl is not a regular file"):
        push(fake_hub, folder)
    assert not fake_hub.requests


def test_the_hubs_cache_is_read_through_its_links_but_no_others(fake_hub, folder, tmp_path):
    fake_hub.upload_folder("someone/theirs", folder)
    snapshot = Path(snapshot_download("someone/theirs"))
    assert (snapshot / "model_index.json").is_symlink()
    files = push(fake_hub, snapshot)
    theirs = fake_hub.repos["someone/theirs"].files()
    assert {
        name: theirs[name] for name in theirs if name not in ("README.md", ".gitattributes")
    }.items() <= files.items()

    blobs = snapshot.parents[1] / "blobs"
    (blobs / "elsewhere").symlink_to(tmp_path / "secret")
    (snapshot.parents[1] / "other").write_bytes(SECRET)
    for target in ("../../blobs/elsewhere", "../../other", "../../../../../../secret", str(tmp_path / "secret")):
        (snapshot / "LICENSE").unlink(missing_ok=True)
        (snapshot / "LICENSE").symlink_to(target)
        with pytest.raises(OSError, match="LICENSE is a link"):
            push(fake_hub, snapshot)
    (snapshot / "LICENSE").unlink()
    shutil.move(blobs, tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(OSError, match="is a link"):
        push(fake_hub, snapshot)
    assert SECRET not in everything_sent(fake_hub)


def test_a_folder_that_only_looks_like_the_hubs_cache(fake_hub, tmp_path):
    home = tmp_path / "snapshots" / "x"
    shutil.copytree(bundled(), home)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_bytes(SECRET)
    (home / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(OSError, match="LICENSE is a link"):
        push(fake_hub, home)


@pytest.mark.parametrize("linux", [True, False])
def test_what_was_checked_is_what_is_uploaded(fake_hub, folder, monkeypatch, linux):
    """Between the check and the upload everything in the folder becomes a link to the secret."""
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: (linux or not str(path).startswith("/proc")) and exists(path))
    expected = {name: (folder / name).read_bytes() for name in known_files(folder)}
    create = push_module.create_repository

    def swap(*arguments):
        for name in expected:
            (folder / name).unlink()
            (folder / name).symlink_to(folder.parent / "secret")
        return create(*arguments)

    monkeypatch.setattr(push_module, "create_repository", swap)
    files = push(fake_hub, folder)
    assert all(files[name] == data for name, data in expected.items() if name != "README.md")
    assert SECRET not in everything_sent(fake_hub)


def test_a_link_that_is_swapped_in_and_out_is_never_read(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_bytes(SECRET)
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "config.json").write_bytes(b"{}")
    real, link, place = tmp_path / "real", tmp_path / "link", tmp_path / "model" / "transformer"
    link.symlink_to(tmp_path / "private")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            os.rename(place, real)
            os.rename(link, place)
            os.rename(place, link)
            os.rename(real, place)

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = {"read": 0, "refused": 0}
    try:
        for _ in range(3000):
            try:
                with open_inside(tmp_path / "model", "transformer/config.json") as file:
                    assert file.read() == b"{}"
                outcomes["read"] += 1
            except OSError:
                outcomes["refused"] += 1
    finally:
        stop.set()
        thread.join()
    assert min(outcomes.values()) > 0, outcomes


def test_where_folders_cannot_be_opened_links_are_refused_by_their_path(folder, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(os, "supports_dir_fd", set())
    (folder / "LICENSE").symlink_to("../secret")
    (folder / "there").symlink_to("../private")
    for name in ("LICENSE", "there/config.json"):
        with pytest.raises(OSError, match="is a link, or in a folder that is one"):
            open_inside(folder, name)
    with open_inside(folder, "model_index.json") as file:
        assert file.read() == (folder / "model_index.json").read_bytes()


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", ["../secret", "transformer/../../secret", "/etc/hosts", "", ".", "transformer"])
def test_a_name_that_is_no_file_inside_is_refused(folder, monkeypatch, name, windows):
    if windows:
        monkeypatch.setattr(os, "supports_dir_fd", set())
    with pytest.raises(OSError, match=r"mine|hosts|secret"):
        open_inside(folder, name)


def test_a_push_of_a_thousand_pictures_opens_no_thousand_files(fake_hub, folder):
    (folder / "samples").mkdir()
    for number in range(1, 101):
        (folder / "samples" / f"step-{number}.png").write_bytes(b"-")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        assert len(push(fake_hub, folder)) > 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_that_is_not_there_is_no_empty_model(fake_hub, folder):
    with pytest.raises(FileNotFoundError, match="typo"):
        push(fake_hub, folder / "typo")
    assert not fake_hub.requests


def test_the_command_refuses_what_would_be_followed(fake_hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    show(folder, "pic.png")
    (folder / "pic.png").symlink_to("../secret")
    assert main(["push", str(folder), "user/new"]) == 1
    assert "pic.png is a link" in capsys.readouterr().err
    assert not fake_hub.repos


def test_the_card_of_a_training_is_not_read_through_a_link(folder, tmp_path):
    pipe = TerDiTPipeline.from_pretrained(bundled())
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("../secret")
    with pytest.raises(OSError, match=r"README\.md is a link"):
        training.export.save_card(pipe, folder, "mine", CardOptions())
    assert (tmp_path / "secret").read_bytes() == SECRET
