import hashlib
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import (
    CommitOperationDelete,
    HfApi,
    constants,
    create_branch,
    create_commit,
    create_repo,
    file_download,
    hf_hub_download,
    list_repo_tree,
    model_info,
    snapshot_download,
    upload_file,
    whoami,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx

from fake_hub import fake_hub as fixture  # noqa: F401 - pytest finds it by its own name
from fake_hub import hub_in_process, patch_constants, run_with_hub


WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4, num_embeds_ada_norm=8
    )


def assert_same_weights(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)


def test_push_and_load_round_trip(fake_hub):
    model = tiny_model()
    model.push_to_hub("user/dit", token=fake_hub.token, commit_message="First")
    repo = fake_hub.repos["user/dit"]
    assert repo.files().keys() == {".gitattributes", "README.md", "config.json", WEIGHTS}
    assert b"library_name: diffusers" in repo.files()["README.md"]
    assert repo.commits[repo.sha()][0] == "First"
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit"), model)

    # Nothing changed: no commit.
    head = repo.sha()
    model.push_to_hub("user/dit", token=fake_hub.token)
    assert repo.sha() == head


def test_second_load_comes_from_the_cache(fake_hub):
    tiny_model().push_to_hub("user/dit", token=fake_hub.token)
    DiTTransformer2DModel.from_pretrained("user/dit")
    assert fake_hub.downloads.count((WEIGHTS, 0)) == 1
    fake_hub.downloads.clear()
    DiTTransformer2DModel.from_pretrained("user/dit")
    assert fake_hub.downloads == []


def test_offline_mode_loads_from_the_cache(fake_hub, monkeypatch):
    model = tiny_model()
    model.push_to_hub("user/dit", token=fake_hub.token)
    DiTTransformer2DModel.from_pretrained("user/dit")
    patch_constants(monkeypatch, HF_HUB_OFFLINE=True)
    fake_hub.requests.clear()
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit"), model)
    with pytest.raises(OSError, match="user/other"):
        DiTTransformer2DModel.from_pretrained("user/other")
    assert fake_hub.requests == []


def test_new_process_shares_the_cache_and_reads_the_environment(fake_hub, tmp_path):
    fake_hub.add_files("user/data", {"a.txt": b"one"}, private=True)
    code = "from huggingface_hub import hf_hub_download as get; print(open(get('user/data', 'a.txt')).read())"
    assert run_with_hub(fake_hub, code, tmp_path, HF_TOKEN=fake_hub.token).strip() == "one"
    assert fake_hub.downloads == [("a.txt", 0)]
    fake_hub.requests.clear()
    assert run_with_hub(fake_hub, code, tmp_path, HF_HUB_OFFLINE="1").strip() == "one"
    assert hf_hub_download("user/data", "a.txt", local_files_only=True)
    assert fake_hub.requests == []


def test_revisions(fake_hub, tmp_path):
    main, other = tiny_model(0), tiny_model(1)
    main.push_to_hub("user/dit", token=fake_hub.token)
    create_branch("user/dit", branch="v2", token=fake_hub.token)
    with pytest.raises(HfHubHTTPError, match="409"):
        create_branch("user/dit", branch="v2", token=fake_hub.token)
    other.save_pretrained(tmp_path / "other")
    sha = fake_hub.upload_folder("user/dit", tmp_path / "other", revision="v2")
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit"), main)
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit", revision="v2"), other)
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit", revision=sha), other)
    with pytest.raises(OSError, match="v3"):
        DiTTransformer2DModel.from_pretrained("user/dit", revision="v3")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("user/dit", "config.json", revision="v3")


def test_pull_request(fake_hub):
    model = tiny_model()
    fake_hub.add_files("user/dit", {})
    info = model.push_to_hub("user/dit", token=fake_hub.token, create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert WEIGHTS not in fake_hub.repos["user/dit"].files()
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit", revision="refs/pr/1"), model)


def test_private_repository(fake_hub, monkeypatch):
    model = tiny_model()
    model.push_to_hub("user/secret", private=True, token=fake_hub.token)
    for token in (None, fake_hub.stranger_token):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("user/secret", "config.json", token=token)
        with pytest.raises(OSError, match="private repository"):
            DiTTransformer2DModel.from_pretrained("user/secret", token=token)
    assert fake_hub.downloads == []
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/secret", token=fake_hub.token), model)
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    assert whoami()["name"] == fake_hub.user
    assert model_info("user/secret").private


def test_tokens(fake_hub):
    fake_hub.add_files("user/public", {"a.txt": b"one"})
    fake_hub.add_files("user/gated", {"a.txt": b"one"}, gated=True)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hf_hub_download("user/public", "a.txt", token="expired")
    with pytest.raises(GatedRepoError, match="403"):
        hf_hub_download("user/gated", "a.txt", token=fake_hub.stranger_token)
    with pytest.raises(GatedRepoError, match="401"):
        hf_hub_download("user/gated", "a.txt")
    with pytest.raises(HfHubHTTPError, match="401"):
        create_repo("user/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        upload_file(path_or_fileobj=b"", path_in_repo="b", repo_id="user/public", token=fake_hub.stranger_token)
    assert hf_hub_download("user/gated", "a.txt", token=fake_hub.token)


def test_missing_repository_and_file(fake_hub):
    with pytest.raises(RepositoryNotFoundError):
        model_info("user/missing")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("missing", "config.json", token=fake_hub.token)
    with pytest.raises(OSError, match="not a valid model identifier"):
        DiTTransformer2DModel.from_pretrained("user/missing")
    fake_hub.add_files("user/empty", {})
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("user/empty", "config.json")


def test_interrupted_download_resumes(fake_hub, monkeypatch):
    data = bytes(range(256)) * 1000
    fake_hub.add_files("user/data", {"big.bin": data})
    fake_hub.cut_after("big.bin", 100_000)
    # The client keeps whole chunks only, and waits a second before it tries again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    with open(hf_hub_download("user/data", "big.bin"), "rb") as file:
        assert file.read() == data
    assert fake_hub.downloads == [("big.bin", 0), ("big.bin", 6 * 2**14)]


def test_failed_download_leaves_no_broken_file(fake_hub, monkeypatch):
    model = tiny_model()
    model.push_to_hub("user/dit", token=fake_hub.token)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    fake_hub.cut_after(WEIGHTS, 1000, times=6)
    with pytest.raises(httpx.RemoteProtocolError):
        DiTTransformer2DModel.from_pretrained("user/dit")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("user/dit", WEIGHTS, local_files_only=True)
    assert_same_weights(DiTTransformer2DModel.from_pretrained("user/dit"), model)


def test_large_files(fake_hub):
    data = b"x" * 100_000
    create_repo("user/data", token=fake_hub.token)
    upload_file(path_or_fileobj=data, path_in_repo="a.bin", repo_id="user/data", token=fake_hub.token)
    assert list(fake_hub.lfs.values()) == [data]
    (entry,) = HfApi().get_paths_info("user/data", ["a.bin"])
    assert (entry.lfs.size, entry.lfs.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    path = hf_hub_download("user/data", "a.bin")
    assert os.path.basename(os.path.realpath(path)) == entry.lfs.sha256  # the name in the cache
    # The same content under another name is not sent again.
    puts = len([1 for method, _ in fake_hub.requests if method == "PUT"])
    upload_file(path_or_fileobj=data, path_in_repo="b.bin", repo_id="user/data", token=fake_hub.token)
    assert len([1 for method, _ in fake_hub.requests if method == "PUT"]) == puts == 1
    assert fake_hub.repos["user/data"].files()["b.bin"] == data
    response = get_session().put(f"{fake_hub.url}/lfs/{'0' * 64}", content=b"other")
    assert response.status_code == 400


def test_folders(fake_hub):
    files = {"config.json": b"{}", "unet/a.bin": b"a", "unet/deep/b.bin": b"b", "vae/c.bin": b"c"}
    fake_hub.add_files("user/data", files)
    paths = {entry.path for entry in list_repo_tree("user/data", recursive=True)}
    assert paths == {".gitattributes", "unet", "unet/deep", "vae", *files}
    assert [entry.path for entry in list_repo_tree("user/data", "unet")] == ["unet/a.bin", "unet/deep"]
    assert [entry.path for entry in HfApi().get_paths_info("user/data", ["vae", "no"])] == ["vae"]
    folder = snapshot_download("user/data", allow_patterns=["unet/*"])
    assert {path for path, _ in fake_hub.downloads} == {"unet/a.bin", "unet/deep/b.bin"}
    assert folder.endswith(fake_hub.repos["user/data"].sha())
    delete = [CommitOperationDelete("unet/"), CommitOperationDelete("config.json")]
    create_commit("user/data", delete, commit_message="Delete", token=fake_hub.token)
    assert fake_hub.repos["user/data"].files().keys() == {".gitattributes", "vae/c.bin"}


def test_data_sets(fake_hub):
    fake_hub.add_files("datasets/user/data", {"rows.json": b"[1]"})
    with open(hf_hub_download("user/data", "rows.json", repo_type="dataset")) as file:
        assert json.load(file) == [1]
    assert HfApi().dataset_info("user/data").id == "user/data"
    with pytest.raises(RepositoryNotFoundError):
        model_info("user/data")


def test_nothing_outlives_the_fixture(tmp_path):
    def state():
        names = ("HF_ENDPOINT", "HF_HOME", "NO_PROXY")
        return (
            constants.HF_HOME,
            dynamic_modules_utils.HF_MODULES_CACHE,
            HfApi().endpoint,
            *(os.environ.get(name) for name in names),
        )

    before, late = state(), ModuleType("diffusers.late")
    with pytest.MonkeyPatch.context() as patch, hub_in_process(patch, tmp_path) as hub:
        assert HfApi().endpoint == hub.url
        assert all(
            str(tmp_path) in folder for folder in (constants.HF_HUB_CACHE, dynamic_modules_utils.HF_MODULES_CACHE)
        )
        # A module imported only now copies what it finds.
        late.HF_HUB_CACHE, late.HF_MODULES_CACHE = constants.HF_HUB_CACHE, dynamic_modules_utils.HF_MODULES_CACHE
        patch.setitem(sys.modules, "diffusers.late", late)
        with pytest.raises(AssertionError, match="would leave this machine"):
            get_session().get("http://localhost:1/")
    assert state() == before
    assert (late.HF_HUB_CACHE, late.HF_MODULES_CACHE) == (
        constants.HF_HUB_CACHE,
        dynamic_modules_utils.HF_MODULES_CACHE,
    )
