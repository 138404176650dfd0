"""A push is one commit, which replaces what it should and nothing else."""

import pytest
import torch
from huggingface_hub.utils import _http

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear, training
from diffusers_terdit.hub.push import push_saved


REPO = "user/terdit"
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

    def test_to_a_branch_leaves_main_alone(self, fake_hub, pushed, tiny_pipeline, sample):
        main = fake_hub.repos[REPO].sha()
        other = tiny_pipeline(vae=True, num_layers=1)
        commit = other.push_to_hub(REPO, token=fake_hub.token, revision="small").oid
        assert fake_hub.repos[REPO].sha() == main
        for revision in ("small", commit):
            pipe = TerDiTPipeline.from_pretrained(REPO, revision=revision)
            assert torch.equal(sample(pipe), sample(other))
        assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), sample(pushed))
        other.push_to_hub(REPO, token=fake_hub.token, revision="small")  # the branch is there

    def test_as_a_pull_request(self, fake_hub, pushed, tiny_pipeline, sample):
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

    def test_replaces_shards_whose_index_would_win_over_a_single_file(self, fake_hub, tiny_pipeline, sample):
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

    def test_fails_before_the_model_is_written(self, fake_hub, tiny_pipeline, monkeypatch):
        pipe = tiny_pipeline()
        monkeypatch.setattr(pipe, "save_pretrained", lambda *args, **kwargs: pytest.fail("saved"))
        with pytest.raises(OSError, match="hf auth login"):
            pipe.push_to_hub(REPO)


class TestTraining:
    """What `train_terdit.py --push_to_hub` does in the end."""

    def push(self, hub, pipe, repo_id="digits"):
        options = training.export.card_options(pipe, {"steps": "12,000"}, ["samples/1.png"], "mit")
        return push_saved(pipe, "out", options, repo_id, token=hub.token).repo_url.repo_id

    def test_the_card_is_that_of_the_repository_and_checkpoints_stay(self, fake_hub, tiny_pipeline, tmp_path, sample):
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
        first = training.export.card_options(pipe, {"steps": "1"}, license="mit")
        training.export.save_card(pipe, "out", "out", first)
        path = tmp_path / "out" / "README.md"
        path.write_text(path.read_text("utf-8").replace("license: mit", "license: cc0-1.0") + "\nMine.\n")
        training.export.save_card(pipe, "out", "out", training.export.card_options(pipe, {"steps": "2"}))
        assert "license: cc0-1.0" in path.read_text("utf-8")
        self.push(fake_hub, pipe)
        card = fake_hub.repos["user/digits"].files()["README.md"].decode()
        assert "license: mit" in card  # asked for again
        assert card.endswith("\nMine.\n")
        assert "| steps | 12,000 |" in card
        assert "| steps | 2 |" not in card
        assert "| steps | 2 |" in path.read_text("utf-8")  # a push only reads the folder
