"""Model cards: what they say is true of the repository, and what their author wrote stays."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, RepoCard
from PIL import Image

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear, convert_original_checkpoint
from diffusers_terdit.hub import push
from diffusers_terdit.hub.model_card import BEGIN, END, CardOptions, human_bytes, merge_cards, model_card, own_text


REPO = "user/terdit"
ORIGINAL = Path(__file__).parents[1] / "data" / "reference" / "tiny-qknorm-packed"


def readme(hub, repo_id=REPO, revision="main"):
    return hub.repos[repo_id].files(revision)["README.md"].decode()


def run_snippet(text):
    """Run the Python in a card; its names."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(snippet, namespace)
    assert re.search(r"^from diffusers_terdit import", snippet, re.MULTILINE)
    return namespace


def test_names_cannot_steer_a_terminal(tiny_pipeline):
    pipe = tiny_pipeline(id2label={"0": "\x1b[2J\u202ecat"})
    text = model_card(pipe, "\x1b]0;x\x07", CardOptions(facts={"data": "faces\x1b[2J"}, files={"\x1b[0m": "a.png"}))
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "faces\\x1b[2J" in text


class TestSnippet:
    @pytest.mark.parametrize(
        ("vae", "options"), [(True, {}), (False, {}), (True, {"revision": "other"}), (False, {"variant": "fp16"})]
    )
    def test_of_a_pipeline_samples_from_this_very_repository(self, fake_hub, tiny_pipeline, vae, options):
        pipe = tiny_pipeline(vae=vae, weight_format="packed")
        pipe.push_to_hub(REPO, token=fake_hub.token, **options)
        text = readme(fake_hub, revision=options.get("revision", "main"))
        names = run_snippet(text)
        assert type(names["pipe"]) is TerDiTPipeline
        assert torch.equal(names["pipe"].transformer.proj_in.weight, pipe.transformer.proj_in.weight)
        assert names["image"].size == ((16, 16) if vae else (8, 8))
        assert "11 labels, by name or id" in text  # "zero, nought" are two names of one class
        assert "pipe(['eight'])" in text

    def test_of_a_pipeline_without_a_vae_gives_latents(self, fake_hub, tiny_pipeline):
        pipe = tiny_pipeline(in_channels=4, id2label={})
        pipe.push_to_hub(REPO, token=fake_hub.token)
        assert run_snippet(readme(fake_hub))["latents"].shape == (1, 4, 8, 8)

    def test_names_that_several_classes_share_are_told_apart(self, fake_hub, tiny_pipeline):
        pipe = tiny_pipeline(id2label={"1": "crane", "7": "crane"})
        pipe.push_to_hub(REPO, token=fake_hub.token)
        assert "pipe(['crane (1)'])" in readme(fake_hub)
        run_snippet(readme(fake_hub))

    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_of_a_model_runs_it(self, fake_hub, tiny_model, weight_format):
        tiny_model(weight_format).push_to_hub(REPO, token=fake_hub.token)
        names = run_snippet(readme(fake_hub))
        assert type(names["transformer"]) is TerDiTTransformer2DModel
        assert names["noise"].shape == (1, 8, 8, 8)

    def test_of_a_layer_runs_it(self, fake_hub):
        TernaryLinear(16, 8).pack().push_to_hub(REPO, token=fake_hub.token)
        names = run_snippet(readme(fake_hub))
        assert type(names["layer"]) is TernaryLinear
        assert names["output"].shape == (1, 8)

    def test_names_the_owner_when_the_caller_did_not(self, fake_hub, tiny_pipeline):
        tiny_pipeline().push_to_hub("terdit", token=fake_hub.token)
        assert 'from_pretrained("user/terdit")' in readme(fake_hub)
        tiny_pipeline().save_pretrained("named-by-folder", push_to_hub=True, token=fake_hub.token)
        assert 'from_pretrained("user/named-by-folder")' in readme(fake_hub, "user/named-by-folder")


class TestMetadata:
    def test_of_a_pipeline(self, fake_hub, tiny_pipeline):
        tiny_pipeline(weight_format="packed").push_to_hub(REPO, token=fake_hub.token)
        data = ModelCard(readme(fake_hub)).data
        assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
        assert data.tags == ["terdit", "ternary", "1.58-bit", "class-conditional", "diffusers"]
        assert data.base_model is None
        assert "license" not in readme(fake_hub)  # none is invented

    def test_of_a_model_and_a_layer_name_no_task(self, fake_hub, tiny_model):
        tiny_model(ternary=False).push_to_hub(REPO, token=fake_hub.token)
        data = ModelCard(readme(fake_hub)).data
        assert data.pipeline_tag is None
        assert data.tags == ["terdit", "class-conditional", "diffusers"]
        TernaryLinear(8, 8).push_to_hub("user/layer", token=fake_hub.token)
        assert ModelCard(readme(fake_hub, "user/layer")).data.tags == ["terdit", "ternary", "1.58-bit", "diffusers"]

    def test_base_model_is_the_repository_it_was_loaded_from(self, fake_hub, tiny_pipeline):
        tiny_pipeline().push_to_hub(REPO, token=fake_hub.token)
        pipe = TerDiTPipeline.from_pretrained(REPO)
        pipe.transformer.pack()
        pipe.push_to_hub("user/packed", token=fake_hub.token)
        assert ModelCard(readme(fake_hub, "user/packed")).data.base_model == REPO
        pipe.push_to_hub(REPO, token=fake_hub.token)  # not of itself
        assert ModelCard(readme(fake_hub)).data.base_model is None
        pipe.push_to_hub("user/other", token=fake_hub.token, base_model="org/original")
        assert ModelCard(readme(fake_hub, "user/other")).data.base_model == "org/original"

    def test_a_folder_is_no_base_model_even_when_it_is_gone(self, fake_hub, tiny_pipeline, tmp_path):
        tiny_pipeline().save_pretrained("outputs/digits")
        pipe = TerDiTPipeline.from_pretrained("outputs/digits")
        (tmp_path / "outputs").rename(tmp_path / "elsewhere")
        pipe.push_to_hub(REPO, token=fake_hub.token)
        assert "outputs/digits" not in readme(fake_hub)


class TestOriginal:
    """The sha256 of the files a model was converted from go with it."""

    def shas(self):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in ORIGINAL.glob("*.pth")}

    def convert(self):
        return convert_original_checkpoint(ORIGINAL, num_attention_heads=4)

    def test_through_saving_unpacking_packing_and_pushing(self, fake_hub, tmp_path):
        self.convert().save_pretrained("converted")
        pipe = TerDiTPipeline.from_pretrained("converted")
        pipe.transformer.unpack()
        pipe.save_pretrained("again")
        pipe = TerDiTPipeline.from_pretrained("again")
        pipe.transformer.pack()
        pipe.push_to_hub(REPO, token=fake_hub.token)
        text = readme(fake_hub)
        for name, sha in self.shas().items():
            assert f"| {name} | `{sha}` |" in text
        assert str(ORIGINAL) not in text
        assert str(tmp_path) not in text
        assert ModelCard(text).data.base_model is None

    def test_of_a_repository_it_names_the_base_model(self, fake_hub):
        fake_hub.upload_folder("lu/terdit", ORIGINAL)
        pipe = convert_original_checkpoint("lu/terdit", num_attention_heads=4)
        pipe.transformer.push_to_hub(REPO, token=fake_hub.token)
        text = readme(fake_hub)
        assert ModelCard(text).data.base_model == "lu/terdit"
        assert "[lu/terdit](https://huggingface.co/lu/terdit)" in text
        assert all(sha in text for sha in self.shas().values())

    def test_a_trained_model_says_what_training_started_from(self):
        text = model_card(self.convert(), "x", CardOptions(facts={"steps": "12"}))
        assert "training started from" in text
        assert "training started from" not in model_card(self.convert(), "x", CardOptions())


class TestSizes:
    def test_are_those_of_the_weights(self, tiny_pipeline):
        pipe = tiny_pipeline(vae=True, weight_format="packed")
        layers = pipe.transformer.ternary_layers().values()
        ternary = sum(layer.in_features * layer.out_features for layer in layers)
        others = sum(p.numel() for p in pipe.transformer.parameters()) - ternary // 4 - len(layers)
        rows = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", model_card(pipe, REPO, CardOptions()), re.MULTILINE))
        assert rows["ternary weights"] == (f"{ternary:,} | {human_bytes(ternary / 4)} | {human_bytes(2 * ternary)}")
        assert rows["their scales"] == f"{len(layers)} | {4 * len(layers)} bytes | {2 * len(layers)} bytes"
        assert rows["other weights"].startswith(f"{others:,} | {human_bytes(4 * others)}")
        vae = sum(p.numel() for p in pipe.vae.parameters())
        assert rows["VAE"].startswith(f"{vae:,} | {human_bytes(4 * vae)}")
        assert rows["together"].startswith(f"{ternary + len(layers) + others + vae:,} | ")

    def test_of_files_fit(self, tiny_model, tmp_path):
        model = tiny_model("packed").half()
        model.save_pretrained(tmp_path)
        told = re.search(r"together \| [\d,]+ \| ([\d.]+) kB", model_card(model, REPO, CardOptions()))[1]
        on_disk = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size / 1000
        assert on_disk - 10 < float(told) < on_disk  # the header of the file

    def test_float_weights_say_what_they_take_packed(self, tiny_model):
        ternary = sum(m.in_features * m.out_features for m in tiny_model().ternary_layers().values())
        text = model_card(tiny_model(), REPO, CardOptions())
        assert f"packed, they take {human_bytes(ternary / 4)}" in text
        assert "packed, they take" not in model_card(tiny_model("packed"), REPO, CardOptions())
        assert "ternary weights" not in model_card(tiny_model(ternary=False), REPO, CardOptions())


class TestPictures:
    def test_are_in_the_repository_and_the_card(self, fake_hub, tiny_pipeline):
        pipe = tiny_pipeline()
        images = pipe([1, 2], num_inference_steps=2).images
        pipe.push_to_hub(REPO, token=fake_hub.token, images={"a | one": images[0], "two": images[1]})
        files = fake_hub.repos[REPO].files()
        shown = re.findall(r"!\[(.*?)\]\((.*?)\)", readme(fake_hub))
        assert shown == [("a \\| one", "card_images/00.png"), ("two", "card_images/01.png")]
        Path("picture.png").write_bytes(files["card_images/01.png"])
        picture = Image.open("picture.png")
        assert picture.size == (128, 128)  # 8 pixels, each a block of 16
        assert picture.resize((8, 8), Image.Resampling.NEAREST).tobytes() == images[1].tobytes()

    def test_of_the_last_push_are_gone_with_the_next_ones(self, fake_hub, tiny_pipeline):
        pipe, picture = tiny_pipeline(), Image.new("RGB", (200, 100))
        pipe.push_to_hub(REPO, token=fake_hub.token, images=[picture] * 3)
        pipe.push_to_hub(REPO, token=fake_hub.token, images=[picture])
        names = [name for name in fake_hub.repos[REPO].files() if name.endswith(".png")]
        assert names == ["card_images/00.png"]

    def test_something_else_is_refused_before_anything_is_uploaded(self, fake_hub, tiny_pipeline):
        with pytest.raises(ValueError, match=r"PIL images.*got str for 'sample 1'"):
            tiny_pipeline().push_to_hub(REPO, token=fake_hub.token, images=["a.png"])
        assert REPO not in fake_hub.repos


OWN = (
    "---\r\nlicense: apache-2.0 # mine\r\ntags:\r\n- art\r\nmodel-index:\r\n- name: x\r\n---\r\n"
    "# My model\r\n\r\nIt is mine.\r\n"
)


class TestAuthor:
    """What the author of a card wrote is never lost."""

    def test_text_and_metadata_of_the_repository_stay(self, fake_hub, tiny_model):
        fake_hub.add_files(REPO, {"README.md": OWN.encode()})
        tiny_model().push_to_hub(REPO, token=fake_hub.token)
        new = readme(fake_hub)
        assert new.endswith("# My model\r\n\r\nIt is mine.\r\n")
        data = ModelCard(new, ignore_metadata_errors=True).data
        assert data.license == "apache-2.0"
        assert data.tags == ["art", "terdit", "ternary", "1.58-bit", "class-conditional", "diffusers"]
        assert data.library_name == "diffusers"
        assert "model-index:\r\n- name: x\r\n" in new
        tiny_model().push_to_hub(REPO, token=fake_hub.token)
        assert readme(fake_hub) == new  # a second push changes no letter

    def test_pictures_bring_the_generated_part_along(self, fake_hub, tiny_model):
        fake_hub.add_files(REPO, {"README.md": OWN.encode()})
        for count in (2, 1):
            tiny_model().push_to_hub(REPO, token=fake_hub.token, images=[Image.new("L", (8, 8))] * count)
            new = readme(fake_hub)
            assert new.index("It is mine.") < new.index(BEGIN) < new.index("![sample 1](card_images/00.png)")
            assert new.count(BEGIN) == 1
            assert ("sample 2" in new) == (count == 2)
            run_snippet(new)

    def test_the_generated_part_is_renewed_between_its_marks(self, fake_hub, tiny_model):
        tiny_model("packed").push_to_hub(REPO, token=fake_hub.token)
        edited = readme(fake_hub).replace(BEGIN, f"Before.\n{BEGIN}") + "\nAfter.\n"
        fake_hub.add_files(REPO, {"README.md": edited.encode()})
        tiny_model("packed", num_layers=3).push_to_hub(REPO, token=fake_hub.token)
        new = readme(fake_hub)
        assert "3 layers" in new
        assert "2 layers" not in new
        assert new.count(BEGIN) == new.count(END) == 1
        assert new.index("Before.") < new.index(BEGIN) < new.index("After.")

    def test_a_card_of_metadata_alone_gets_the_text(self, fake_hub, tiny_model):
        fake_hub.add_files(REPO, {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
        tiny_model().push_to_hub(REPO, token=fake_hub.token)
        assert ModelCard(readme(fake_hub)).data.license == "cc-by-4.0"
        assert run_snippet(readme(fake_hub))["transformer"]

    def test_what_the_caller_asks_for_wins(self, fake_hub, tiny_model):
        fake_hub.add_files(REPO, {"README.md": OWN.encode()})
        tiny_model().push_to_hub(REPO, token=fake_hub.token, license="mit")
        assert ModelCard(readme(fake_hub), ignore_metadata_errors=True).data.license == "mit"

    @pytest.mark.parametrize("kind", ["pipeline", "model"])
    def test_the_card_of_the_folder_is_uploaded_and_stays(self, fake_hub, tiny_pipeline, kind, tmp_path):
        model = tiny_pipeline() if kind == "pipeline" else tiny_pipeline().transformer
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "README.md").write_bytes(OWN.encode())
        model.save_pretrained("folder", push_to_hub=True, repo_id=REPO, token=fake_hub.token)
        assert readme(fake_hub).endswith("It is mine.\r\n")
        assert (tmp_path / "folder" / "README.md").read_bytes().decode() == OWN
        assert "apache-2.0" in readme(fake_hub)

    def test_of_two_texts_neither_is_lost(self, fake_hub, tiny_model, tmp_path, monkeypatch):
        fake_hub.add_files(REPO, {"README.md": b"# The one on the Hub\n"})
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "README.md").write_bytes(OWN.encode())
        said = []
        monkeypatch.setattr(push.logger, "warning", said.append)
        tiny_model().save_pretrained("folder", push_to_hub=True, repo_id=REPO, token=fake_hub.token)
        assert len(said) == 1
        assert said[0].startswith(f"{REPO} has its own README.md")
        assert "# The one on the Hub" in readme(fake_hub)
        assert (tmp_path / "folder" / "README.md").read_bytes().decode() == OWN

    @pytest.mark.parametrize(
        "content",
        [b"---\nlicense: [mit\n---\n# Mine\n", b"---\n- a\n---\ntext", b"---\n1: a\n---\ntext", b"\xff\xfe\x00"],
        ids=["YAML", "list", "key", "bytes"],
    )
    def test_a_broken_card_stops_before_the_upload(self, fake_hub, tiny_model, content):
        fake_hub.add_files(REPO, {"README.md": content})
        head = fake_hub.repos[REPO].sha()
        with pytest.raises(ValueError, match=f"README.md of {REPO} cannot be read"):
            tiny_model().push_to_hub(REPO, token=fake_hub.token)
        assert fake_hub.repos[REPO].sha() == head


def test_the_text_between_two_marks_only_is_generated():
    assert own_text(RepoCard(BEGIN + "x" + END)) == ""
    assert own_text(RepoCard(f"a\n{BEGIN}x{END}\nb")) == "a\n\nb"
    assert own_text(RepoCard(f"{END} {BEGIN}")) == f"{END} {BEGIN}"
    assert own_text(None) == ""


def test_metadata_keeps_its_order_and_its_unknown_parts():
    metadata = "---\nmodel-index:\n- name: x\n  own: 1\n  results: []\nzebra: '1.0'\ntags: art\n---\nMine.\n"
    generated = "---\nlibrary_name: diffusers\ntags:\n- terdit\n---\n\nNew.\n"
    merged = merge_cards(generated, RepoCard(metadata), CardOptions(license="mit"))
    assert merged == (
        metadata.replace("tags: art\n", "tags:\n- art\n- terdit\nlibrary_name: diffusers\nlicense: mit\n")
    )
    assert merge_cards(generated, RepoCard(merged), CardOptions()) == merged
