"""What a file, a disk or the Hub brings about names it and says what to do; a programming error surfaces as itself."""

from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from safetensors import SafetensorError

from diffusers_terdit import (
    TerDiTPipeline,
    TerDiTTransformer2DModel,
    TernaryLinear,
    convert_original_checkpoint,
    modeling,
)
from diffusers_terdit.hub.errors import hub_errors
from fake_hub import patch_constants


REPO = "user/terdit"
WEIGHTS = "diffusion_pytorch_model.safetensors"


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

    @pytest.mark.parametrize(
        ("name", "token", "message"),
        [
            ("private", None, "no repository user/private on the Hub, or it is private.*token="),
            ("private", "stranger-token", "no repository user/private on the Hub, or it is private.*token="),
            ("nothing", "stranger-token", "no repository user/nothing on the Hub, or it is private.*token="),
            ("gated", None, "user/gated is gated.*https://huggingface.co/user/gated.*token="),
            ("gated", "stranger-token", "user/gated is gated.*https://huggingface.co/user/gated.*token="),
            ("terdit", "expired-token", rf"read {REPO} \(401.*token="),
        ],
    )
    def test_access(self, fake_hub, load, name, token, message):
        with pytest.raises(OSError, match=message):
            load(f"user/{name}", token=token)
        if name != "nothing":
            load(f"user/{name}", token=fake_hub.token)

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


def test_conversion_names_the_repository_that_it_cannot_read(fake_hub):
    with pytest.raises(OSError, match="no repository user/nothing on the Hub, or it is private"):
        convert_original_checkpoint("user/nothing")
    fake_hub.add_files("user/empty", {})
    with pytest.raises(OSError, match="user/empty has no branch, tag or commit 'v2'"):
        convert_original_checkpoint("user/empty", revision="v2")


def test_offline_mode_says_that_a_push_needs_the_hub(fake_hub, tiny_model, monkeypatch):
    patch_constants(monkeypatch, HF_HUB_OFFLINE=True)
    with pytest.raises(OSError, match=f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {REPO}"):
        tiny_model().push_to_hub(REPO, token=fake_hub.token)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", "[]"),
        ("model_index.json", '{"_class_name": "A", "scheduler": []}'),
        ("transformer/config.json", "{"),
        ("transformer/config.json", '{"in_channels": {}}'),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": []}'),
        ("vae/config.json", '{"in_channels": "x"}'),
        (f"transformer/{WEIGHTS}.index.json", '{"metadata": {}, "weight_map": {"a": "../x"}}'),
    ],
)
def test_a_file_of_the_hub_that_is_not_what_it_should_be_is_named_with_its_repository(
    fake_hub, tiny_pipeline, file, text
):
    tiny_pipeline(vae=True).save_pretrained("folder", max_shard_size="10KB")
    fake_hub.upload_folder(REPO, "folder")
    fake_hub.add_files(REPO, {file: text.encode()})
    with pytest.raises(ValueError, match=rf"{REPO}: .*{file}"):
        TerDiTPipeline.from_pretrained(REPO)


PROGRAMMING = [TypeError, AttributeError, NameError, KeyError, IndexError, ZeroDivisionError, NotImplementedError]


class TestProgrammingErrors:
    """None of them becomes a message about a file."""

    def fail(self, *args, **kwargs):
        raise TypeError("a bug")

    @pytest.mark.parametrize("place", ["model", "layer", "scheduler", "pipeline"])
    def test_a_bug_while_loading_surfaces_as_itself(self, tiny_pipeline, monkeypatch, place):
        tiny_pipeline().save_pretrained("folder")
        target = {
            "model": (modeling.TernaryModelMixin, "from_config"),
            "layer": (TernaryLinear, "__init__"),
            "scheduler": (DDPMScheduler, "__init__"),
            "pipeline": (TerDiTPipeline, "register_modules"),
        }[place]
        monkeypatch.setattr(*target, self.fail)
        with pytest.raises(TypeError, match=r"^a bug$"):
            TerDiTPipeline.from_pretrained("folder")

    @pytest.mark.parametrize("writing", [False, True])
    @pytest.mark.parametrize("error", PROGRAMMING)
    @pytest.mark.parametrize("name", ["folder", REPO])
    def test_a_bug_of_any_kind_surfaces_as_itself(self, error, writing, name, tmp_path):
        (tmp_path / "folder").mkdir()
        bug = error("a bug")
        with pytest.raises(error) as caught, hub_errors(name, writing=writing):
            raise bug
        assert caught.value is bug


class TestNames:
    @pytest.mark.parametrize(
        ("error", "expected", "message"),
        [
            (ValueError("a tensor is wrong"), ValueError, f"^{REPO}: a tensor is wrong$"),
            (ValueError(f"{REPO}/a.json is wrong"), ValueError, f"^{REPO}/a.json is wrong$"),
            (
                OSError("truncated"),
                OSError,
                f"^{REPO}: a file cannot be read .truncated.. Download or save it again.$",
            ),
            (OSError(f"{REPO}/a.json: truncated"), OSError, f"^{REPO}/a.json: truncated$"),
            (SafetensorError("no header"), OSError, f"^{REPO}: a file cannot be read .no header.. Download"),
        ],
        ids=str,
    )
    def test_the_name_is_in_the_message_once(self, error, expected, message):
        with pytest.raises(expected, match=message), hub_errors(REPO):
            raise error

    def test_an_upload_names_only_what_the_hub_says(self):
        for error in (ValueError("images"), OSError("a local disk"), RuntimeError("a bug")):
            with pytest.raises(type(error)) as caught, hub_errors(REPO, writing=True):
                raise error
            assert caught.value is error
