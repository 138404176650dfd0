"""Converted checkpoints equal the authors' own code: `tests/data/reference/` holds its inputs and outputs."""

import argparse
import copy
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, convert_original_checkpoint, ternarize
from diffusers_terdit.cli import main
from diffusers_terdit.conversion.terdit import (
    WEIGHTS_NAMES,
    convert_name,
    imagenet_labels,
    label_rows,
    list_checkpoints,
)
from diffusers_terdit.storage.weights import load_pickle


REFERENCE = Path(__file__).parents[1] / "data" / "reference"
PACKED, FLOAT = REFERENCE / "tiny-qknorm-packed", REFERENCE / "tiny-qknorm-float"
ROW_TO_CLASS = torch.tensor([*label_rows(1000), 1000])


@pytest.fixture(scope="module")
def vectors():
    return load_file(REFERENCE / "tiny-qknorm.safetensors")


@pytest.fixture(scope="module", params=[PACKED, FLOAT], ids=["packed", "float"])
def pipe(request):
    pipe = convert_original_checkpoint(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_output_equals_the_original(pipe, vectors):
    output = pipe.transformer(vectors["x"], vectors["t"], ROW_TO_CLASS[vectors["y"]]).sample
    assert relative_error(output, vectors["out"]) < 1e-5


@torch.no_grad()
def test_guided_output_equals_the_original(pipe, vectors):
    labels = torch.cat([ROW_TO_CLASS[vectors["class_labels"]], torch.tensor([1000, 1000])])
    output = pipe.transformer(vectors["z"].repeat(2, 1, 1, 1), torch.tensor(500), labels).sample
    pipe._guidance_scale = 4.0
    assert relative_error(pipe.guide(output), vectors["cfg_out"]) < 1e-5


def test_sampling_trajectory_equals_the_original(pipe, vectors, monkeypatch):
    """12 ancestral steps with the original's noise, handed out in its order by the scheduler's random source."""
    noise = iter(vectors["noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(noise))
    steps = []

    def record(pipe, step, timestep, kwargs):
        steps.append((int(timestep), kwargs["latents"]))
        return kwargs

    pipe(
        ROW_TO_CLASS[vectors["class_labels"]],
        num_inference_steps=12,
        guidance_scale=4.0,
        latents=vectors["z"],
        output_type="latent",
        callback_on_step_end=record,
    )
    assert [timestep for timestep, _ in steps] == vectors["timesteps"].tolist()
    for (_, latents), expected in zip(steps, vectors["trajectory"], strict=True):
        assert relative_error(latents, expected) < 1e-4


def test_packing_the_float_form_gives_the_published_bytes():
    published = torch.load(PACKED / WEIGHTS_NAMES[0], weights_only=True)
    packed = {convert_name(n) + "_packed": t for n, t in published.items() if t.dtype == torch.uint8}
    for transformer in (
        convert_original_checkpoint(FLOAT).transformer.pack(),
        convert_original_checkpoint(FLOAT, weight_format="packed").transformer,
    ):
        state_dict = transformer.state_dict()
        assert len(packed) == 16
        for name, expected in packed.items():
            assert torch.equal(state_dict[name], expected), name


def test_packed_form_unpacks_to_the_same_codes():
    packed = convert_original_checkpoint(PACKED).transformer
    unpacked = convert_original_checkpoint(PACKED, weight_format="float").transformer
    assert unpacked.config.weight_format == "float"
    for (name, a), b in zip(packed.ternary_layers().items(), unpacked.ternary_layers().values(), strict=True):
        assert torch.equal(a.ternary_weight(), ternarize(b.weight)), name


def test_labels_are_standard_imagenet_ids(vectors):
    rows = label_rows(1000)
    assert [rows[2], rows.index(2), rows[0], rows[999], rows[111]] == [10, 112, 0, 999, 199]
    original = torch.load(PACKED / WEIGHTS_NAMES[0], weights_only=True)["y_embedder.embedding_table.weight"]
    table = convert_original_checkpoint(PACKED).transformer.class_embed.weight
    assert torch.equal(table[2], original[112])
    assert torch.equal(table[1000], original[1000])


def test_label_names_come_with_the_conversion(pipe):
    assert pipe.get_label_ids(["golden retriever", "tench", "volcano"]) == [207, 0, 980]
    assert len(imagenet_labels()) == 1000


def test_converted_pipeline_survives_saving(pipe, vectors, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = TerDiTPipeline.from_pretrained(tmp_path)
    assert again.config.guidance_channels == 3
    assert again.labels == pipe.labels
    state_dict = again.transformer.state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, state_dict[name])


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / folder.name))


class Payload:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", [WEIGHTS_NAMES[0], "model_args.pth"])
@pytest.mark.parametrize("form", ["zip", "legacy", "raw"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, name, form):
    folder, canary = copy_of(PACKED, tmp_path), tmp_path / "canary"
    if form == "raw":
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save({"x": Payload(canary)}, folder / name, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises((ValueError, OSError), match=name) as caught:
        convert_original_checkpoint(folder)
    assert not canary.exists()
    assert "weights_only" not in str(caught.value)  # torch says how to run it after all
    assert caught.value.__cause__ is None or "weights_only" not in str(caught.value.__cause__)


NORM, WQ = "layers.0.ffn_norm.weight", "layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (WQ, torch.full((32, 128), 0b11_00_00_00, dtype=torch.uint8), "ternary codes"),
        ("layers.0.attention.wq.alphas", torch.full((1,), float("inf")), "wq.alphas` holds NaN or infinity"),
        (NORM, torch.zeros(128, dtype=torch.complex64), "torch.complex64"),
        (NORM, torch.zeros(128, device="meta"), "on meta"),
        (NORM, torch.zeros(()).expand(2**50), "memory for fewer numbers"),
        (f"layers.{10**15}.attention.wq.alphas", torch.ones(1), "tensors do not fit"),
        ("layers.x.attention.wq.alphas", torch.ones(1), "does not belong to a TerDiT"),
        (3, torch.ones(1), "does not hold a dict of tensors"),
        (
            "layers.0.attention.wq.weight_scale",
            torch.ones(1),
            "a second `transformer_blocks.0.attn.to_q.weight_scale`",
        ),
        ("layers.0.attention.wq.weight_packed", torch.ones(32, 128), "attn.to_q.weight_packed` of this package"),
        (NORM, torch.zeros(128, dtype=torch.complex64).conj().imag, "a view with the signs changed"),
    ],
    ids=[
        *("code-3", "infinite-scale", "complex", "meta", "petabyte", "far-block", "no-block", "no-name"),
        *("second", "second-packed", "negative"),
    ],
)
def test_damaged_state_dict_is_a_value_error_that_names_file_and_tensor(tmp_path, name, value, message):
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    torch.save({**torch.load(path, weights_only=True), name: value}, path)
    with pytest.raises(ValueError, match=message) as caught:
        convert_original_checkpoint(folder)
    assert "consolidated_ema_ternary" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("name", [NORM, "x_embedder.weight"])
def test_a_nested_tensor_is_refused(tmp_path, name):
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    value = torch.nested.nested_tensor([torch.zeros(64), torch.zeros(64)])
    torch.save({**torch.load(path, weights_only=True), name: value}, path)
    with pytest.raises(ValueError, match=f"consolidated_ema_ternary.*tensor `{name}` is nested"):
        convert_original_checkpoint(folder)


def test_a_float_in_the_place_of_codes_does_not_fit(tmp_path):
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    tensors = torch.load(path, weights_only=True)
    tensors["layers.1.attention.wq.weight_packed"] = tensors.pop("layers.1.attention.wq.weight").float()
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"attn.to_q.weight_packed`: found .*float32.*expected .*uint8"):
        convert_original_checkpoint(folder)


def test_tensors_that_share_memory_are_refused(tmp_path):
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    tensors = torch.load(path, weights_only=True)
    tensors["layers.1.ffn_norm.weight"] = tensors[NORM]
    torch.save(tensors, path)
    with pytest.raises(
        ValueError, match=r"layers.1.ffn_norm.weight` shares its memory with `layers.0.ffn_norm.weight`"
    ):
        convert_original_checkpoint(folder)


def rewrite_archive(path, change):
    """Write the records of a PyTorch file again, after `change(name, data)`, with right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize("length", [-64, -1, 64])
def test_a_record_of_another_length_is_refused(tmp_path, length):
    """Mapped, a tensor would go on into the next record: it ended in a header's bytes as floats."""
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    other = {-64: lambda data: data[:-64], -1: lambda data: data[:-1], 64: lambda data: data + bytes(64)}[length]
    rewrite_archive(path, lambda name, data: other(data) if name.endswith("/data/0") else data)
    with pytest.raises(OSError, match=r"consolidated_ema_ternary.*its records are not as long as its tensors"):
        convert_original_checkpoint(folder)


def test_records_with_exchanged_lengths_are_refused(tmp_path):
    """Together they are as long as their tensors, and one of these would go on into the next record."""
    path = tmp_path / "x.pth"
    torch.save({"x": torch.arange(16.0), "y": torch.arange(32.0)}, path)
    assert torch.equal(load_pickle(path)["y"], torch.arange(32.0))
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.read(name) for name in archive.namelist() if "/data/" in name)
    rewrite_archive(path, lambda name, data: {"x/data/0": second, "x/data/1": first}.get(name, data))
    with pytest.raises(OSError, match="its records are not as long as its tensors"):
        load_pickle(path)


def test_records_that_are_one_place_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """A thousand names of one record: a checksum of each would take a thousand times as long."""
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    with zipfile.ZipFile(path, "a") as archive:
        big = next(record for record in archive.infolist() if record.filename.endswith("/data/0"))
        for number in range(1000):
            again = copy.copy(big)
            again.filename = f"again/{number}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    monkeypatch.setattr(
        zipfile.ZipFile, "testzip", lambda a: pytest.fail("read") if "consolid" in a.filename else None
    )
    with pytest.raises(OSError, match="two records have one place or one name"):
        convert_original_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_records_of_one_name_are_refused(tmp_path):
    folder = copy_of(PACKED, tmp_path)
    path = next(folder.glob("consolidated*.pth"))
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, archive.read(name))
    with pytest.raises(OSError, match="two records have one place or one name"):
        convert_original_checkpoint(folder)


def test_arguments_of_another_type_or_size_are_a_value_error(tmp_path):
    folder = copy_of(PACKED, tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        args = vars(torch.load(folder / "model_args.pth", weights_only=True))
    for change, message in (
        ({"image_size": 10**30}, "image_size="),
        ({"image_size": [256]}, "image_size="),
        ({"model": "DiT_Llama_patch99999999999999999999"}, "patches of 9999"),
        ({"ntk_factor": torch.ones(2)}, r"ntk_factor=tensor\(\[1\., 1\.\]\)"),
        ({"model": 5}, "model=5"),
    ):
        torch.save(argparse.Namespace(**{**args, **change}), folder / "model_args.pth")
        with pytest.raises(ValueError, match=message):
            convert_original_checkpoint(folder)


@pytest.mark.parametrize("name", ["ntk_factor", "image_size", "model", "vae"])
def test_lists_that_are_too_deep_to_be_printed_are_a_value_error(tmp_path, name):
    folder, depth = copy_of(PACKED, tmp_path), 5000
    entry = b"X" + len(name).to_bytes(4, "little") + name.encode() + b"]" * depth + b"a" * (depth - 1) + b"s"
    rewrite_archive(
        folder / "model_args.pth", lambda n, data: b"\x80\x02}" + entry + b"." if n[-3:] == "pkl" else data
    )
    with pytest.raises(ValueError, match=rf"{name}=\[\[\[\[.*\.\.\."):
        convert_original_checkpoint(folder, vae="auto")


def test_ternary_file_is_preferred_and_another_can_be_named(tmp_path):
    folder = copy_of(PACKED, tmp_path)
    shutil.copy(FLOAT / WEIGHTS_NAMES[2], folder)
    assert convert_original_checkpoint(folder).transformer.config.weight_format == "packed"
    named = convert_original_checkpoint(folder, weights_name=WEIGHTS_NAMES[2])
    assert named.transformer.config.weight_format == "float"


def test_vae_can_be_given_as_a_folder(tmp_path, tiny_vae):
    tiny_vae.save_pretrained(tmp_path)
    pipe = convert_original_checkpoint(PACKED, vae=tmp_path)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(207, num_inference_steps=2, guidance_scale=1.0).images[0]
    side = 8 * pipe.vae_scale_factor
    assert image.size == (side, side)


def test_hub_conversion_downloads_only_what_it_needs(fake_hub, tmp_path):
    folder = tmp_path / "repo" / "600M"
    shutil.copytree(PACKED, folder)
    shutil.copy(FLOAT / WEIGHTS_NAMES[2], folder)
    fake_hub.upload_folder("someone/terdit", tmp_path / "repo")
    pipe = convert_original_checkpoint("someone/terdit", subfolder="600M")
    assert pipe.transformer.config.weight_format == "packed"
    assert sorted({Path(name).name for name, _ in fake_hub.downloads}) == [WEIGHTS_NAMES[0], "model_args.pth"]


class TestSeveralCheckpoints:
    """Nobody knows what the authors' folders are called: size and resolution find one."""

    @pytest.fixture
    def repo(self, tmp_path):
        for name, model, side in (
            ("3B_1180000", "DiT_Llama_3B_patch2", 256),
            ("600M_1750000", "DiT_Llama_600M_patch2", 256),
            ("3B_512", "DiT_Llama_3B_patch2", 512),
        ):
            shutil.copytree(PACKED, tmp_path / "repo" / name)
            arguments = argparse.Namespace(model=model, image_size=side, vae="ema")
            torch.save(arguments, tmp_path / "repo" / name / "model_args.pth")
        return tmp_path / "repo"

    @pytest.fixture(params=["folder", "hub"])
    def path(self, request, repo, fake_hub):
        if request.param == "folder":
            return str(repo)
        fake_hub.upload_folder("lucky-lance/TerDiT", repo)
        return "lucky-lance/TerDiT"

    def test_it_lists_what_is_there(self, path):
        found = list_checkpoints(path)
        assert [(one.folder, one.size, one.resolution) for one in found] == [
            ("3B_1180000", "4.2b", 256), ("3B_512", "4.2b", 512), ("600M_1750000", "600m", 256),
        ]  # fmt: skip
        assert all(one.bytes == (PACKED / WEIGHTS_NAMES[0]).stat().st_size for one in found)

    @pytest.mark.parametrize("asked", [{}, {"size": "4.2b"}, {"size": "7b"}, {"resolution": 256}])
    def test_what_is_not_clear_lists_the_choices(self, path, asked):
        with pytest.raises(FileNotFoundError) as raised:
            convert_original_checkpoint(path, **asked)
        for part in (path, "3B_1180000 (4.2b, 256 px", "3B_512 (4.2b, 512 px", "600M_1750000 (600m, 256 px"):
            assert part in str(raised.value)

    def test_one_is_converted_and_no_other_downloaded(self, path, fake_hub):
        pipe = convert_original_checkpoint(path, size="4.2B", resolution=512)
        assert pipe.transformer.config.sample_size == 64
        weights = [name for name, _ in fake_hub.downloads if name.endswith(WEIGHTS_NAMES[0])]
        assert weights == (["3B_512/" + WEIGHTS_NAMES[0]] if path == "lucky-lance/TerDiT" else [])
        with pytest.raises(FileNotFoundError):
            convert_original_checkpoint(path, subfolder="3B")

    def test_the_command_and_the_hint(self, path, tmp_path, capsys):
        assert main(["convert", path, str(tmp_path / "out"), "--size", "600m"]) == 0
        assert TerDiTPipeline.from_pretrained(tmp_path / "out").transformer.config.sample_size == 32
        with pytest.raises(OSError, match=f"Convert one of them: `terdit convert {path} FOLDER`"):
            TerDiTPipeline.from_pretrained(path)
        capsys.readouterr()
        assert main(["convert", path, str(tmp_path / "other"), "--pipeline", "x"]) == 1
        assert "--pipeline applies to models of diffusers" in capsys.readouterr().err
