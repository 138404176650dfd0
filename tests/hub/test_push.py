"""Everything loads from a Hub repository as it does from a folder, after `import diffusers_terdit`."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from diffusers_terdit import (
    TerDiTPipeline,
    TerDiTTransformer2DModel,
    TernaryLinear,
    _diffusers,
    convert_original_checkpoint,
    training,
)
from fake_hub import patch_constants, run_with_hub


REPO = "user/terdit"


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        [3, "seven"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


@pytest.fixture
def pushed(fake_hub, tiny_pipeline):
    """A packed pipeline with a VAE, and its repository."""
    pipe = tiny_pipeline(vae=True, weight_format="packed")
    pipe.push_to_hub(REPO, token=fake_hub.token)
    return pipe


@pytest.mark.parametrize("loader", [TerDiTPipeline, DiffusionPipeline])
def test_pushed_pipeline_loads_and_samples_the_same(pushed, loader):
    pipe = loader.from_pretrained(REPO)
    assert type(pipe) is TerDiTPipeline
    assert torch.equal(sample(pipe), sample(pushed))


def test_model_index_names_the_package_not_a_file_of_it(fake_hub, pushed):
    index = json.loads(fake_hub.repos[REPO].files("main")["model_index.json"])
    assert index["transformer"] == ["diffusers_terdit", "TerDiTTransformer2DModel"]
    assert index["_class_name"] == "TerDiTPipeline"


@pytest.mark.parametrize("loader", [TerDiTTransformer2DModel, AutoModel])
def test_transformer_loads_alone_from_a_pipeline_repository(pushed, loader):
    model = loader.from_pretrained(REPO, subfolder="transformer")
    assert type(model) is TerDiTTransformer2DModel
    expected = pushed.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("loader", [TerDiTTransformer2DModel, AutoModel])
@pytest.mark.parametrize("weight_format", ["float", "packed"])
def test_model_has_a_repository_of_its_own(fake_hub, tiny_model, tiny_inputs, loader, weight_format):
    model = tiny_model(weight_format)
    model.push_to_hub("user/model", token=fake_hub.token)
    again = loader.from_pretrained("user/model")
    assert torch.equal(again(**tiny_inputs()).sample, model(**tiny_inputs()).sample)


def test_layer_has_a_repository_of_its_own(fake_hub):
    layer = TernaryLinear(16, 8, weight_format="packed", scale_granularity=4)
    layer.save_pretrained("layer", push_to_hub=True, repo_id="user/layer", token=fake_hub.token)
    again = TernaryLinear.from_pretrained("user/layer")
    assert torch.equal(again.weight_packed, layer.weight_packed)
    assert again.scale_granularity == 4


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sharded_model_loads_from_the_hub(fake_hub, tiny_model, tmp_path):
    model = tiny_model("packed")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    fake_hub.upload_folder("user/sharded", tmp_path / "sharded")
    assert sum(name.endswith(".safetensors") for name in fake_hub.repos["user/sharded"].files("main")) > 2
    state_dict = TerDiTTransformer2DModel.from_pretrained("user/sharded").state_dict()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())


def test_damaged_weights_on_the_hub_are_refused(fake_hub, tiny_model, tmp_path):
    tiny_model("packed").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    fake_hub.upload_folder("user/damaged", tmp_path / "model")
    with pytest.raises(ValueError, match=r"do not match the digest|holds code 3"):
        TerDiTTransformer2DModel.from_pretrained("user/damaged")


def test_revisions_are_kept_apart(fake_hub, tiny_model, tmp_path):
    for revision, seed in (("main", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / revision)
        fake_hub.upload_folder("user/model", tmp_path / revision, revision=revision)
    other = TerDiTTransformer2DModel.from_pretrained("user/model", revision="other")
    assert torch.equal(other.proj_in.weight, tiny_model(seed=1).proj_in.weight)


WEIGHTS = "diffusion_pytorch_model.safetensors"


class TestPush:
    def test_of_every_kind_returns_the_commit_and_titles_it(self, fake_hub, tiny_pipeline):
        pipe = tiny_pipeline()
        for model in (pipe, pipe.transformer, TernaryLinear(8, 8)):
            info = model.push_to_hub(REPO, token=fake_hub.token)
            assert info.oid == fake_hub.repos[REPO].sha()
            assert fake_hub.repos[REPO].commits[info.oid][0] == f"Upload {type(model).__name__}"
        TernaryLinear(8, 8).push_to_hub(REPO, token=fake_hub.token, commit_message="Better")
        assert fake_hub.repos[REPO].commits[fake_hub.repos[REPO].sha()][0] == "Better"

    def test_to_a_branch_leaves_main_alone(self, fake_hub, pushed, tiny_pipeline):
        main = fake_hub.repos[REPO].sha()
        other = tiny_pipeline(vae=True, num_layers=1)
        commit = other.push_to_hub(REPO, token=fake_hub.token, revision="small").oid
        assert fake_hub.repos[REPO].sha() == main
        for revision in ("small", commit):
            pipe = TerDiTPipeline.from_pretrained(REPO, revision=revision)
            assert torch.equal(sample(pipe), sample(other))
        assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), sample(pushed))
        other.push_to_hub(REPO, token=fake_hub.token, revision="small")  # the branch is there

    def test_as_a_pull_request(self, fake_hub, pushed, tiny_pipeline):
        other = tiny_pipeline(vae=True, num_layers=1)
        info = other.push_to_hub(REPO, token=fake_hub.token, create_pr=True)
        assert info.pr_revision == "refs/pr/1"
        assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO, revision="refs/pr/1")), sample(other))
        assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), sample(pushed))

    def test_into_a_subfolder_writes_no_card(self, fake_hub, tiny_model):
        model = tiny_model("packed")
        model.push_to_hub(REPO, token=fake_hub.token, subfolder="small")
        assert "README.md" not in fake_hub.repos[REPO].files()
        again = TerDiTTransformer2DModel.from_pretrained(REPO, subfolder="small")
        assert torch.equal(again.proj_in.weight, model.proj_in.weight)

    def test_of_a_variant(self, fake_hub, tiny_model):
        model = tiny_model("packed")
        model.save_pretrained("folder", push_to_hub=True, repo_id=REPO, token=fake_hub.token, variant="a")
        assert "diffusion_pytorch_model.a.safetensors" in fake_hub.repos[REPO].files()
        assert 'variant="a"' in fake_hub.repos[REPO].files()["README.md"].decode().replace("'", '"')
        again = TerDiTTransformer2DModel.from_pretrained(REPO, variant="a")
        assert torch.equal(again.proj_in.weight, model.proj_in.weight)

    def test_of_a_pickle_is_refused_before_a_repository_is_made(self, fake_hub, tiny_model):
        with pytest.raises(ValueError, match="saved as safetensors only"):
            tiny_model().push_to_hub(REPO, token=fake_hub.token, safe_serialization=False)
        assert REPO not in fake_hub.repos

    def test_replaces_shards_whose_index_would_win_over_a_single_file(self, fake_hub, tiny_pipeline):
        pipe, other = tiny_pipeline(weight_format="packed"), tiny_pipeline(weight_format="packed", num_layers=1)
        pipe.save_pretrained("folder", max_shard_size="10KB", push_to_hub=True, repo_id=REPO, token=fake_hub.token)
        fake_hub.add_files(REPO, {"transformer/diffusion_pytorch_model.mine.safetensors": b"", "mine.bin": b""})
        other.push_to_hub(REPO, token=fake_hub.token)
        names = fake_hub.repos[REPO].files()
        weights = [name for name in names if name.startswith("transformer/diffusion")]
        assert weights == ["transformer/diffusion_pytorch_model.mine.safetensors", f"transformer/{WEIGHTS}"]
        assert "mine.bin" in names
        assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), sample(other))

    @pytest.mark.parametrize("token", [None, "stranger"])
    def test_without_the_right_to_write_says_so_and_uploads_nothing(self, fake_hub, pushed, tiny_model, token):
        head = fake_hub.repos[REPO].sha()
        token = fake_hub.stranger_token if token else None
        with pytest.raises(OSError, match=rf"write to {REPO} \((401|403).*hf auth login.*token=") as caught:
            tiny_model().push_to_hub(REPO, token=token)
        assert fake_hub.repos[REPO].sha() == head
        assert fake_hub.stranger_token not in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "message"), [(403, f"write to {REPO} .403"), (500, f"answered 500 for {REPO}")]
    )
    def test_that_breaks_off_commits_nothing(self, fake_hub, pushed, tiny_pipeline, monkeypatch, status, message):
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        head = fake_hub.repos[REPO].sha()
        fake_hub.refuse_uploads(status)
        with pytest.raises(OSError, match=message):
            tiny_pipeline(vae=True, num_layers=1).push_to_hub(REPO, token=fake_hub.token)
        assert fake_hub.repos[REPO].sha() == head

    def test_weights_go_to_the_storage_of_large_files(self, fake_hub, pushed):
        weights = fake_hub.repos[REPO].files()[f"transformer/{WEIGHTS}"]
        assert weights in fake_hub.lfs.values()
        assert fake_hub.repos[REPO].entries("main")[f"transformer/{WEIGHTS}"]["lfs"]["size"] == len(weights)

    def test_fails_before_the_model_is_written(self, fake_hub, tiny_pipeline, monkeypatch):
        pipe = tiny_pipeline()
        monkeypatch.setattr(pipe, "save_pretrained", lambda *args, **kwargs: pytest.fail("saved"))
        with pytest.raises(OSError, match="hf auth login"):
            pipe.push_to_hub(REPO)


class TestWhatGoesWrong:
    """Each message names the repository and says what to do."""

    @pytest.fixture(params=[TerDiTPipeline, TerDiTTransformer2DModel])
    def load(self, request, fake_hub, tiny_pipeline):
        """Loads, from `user/private` and `user/gated` too."""
        pipe = tiny_pipeline(vae=True, weight_format="packed")
        saved = pipe if request.param is TerDiTPipeline else pipe.transformer
        saved.save_pretrained("folder")
        fake_hub.upload_folder("user/private", "folder", private=True)
        fake_hub.upload_folder("user/gated", "folder", gated=True)
        fake_hub.upload_folder(REPO, "folder")
        return request.param.from_pretrained

    @pytest.mark.parametrize("token", [None, "stranger"])
    @pytest.mark.parametrize("name", ["private", "nothing"])
    def test_private_and_missing(self, fake_hub, load, name, token):
        token = fake_hub.stranger_token if token else None
        with pytest.raises(OSError, match=rf"no repository user/{name} on the Hub, or it is private.*token="):
            load(f"user/{name}", token=token)
        if name == "private":
            load("user/private", token=fake_hub.token)

    @pytest.mark.parametrize("token", [None, "stranger"])
    def test_gated(self, fake_hub, load, token):
        token = fake_hub.stranger_token if token else None
        with pytest.raises(OSError, match=r"user/gated is gated.*https://huggingface.co/user/gated.*token="):
            load("user/gated", token=token)
        load("user/gated", token=fake_hub.token)

    def test_expired_token(self, fake_hub, load):
        with pytest.raises(OSError, match=rf"read {REPO} \(401.*token=") as caught:
            load(REPO, token="expired-token")
        assert "expired-token" not in str(caught.value)

    def test_missing_revision(self, load):
        with pytest.raises(OSError, match=rf"{REPO} has no branch, tag or commit 'v9'"):
            load(REPO, revision="v9")

    def test_offline_without_a_cache(self, fake_hub, load, monkeypatch):
        patch_constants(monkeypatch, HF_HUB_OFFLINE=True)
        fake_hub.requests.clear()
        with pytest.raises(OSError, match=rf"{REPO} is not in the cache.*HF_HUB_OFFLINE"):
            load(REPO)
        assert fake_hub.requests == []

    def test_no_server(self, fake_hub, load, monkeypatch):
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        fake_hub.__exit__()
        with pytest.raises(OSError, match=rf"{REPO}.*Try again"):
            load(REPO)

    def test_a_download_that_breaks_off_goes_on_where_it_stopped(self, fake_hub, load, monkeypatch):
        (path,) = [name for name in fake_hub.repos[REPO].files() if name.endswith(WEIGHTS) and "vae" not in name]
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**12)
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        fake_hub.cut_after(path, 10_000)
        assert load(REPO)
        assert [start for name, start in fake_hub.downloads if name == path] == [0, 2 * 2**12]

    def test_a_download_that_fails_is_repeated_without_what_had_arrived(self, fake_hub, load, monkeypatch):
        (path,) = [name for name in fake_hub.repos[REPO].files() if name.endswith(WEIGHTS) and "vae" not in name]
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        fake_hub.cut_after(path, 10_000, times=6)
        with pytest.raises(OSError, match=rf"broke off at {REPO}.*Try again"):
            load(REPO)
        had_arrived = {name for name, _ in fake_hub.downloads} - {path}
        fake_hub.downloads.clear()
        assert load(REPO)
        assert (path, 0) in fake_hub.downloads
        assert not had_arrived & {name for name, _ in fake_hub.downloads}

    def test_other_errors_stay_as_they_are(self, fake_hub, load):
        fake_hub.add_files("user/empty", {"config.json": b"{}", "model_index.json": b"{"})
        with pytest.raises((OSError, ValueError)) as caught:
            load("user/empty")
        assert "Hub" not in str(caught.value) or "user/empty" in str(caught.value)


def test_conversion_names_the_repository_that_it_cannot_read(fake_hub):
    with pytest.raises(OSError, match="no repository user/nothing on the Hub, or it is private"):
        convert_original_checkpoint("user/nothing")
    fake_hub.add_files("user/empty", {})
    with pytest.raises(OSError, match="user/empty has no branch, tag or commit 'v2'"):
        convert_original_checkpoint("user/empty", revision="v2")


def test_second_load_downloads_nothing_and_offline_works(fake_hub, pushed, monkeypatch):
    expected = sample(TerDiTPipeline.from_pretrained(REPO))
    downloads = len(fake_hub.downloads)
    assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), expected)
    assert len(fake_hub.downloads) == downloads
    patch_constants(monkeypatch, HF_HUB_OFFLINE=True)
    assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), expected)


def test_without_the_import_diffusers_says_what_is_missing(fake_hub, pushed, tmp_path):
    code = f"""
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({REPO!r})
except ValueError as error:
    print(error)
import diffusers_terdit
print(type(DiffusionPipeline.from_pretrained({REPO!r})).__name__)
"""
    output = run_with_hub(fake_hub, code, tmp_path)
    assert "diffusers_terdit.py" in output
    assert output.strip().endswith("TerDiTPipeline")


def test_registration_replaces_nothing_of_the_host(monkeypatch):
    own = object()
    monkeypatch.setattr(diffusers, "TernaryLinear", own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _diffusers.register("diffusers_terdit", classes=(TernaryLinear,), blocks=(), quantizers={})
    assert diffusers.TernaryLinear is own
    assert LOADABLE_CLASSES["diffusers_terdit"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}


def test_the_python_of_the_page_runs(fake_hub, monkeypatch):
    """Its blocks are ```py, not ```python, because they need this Hub."""
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text("utf-8")
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    namespace = {}
    snippets = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, "hub.md", "exec"), namespace)
    assert len(snippets) == 4
    assert namespace["image"].size == (8, 8)
    assert type(namespace["pipe"]).__name__ == "TerDiTPipeline"
    assert type(namespace["pipe"]) is not TerDiTPipeline
    card = fake_hub.repos["me/my-digits"].files()["README.md"].decode()
    assert "![three](card_images/00.png)" in card
    assert "<!-- diffusers-terdit: written anew by every push, up to the closing mark -->" in page


class TestTraining:
    """What `train_terdit.py --push_to_hub` does in the end."""

    def push(self, hub, pipe, repo_id="digits"):
        return training.export.push_pipeline(
            pipe,
            "out",
            repo_id,
            {"steps": "12,000"},
            ["samples/1.png"],
            "mit",
            hub.token,
            ["checkpoint-*"],
        )

    def test_the_card_is_that_of_the_repository_and_checkpoints_stay(self, fake_hub, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline(weight_format="packed")
        training.export.save_pipeline(pipe, "out")
        for name in ("checkpoint-5/model.safetensors", "samples/1.png", "log.jsonl", "x.partial", "terdit-run.lock"):
            (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_bytes(b"-")
        assert self.push(fake_hub, pipe) == "user/digits"
        files = fake_hub.repos["user/digits"].files()
        assert {"log.jsonl", "samples/1.png", "model_index.json"} < set(files)
        assert not [name for name in files if "checkpoint" in name or name.endswith((".partial", ".lock"))]
        card = files["README.md"].decode()
        assert 'from_pretrained("user/digits")' in card
        assert "| steps | 12,000 |" in card
        assert "![samples](samples/1.png)" in card
        assert "license: mit" in card
        assert torch.equal(sample(TerDiTPipeline.from_pretrained("user/digits")), sample(pipe))

    def test_the_author_of_the_folders_card_keeps_the_text(self, fake_hub, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline()
        training.export.save_pipeline(pipe, "out")
        text = training.export.model_card(pipe, "out", {"steps": "1"}, license="mit")
        training.export.save_card(text, "out", "mit")
        path = tmp_path / "out" / "README.md"
        path.write_text(path.read_text("utf-8").replace("license: mit", "license: cc0-1.0") + "\nMine.\n")
        training.export.save_card(training.export.model_card(pipe, "out", {"steps": "2"}), "out")
        assert "license: cc0-1.0" in path.read_text("utf-8")
        self.push(fake_hub, pipe)
        card = fake_hub.repos["user/digits"].files()["README.md"].decode()
        assert "license: mit" in card  # asked for again
        assert card.endswith("\nMine.\n")
        assert "| steps | 12,000 |" in card
        assert "| steps | 2 |" not in card
        assert card == path.read_text("utf-8")
