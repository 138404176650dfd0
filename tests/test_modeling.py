import inspect
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.storage import weights
from diffusers_terdit.storage.inspection import inspect_weights


FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"
BIN = "diffusion_pytorch_model.bin"
FORMATS = ["float", "packed"]
SHARDED = {"max_shard_size": "20KB"}
PLAIN, QUERY = "proj_out.weight", "transformer_blocks.1.attn.to_q"
both_memory_modes = pytest.mark.parametrize("low_cpu_mem_usage", [True, False], ids=["low memory", "plain"])


def load(folder, **kwargs):
    return TerDiTTransformer2DModel.from_pretrained(folder, **kwargs)


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def rewrite(path, edit, keep_metadata=False):
    """Change the tensors of a weights file; without its metadata nothing but the tensors themselves can tell."""
    if path.suffix == ".bin":
        tensors, metadata = torch.load(path, weights_only=True), None
        edit(tensors)
        torch.save(tensors, path)
        return
    tensors, metadata = read(path)
    edit(tensors)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata if keep_metadata else {"format": "pt"})


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def flip_bit(tensors, name, byte=5, bit=1):
    tensors[name].view(-1).view(torch.uint8)[byte] ^= 1 << bit


def change_code(tensors, name):
    codes = tensors[name].view(-1)
    codes[3] = codes[3] & 0b11111100 | (codes[3] + 1 & 0b11) % 3  # another of the three valid codes


# name of the mutation: (formats it applies to, the tensor that must be named, the edit)
STRUCTURE = {
    "missing": (FORMATS, PLAIN, lambda t: t.pop(PLAIN)),
    "missing scale": (FORMATS, f"{QUERY}.weight_scale", lambda t: t.pop(f"{QUERY}.weight_scale")),
    "missing codes": (["packed"], f"{QUERY}.weight_packed", lambda t: t.pop(f"{QUERY}.weight_packed")),
    "unexpected": (FORMATS, "extra.weight", lambda t: t.update({"extra.weight": torch.zeros(2)})),
    "unexpected block": (
        FORMATS,
        "transformer_blocks.2.norm1.weight",
        lambda t: t.update({"transformer_blocks.2.norm1.weight": torch.zeros(32)}),
    ),
    "renamed": (FORMATS, "proj_out.weights", lambda t: t.update({"proj_out.weights": t.pop(PLAIN)})),
    "rows cut": (FORMATS, PLAIN, lambda t: t.update({PLAIN: t[PLAIN][:-1]})),
    "transposed codes": (
        ["packed"],
        f"{QUERY}.weight_packed",
        lambda t: t.update({f"{QUERY}.weight_packed": t[f"{QUERY}.weight_packed"].T}),
    ),
    "scale per row": (
        FORMATS,
        f"{QUERY}.weight_scale",
        lambda t: t.update({f"{QUERY}.weight_scale": torch.ones(32, 1)}),
    ),
    "codes as float32": (
        ["packed"],
        f"{QUERY}.weight_packed",
        lambda t: t.update({f"{QUERY}.weight_packed": t[f"{QUERY}.weight_packed"].float()}),
    ),
    "codes as int8": (
        ["packed"],
        f"{QUERY}.weight_packed",
        lambda t: t.update({f"{QUERY}.weight_packed": t[f"{QUERY}.weight_packed"].view(torch.int8)}),
    ),
    "float as uint8": (FORMATS, PLAIN, lambda t: t.update({PLAIN: t[PLAIN].to(torch.uint8)})),
    "float as int64": (FORMATS, PLAIN, lambda t: t.update({PLAIN: t[PLAIN].long()})),
    "code 3": (["packed"], f"{QUERY}.weight_packed", lambda t: t[f"{QUERY}.weight_packed"][2, 3].fill_(0b01110101)),
    "code 3 in the last bits": (
        ["packed"],
        f"{QUERY}.weight_packed",
        lambda t: t[f"{QUERY}.weight_packed"][-1, -1].fill_(0b01010111),
    ),
}
STRUCTURE_CASES = [
    pytest.param(weight_format, name, edit, id=f"{weight_format}-{mutation}")
    for mutation, (formats, name, edit) in STRUCTURE.items()
    for weight_format in formats
]
# name of the damage: (formats it applies to, the tensor it touches, the edit)
DAMAGE = {
    "flipped mantissa bit": (FORMATS, PLAIN, lambda t: flip_bit(t, PLAIN)),
    "flipped bit of a scale": (FORMATS, f"{QUERY}.weight_scale", lambda t: flip_bit(t, f"{QUERY}.weight_scale", 1)),
    "another valid code": (["packed"], f"{QUERY}.weight_packed", lambda t: change_code(t, f"{QUERY}.weight_packed")),
    "rounded": (FORMATS, PLAIN, lambda t: t.update({PLAIN: t[PLAIN].bfloat16()})),
}
DAMAGE_CASES = [
    pytest.param(weight_format, name, edit, id=f"{weight_format}-{damage}")
    for damage, (formats, name, edit) in DAMAGE.items()
    for weight_format in formats
]


class TestStrictLoading:
    @both_memory_modes
    @pytest.mark.parametrize(("weight_format", "name", "edit"), STRUCTURE_CASES)
    def test_wrong_tensor_is_an_error_that_names_file_and_tensor(
        self, tiny_model, tmp_path, weight_format, name, edit, low_cpu_mem_usage
    ):
        tiny_model(weight_format).save_pretrained(tmp_path)
        rewrite(tmp_path / FILE, edit)
        with pytest.raises(ValueError, match=re.escape(f"`{name}`")) as error:
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert FILE in str(error.value)

    @pytest.mark.parametrize(("weight_format", "name", "edit"), STRUCTURE_CASES)
    def test_wrong_tensor_in_a_shard_is_an_error_that_names_the_shard(
        self, tiny_model, tmp_path, weight_format, name, edit
    ):
        tiny_model(weight_format).save_pretrained(tmp_path, **SHARDED)
        weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        shard = tmp_path / weight_map.get(name, weight_map[PLAIN])
        rewrite(shard, edit)
        with pytest.raises(ValueError, match=re.escape(f"`{name}`")) as error:
            load(tmp_path)
        assert shard.name in str(error.value)

    @both_memory_modes
    @pytest.mark.parametrize(("weight_format", "name", "edit"), STRUCTURE_CASES)
    def test_wrong_tensor_in_a_bin_file_is_an_error_that_names_file_and_tensor(
        self, tiny_model, tmp_path, weight_format, name, edit, low_cpu_mem_usage
    ):
        tiny_model(weight_format).save_pretrained(tmp_path, safe_serialization=False)
        rewrite(tmp_path / BIN, edit)
        with pytest.raises(ValueError, match=re.escape(f"`{name}`")) as error:
            load(tmp_path, use_safetensors=False, low_cpu_mem_usage=low_cpu_mem_usage)
        assert BIN in str(error.value)

    @pytest.mark.parametrize("mutation", ["missing", "unexpected", "codes as float32", "code 3"])
    def test_wrong_tensor_in_a_bin_shard_is_an_error_that_names_the_shard(self, tiny_model, tmp_path, mutation):
        tiny_model("packed").save_pretrained(tmp_path, safe_serialization=False, **SHARDED)
        weight_map = json.loads((tmp_path / f"{BIN}.index.json").read_text())["weight_map"]
        _, name, edit = STRUCTURE[mutation]
        shard = tmp_path / weight_map.get(name, weight_map[PLAIN])
        rewrite(shard, edit)
        with pytest.raises(ValueError, match=re.escape(f"`{name}`")) as error:
            load(tmp_path, use_safetensors=False)
        assert shard.name in str(error.value)

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    @pytest.mark.parametrize(("weight_format", "name", "edit"), DAMAGE_CASES)
    def test_damage_that_leaves_every_name_and_shape_is_found_by_the_digest(
        self, tiny_model, tmp_path, weight_format, name, edit, save
    ):
        tiny_model(weight_format).save_pretrained(tmp_path, **save)
        path = shard_of(tmp_path, name) if save else tmp_path / FILE
        rewrite(path, edit, keep_metadata=True)
        with pytest.raises(ValueError, match="digest") as error:
            load(tmp_path)
        assert path.name in str(error.value)

    @pytest.mark.parametrize(("weight_format", "suffix"), [("float", "weight"), ("packed", "weight_packed")])
    def test_swapped_tensors_are_found_by_the_digest(self, tiny_model, tmp_path, weight_format, suffix):
        tiny_model(weight_format).save_pretrained(tmp_path)
        query, value = f"{QUERY}.{suffix}", f"transformer_blocks.1.attn.to_v.{suffix}"
        rewrite(tmp_path / FILE, lambda t: t.update({query: t[value], value: t[query]}), keep_metadata=True)
        with pytest.raises(ValueError, match="digest"):
            load(tmp_path)

    @both_memory_modes
    def test_digest_is_checked_in_both_memory_modes(self, tiny_model, tmp_path, low_cpu_mem_usage):
        tiny_model("packed").save_pretrained(tmp_path)
        rewrite(tmp_path / FILE, lambda t: change_code(t, f"{QUERY}.weight_packed"), keep_metadata=True)
        with pytest.raises(ValueError, match="digest"):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
    def test_device_map_loads_as_strictly(self, tiny_model, tmp_path, device_map):
        tiny_model("packed").save_pretrained(tmp_path)
        rewrite(tmp_path / FILE, lambda t: t.pop(PLAIN))
        with pytest.raises(ValueError, match=PLAIN):
            load(tmp_path, device_map=device_map)

    @both_memory_modes
    @pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "bare"])
    @pytest.mark.parametrize("save", [{}, SHARDED, {"safe_serialization": False}], ids=["single", "sharded", "bin"])
    @pytest.mark.parametrize(("stored", "asked"), [("float", "packed"), ("packed", "float")])
    def test_weight_format_that_contradicts_the_file_is_an_error(
        self, tiny_model, tmp_path, stored, asked, save, metadata, low_cpu_mem_usage
    ):
        tiny_model(stored).save_pretrained(tmp_path, **save)
        if not metadata:
            for path in tmp_path.glob("*.safetensors"):
                rewrite(path, lambda tensors: None)
        kwargs = {"use_safetensors": False} if "safe_serialization" in save else {}
        with pytest.raises(ValueError, match="diffusion_pytorch_model"):
            load(tmp_path, weight_format=asked, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        assert load(tmp_path, **kwargs).config.weight_format == stored

    def test_error_of_a_contradicting_weight_format_says_what_to_do(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r'weight_format="packed" and call `\.unpack\(\)`'):
            load(tmp_path, weight_format="float")

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_ternary_file_does_not_load_into_the_full_precision_twin(self, tiny_model, tmp_path, weight_format):
        tiny_model(weight_format).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=FILE):
            load(tmp_path, ternary=False, weight_format="float")

    def test_full_precision_file_does_not_load_into_a_ternary_model(self, tiny_model, tmp_path):
        tiny_model(ternary=False).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="weight_scale"):
            load(tmp_path, ternary=True)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"terdit.version": "2"}, "version '2'"),
            ({"terdit.packing": "column-2bit"}, "'column-2bit'"),
            ({"terdit.packing": None}, "holds float weights"),
        ],
        ids=str,
    )
    def test_metadata_of_another_format_is_an_error(self, tiny_model, tmp_path, change, message):
        tiny_model("packed").save_pretrained(tmp_path)
        tensors, metadata = read(tmp_path / FILE)
        metadata = {key: value for key, value in (metadata | change).items() if value is not None}
        save_file(tensors, tmp_path / FILE, metadata)
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path)
        assert FILE in str(error.value)

    @both_memory_modes
    @pytest.mark.parametrize("weight_format", FORMATS)
    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_file_without_our_metadata_loads_with_one_line_of_information(
        self, tiny_model, tmp_path, caplog, weight_format, metadata, low_cpu_mem_usage
    ):
        model = tiny_model(weight_format)
        model.save_pretrained(tmp_path)
        save_file(read(tmp_path / FILE)[0], tmp_path / FILE, metadata)
        with caplog.at_level(logging.INFO, "diffusers_terdit"):
            loaded = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert equal_state(loaded, model)
        lines = [r for r in caplog.records if r.name.startswith("diffusers_terdit")]
        assert [(r.levelname, FILE in r.getMessage()) for r in lines] == [("INFO", True)]

    @both_memory_modes
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_scale_that_another_program_stored_in_half_becomes_float32(
        self, tiny_model, tmp_path, weight_format, dtype, low_cpu_mem_usage
    ):
        tiny_model(weight_format).save_pretrained(tmp_path)
        name = f"{QUERY}.weight_scale"
        rewrite(tmp_path / FILE, lambda t: t.update({name: t[name].bfloat16()}))
        kwargs = {} if dtype is None else {"dtype": dtype}
        scale = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs).state_dict()[name]
        assert scale.dtype == torch.float32
        assert torch.equal(scale, read(tmp_path / FILE)[0][name].float())

    def test_refused_load_leaves_the_default_dtype_alone(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        try:
            with pytest.raises(ValueError, match="groups of 5"):
                load(tmp_path, scale_granularity=5, dtype=torch.bfloat16)
            assert torch.get_default_dtype() == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize("cls", [DiffusionPipeline, TerDiTPipeline])
    def test_pipeline_with_a_damaged_transformer_does_not_load(self, tiny_pipeline, tmp_path, cls):
        tiny_pipeline(weight_format="packed").save_pretrained(tmp_path)
        path = tmp_path / "transformer" / FILE
        rewrite(path, lambda t: change_code(t, f"{QUERY}.weight_packed"), keep_metadata=True)
        with pytest.raises(ValueError, match="digest"):
            cls.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="digest"):
            AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def lie(edit):
    def apply(data):
        header, body = header_of(data)
        edit(header, body)
        return with_header(header, body)

    return apply


def overlap(header, body):
    header["proj_out.bias"]["data_offsets"] = [offset - 4 for offset in header["proj_out.bias"]["data_offsets"]]


UNREADABLE = {
    "empty": lambda data: b"",
    "four bytes": lambda data: data[:4],
    "header only": lambda data: data[: 8 + struct.unpack("<Q", data[:8])[0]],
    "half": lambda data: data[: len(data) // 2],
    "last byte cut": lambda data: data[:-1],
    "a byte too many": lambda data: data + b"\0",
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "a Git LFS pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "an HTML page": lambda data: b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    "header longer than the file": lambda data: struct.pack("<Q", 1 << 60) + data[8:],
    "header that is not JSON": lambda data: with_header(b"{'proj_out.weight': 1}  ", data),
    "header that is not UTF-8": lambda data: with_header(b'{"\xff": 1}', data),
    "header that is a list": lambda data: with_header([], b""),
    "overlapping tensors": lie(overlap),
    "tensor beyond the end": lie(lambda h, body: h[PLAIN].update(data_offsets=[len(body), len(body) + 4096])),
    "tensor larger than its bytes": lie(lambda h, body: h[PLAIN].update(shape=[64, 32])),
    "negative size": lie(lambda h, body: h[PLAIN].update(shape=[-32, -32])),
    "unknown dtype": lie(lambda h, body: h[PLAIN].update(dtype="T2")),
    "missing offsets": lie(lambda h, body: h[PLAIN].pop("data_offsets")),
}


class TestUnreadableFiles:
    @both_memory_modes
    @pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
    def test_unreadable_file_is_an_oserror_that_names_it(self, tiny_model, tmp_path, damage, low_cpu_mem_usage):
        tiny_model("packed").save_pretrained(tmp_path)
        path = tmp_path / FILE
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(OSError, match=f"{re.escape(FILE)}|git-lfs"):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
    def test_unreadable_shard_is_an_oserror_that_names_it(self, tiny_model, tmp_path, damage):
        tiny_model("packed").save_pretrained(tmp_path, **SHARDED)
        path = shard_of(tmp_path, PLAIN)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(OSError, match=re.escape(path.name)):
            load(tmp_path)

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: b"not a pickle",
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: pickle.dumps([1, 2], protocol=2),
        ],
        ids=["empty", "text", "half", "last byte cut", "a list"],
    )
    def test_bin_file_that_holds_no_tensors_is_an_oserror_that_names_it(self, tiny_model, tmp_path, save, damage):
        tiny_model("packed").save_pretrained(tmp_path, safe_serialization=False, **save)
        path = sorted(tmp_path.glob("*.bin"))[-1]
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(OSError, match=re.escape(path.name)):
            load(tmp_path, use_safetensors=False)

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    def test_bin_file_that_runs_code_is_an_oserror_and_runs_nothing(self, tiny_model, tmp_path, save):
        class Exploit:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        tiny_model("packed").save_pretrained(tmp_path, safe_serialization=False, **save)
        path = sorted(tmp_path.glob("*.bin"))[-1]
        torch.save({PLAIN: Exploit()}, path)
        with pytest.raises(OSError, match=re.escape(path.name)):
            load(tmp_path, use_safetensors=False)
        assert not (tmp_path / "ran").exists()

    def test_missing_folder_is_an_oserror_that_names_it(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            load(tmp_path / "nowhere", local_files_only=True)

    def test_folder_without_weights_is_an_oserror(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        (tmp_path / FILE).unlink()
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            load(tmp_path)

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_no_single_flipped_bit_loads_as_another_layer(self, tmp_path, weight_format):
        # Every byte of a small file, header included: an error of the documented kinds, or the same tensors.
        layer = TernaryLinear(4, 8)
        torch.nn.init.normal_(layer.bias)
        (layer.pack() if weight_format == "packed" else layer).save_pretrained(tmp_path)
        data = (tmp_path / FILE).read_bytes()
        errors = 0
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            (tmp_path / FILE).write_bytes(damaged)
            try:
                loaded = TernaryLinear.from_pretrained(tmp_path)
            except (ValueError, OSError):
                errors += 1
            else:
                assert equal_state(loaded, layer), position
        assert errors > len(data) / 2


class TestShards:
    def edit_index(self, folder, edit):
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    @pytest.fixture
    def folder(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path, **SHARDED)
        return tmp_path

    def test_several_shards_carry_metadata_and_digest_each(self, folder):
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2
        digests = {read(shard)[1]["terdit.sha256"] for shard in shards}
        assert len(digests) == len(shards)
        assert {read(shard)[1]["terdit.packing"] for shard in shards} == {"row-chunk-2bit"}

    @both_memory_modes
    def test_index_that_names_a_tensor_its_shard_lacks_is_an_error(self, folder, low_cpu_mem_usage):
        rewrite(shard_of(folder, PLAIN), lambda t: t.pop(PLAIN))
        with pytest.raises(ValueError, match=re.escape(f"`{PLAIN}`")):
            load(folder, low_cpu_mem_usage=low_cpu_mem_usage)

    @both_memory_modes
    def test_index_that_names_a_tensor_of_no_file_is_an_error(self, folder, low_cpu_mem_usage):
        shard = shard_of(folder, PLAIN).name
        self.edit_index(folder, lambda weight_map: weight_map.update({"ghost.weight": shard}))
        with pytest.raises(ValueError, match=r"ghost\.weight"):
            load(folder, low_cpu_mem_usage=low_cpu_mem_usage)

    @both_memory_modes
    def test_index_that_leaves_out_a_tensor_is_an_error(self, folder, low_cpu_mem_usage):
        self.edit_index(folder, lambda weight_map: weight_map.pop(PLAIN))
        with pytest.raises(ValueError, match=re.escape(PLAIN)):
            load(folder, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_index_that_leaves_out_a_shard_is_an_error(self, folder):
        gone = shard_of(folder, PLAIN).name

        def drop(weight_map):
            for name in [name for name, shard in weight_map.items() if shard == gone]:
                del weight_map[name]

        self.edit_index(folder, drop)
        with pytest.raises(ValueError, match=re.escape(PLAIN)):
            load(folder)

    def test_missing_shard_is_an_error_that_names_it(self, folder):
        path = shard_of(folder, PLAIN)
        path.unlink()
        with pytest.raises((OSError, ValueError), match=re.escape(path.name)):
            load(folder)

    def test_tensor_in_two_shards_is_an_error_that_names_both(self, folder):
        home = shard_of(folder, PLAIN)
        other = next(path for path in sorted(folder.glob("*.safetensors")) if path != home)
        tensor = read(home)[0][PLAIN]
        rewrite(other, lambda t: t.update({PLAIN: tensor}))
        with pytest.raises(ValueError, match=re.escape(PLAIN)) as error:
            load(folder)
        assert home.name in str(error.value)
        assert other.name in str(error.value)

    def test_shard_of_another_checkpoint_is_found_by_its_names(self, folder, tiny_model, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        tiny_model("packed", num_layers=3).save_pretrained(other, **SHARDED)
        path = shard_of(folder, PLAIN)
        shutil.copy(shard_of(other, "transformer_blocks.2.attn.to_q.weight_packed"), path)
        with pytest.raises(ValueError, match=re.escape(path.name)):
            load(folder)


class TestSaving:
    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_save_load_save_gives_the_same_tensors_digests_and_config(self, tiny_model, tmp_path, weight_format, save):
        first, second = tmp_path / "first", tmp_path / "second"
        tiny_model(weight_format).save_pretrained(first, **save)
        load(first).save_pretrained(second, **save)
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        for name in names:
            if name.endswith(".safetensors"):
                (a, a_metadata), (b, b_metadata) = read(first / name), read(second / name)
                assert a_metadata == b_metadata
                assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a | b)
            else:
                assert (first / name).read_text() == (second / name).read_text()

    @pytest.mark.parametrize("weight_format", FORMATS)
    @pytest.mark.parametrize(
        ("before", "after"), [(SHARDED, {}), ({}, SHARDED), (SHARDED, {"max_shard_size": "60KB"})]
    )
    def test_saving_again_in_other_shards_leaves_nothing_stale(
        self, tiny_model, tmp_path, weight_format, before, after
    ):
        tiny_model(weight_format, seed=1).save_pretrained(tmp_path, **before)
        model = tiny_model(weight_format, seed=2)
        model.save_pretrained(tmp_path, **after)
        assert equal_state(load(tmp_path), model)
        fresh = tmp_path / "fresh"
        model.save_pretrained(fresh, **after)
        left = {path.name for path in tmp_path.iterdir()} - {"fresh"}
        assert left == {path.name for path in fresh.iterdir()}

    def test_saving_in_the_other_format_replaces_the_file(self, tiny_model, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        model.pack().save_pretrained(tmp_path)
        assert equal_state(load(tmp_path), model)

    def test_saving_clears_neither_variants_nor_strangers(self, tiny_model, tmp_path):
        ema, model = tiny_model(seed=1), tiny_model(seed=2)
        ema.save_pretrained(tmp_path, variant="ema", **SHARDED)
        (tmp_path / "notes.safetensors").write_bytes(b"mine")
        model.save_pretrained(tmp_path)
        assert equal_state(load(tmp_path, variant="ema"), ema)
        assert equal_state(load(tmp_path), model)
        assert (tmp_path / "notes.safetensors").read_bytes() == b"mine"

    def test_safetensors_win_over_a_stale_bin_file(self, tiny_model, tmp_path):
        tiny_model(seed=1).save_pretrained(tmp_path, safe_serialization=False)
        model = tiny_model(seed=2)
        model.save_pretrained(tmp_path)
        assert equal_state(load(tmp_path), model)

    def test_no_path_of_this_machine_is_saved(self, tiny_model, tiny_pipeline, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        tiny_model("packed").save_pretrained(first / "model")
        load(first / "model").save_pretrained(second / "model")
        tiny_model("packed").ternary_layers()[f"{QUERY}"].save_pretrained(first / "layer")
        TernaryLinear.from_pretrained(first / "layer").save_pretrained(second / "layer")
        tiny_pipeline().save_pretrained(first / "pipeline")
        TerDiTPipeline.from_pretrained(first / "pipeline").save_pretrained(second / "pipeline")
        texts = {path.relative_to(second): path.read_bytes() for path in second.rglob("*") if path.is_file()}
        assert len(texts) >= 7
        assert [str(name) for name, text in texts.items() if str(tmp_path).encode() in text] == []

    def test_failed_save_keeps_the_checkpoint_that_was_there(self, tiny_model, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(NotImplementedError, match="meta"):
            tiny_model(sample_size=16).to("meta").save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    def test_weights_are_as_readable_as_the_config(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        assert (tmp_path / FILE).stat().st_mode == (tmp_path / "config.json").stat().st_mode

    def test_saving_into_a_file_is_an_error(self, tiny_model, tmp_path):
        path = tmp_path / "model"
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match="must be a folder"):
            tiny_model().save_pretrained(path)
        assert path.read_bytes() == b"mine"

    def test_views_and_transposed_weights_are_saved_by_value(self, tiny_model, tmp_path):
        model = tiny_model()
        model.proj_out.weight.data = model.proj_out.weight.data.T.contiguous().T
        model.save_pretrained(tmp_path)
        assert equal_state(load(tmp_path), model)

    def test_digest_is_the_documented_one(self, tiny_model, tmp_path):
        # Frozen: another value here means that files written before no longer load.
        tensors = [("a", "U8", (2,), [b"\x01", b"\x02"]), ("b", "F32", (), [struct.pack("<f", 1.0)])]
        assert weights.digest(tensors) == "65547c964be2abaf3b92879ef825574158cb59f4254d8109626fdd15a97ab1e4"
        assert weights.digest(tensors[:1]) == weights.digest([("a", "U8", (2,), [b"\x01\x02"])])

    def test_digest_in_the_file_is_of_the_bytes_in_the_file(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path)
        header, body = header_of((tmp_path / FILE).read_bytes())
        metadata = header.pop("__metadata__")
        tensors = [
            (name, header[name]["dtype"], tuple(header[name]["shape"]), [body[slice(*header[name]["data_offsets"])]])
            for name in sorted(header)
        ]
        assert metadata["terdit.sha256"] == weights.digest(tensors)


class TestContactWithTheHost:
    """Each of these breaks when diffusers changes what strict loading leans on; `modeling.py` is the file to mend."""

    def test_loading_hook_takes_the_arguments_that_are_read(self):
        parameters = list(inspect.signature(ModelMixin._load_pretrained_model).parameters)
        assert parameters[:3] == ["model", "state_dict", "resolved_model_file"]
        assert {"ignore_mismatched_sizes", "keep_in_fp32_modules", "dtype"} <= set(parameters)
        assert inspect.ismethod(ModelMixin._load_pretrained_model)

    @both_memory_modes
    @pytest.mark.parametrize("save", [{}, SHARDED, {"safe_serialization": False}], ids=["single", "sharded", "bin"])
    def test_host_calls_the_loading_hook_with_every_file(self, tiny_model, tmp_path, save, low_cpu_mem_usage):
        seen = []

        class Watched(TerDiTTransformer2DModel):
            @classmethod
            def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
                seen.extend(os.path.basename(path) for path in resolved_model_file)
                return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

        tiny_model("packed").save_pretrained(tmp_path, **save)
        kwargs = {"use_safetensors": False} if "safe_serialization" in save else {}
        Watched.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        assert sorted(seen) == sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin"))

    def test_host_that_does_not_call_the_hook_is_found_out(self, tiny_model, tmp_path):
        class Unhooked(TerDiTTransformer2DModel):
            _load_pretrained_model = classmethod(ModelMixin._load_pretrained_model.__func__)

        tiny_model("packed").save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match=r"no longer calls the loading hook"):
            Unhooked.from_pretrained(tmp_path)

    def test_loading_information_is_still_given(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path)
        model, information = load(tmp_path, output_loading_info=True)
        assert isinstance(model, TerDiTTransformer2DModel)
        assert information == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


class TestImport:
    def test_importing_prints_nothing_and_brings_nothing_optional(self):
        code = """
import json, sys
import diffusers, diffusers.loaders, diffusers.hooks, diffusers.models.cache_utils
from diffusers import AutoencoderKL, AutoModel, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.loaders import PeftAdapterMixin
hosts = set(sys.modules)
import diffusers_terdit
roots = {name.split(".")[0] for name in set(sys.modules) - hosts}
models = [name for name in set(sys.modules) - hosts if name.startswith("transformers.models")]
print(json.dumps({"new": sorted(roots), "all": sorted({n.split(".")[0] for n in sys.modules}), "models": models}))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        modules = json.loads(done.stdout)
        assert modules["models"] == []
        optional = {"peft", "datasets", "sklearn", "matplotlib", "torchvision", "pandas", "onnxruntime", "gradio"}
        assert optional & set(modules["new"]) == set()
        assert {"datasets", "sklearn", "matplotlib"} & set(modules["all"]) == set()


FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]


class TestHostileFiles:
    """What stress_files.py found: each is an error that names the file."""

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_number_that_is_not_finite_is_an_error_that_names_the_tensor(self, tmp_path, dtype, value):
        layer = TernaryLinear(8, 8).pack()
        layer.save_pretrained(tmp_path)
        bias = torch.arange(8.0)
        bias[3] = float("nan") if dtype is torch.float8_e4m3fn else value  # that type has no infinity
        rewrite(tmp_path / FILE, lambda t: t.update(bias=bias.to(dtype)))
        with pytest.raises(ValueError, match="tensor `bias` holds NaN or infinity") as error:
            TernaryLinear.from_pretrained(tmp_path)
        assert FILE in str(error.value)
        with pytest.raises(ValueError, match="tensor `bias` holds NaN or infinity"):
            inspect_weights(tmp_path)

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn], ids=str)
    def test_largest_and_smallest_numbers_of_a_dtype_load(self, tmp_path, dtype):
        TernaryLinear(8, 8).pack().save_pretrained(tmp_path)
        info = torch.finfo(dtype)
        bias = torch.tensor([info.max, info.min, info.tiny, -0.0, 0, 1, -1, info.smallest_normal]).to(dtype)
        if dtype is torch.float64:
            bias = bias.clamp(-1e38, 1e38)  # float32 is the layer's
        rewrite(tmp_path / FILE, lambda t: t.update(bias=bias))
        assert torch.equal(TernaryLinear.from_pretrained(tmp_path).bias, bias.float())

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    def test_nan_in_a_norm_of_a_pickle_is_an_error(self, tiny_model, tmp_path, save):
        model = tiny_model("packed")
        model.transformer_blocks[1].norm1.weight.data[2] = float("nan")
        model.save_pretrained(tmp_path, safe_serialization=False, **save)
        with pytest.raises(ValueError, match=r"tensor `transformer_blocks.1.norm1.weight` holds NaN or infinity"):
            load(tmp_path, use_safetensors=False)

    @both_memory_modes
    @pytest.mark.parametrize(
        "change",
        [
            {"ffn_dim": 10**15},
            {"ffn_dim": 2**31 - 4},
            {"num_classes": 2**31 - 1, "attention_head_dim": 2**30},
            {"num_layers": 10**9},
            {"num_layers": 1001},
            {"num_layers": 10**400},
            {"in_channels": 2**62},
            {"sample_size": 2**63},
            {"num_attention_heads": 2**24},
        ],
        ids=lambda change: ",".join(f"{key}=2**{value.bit_length()}" for key, value in change.items()),
    )
    def test_config_of_a_petabyte_is_refused_before_anything_is_allocated(
        self, tiny_model, tmp_path, change, low_cpu_mem_usage
    ):
        tiny_model("packed").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
        assert torch.empty(1).device.type == "cpu"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_layers": "2"}, "num_layers='2', expected a positive int"),
            ({"num_layers": True}, "num_layers=True"),
            ({"num_attention_heads": 0}, "num_attention_heads=0"),
            ({"patch_size": -1}, "patch_size=-1"),
            ({"in_channels": None}, "in_channels=None"),
            ({"norm_eps": float("nan")}, "norm_eps=nan"),
            ({"qk_norm": 1}, "qk_norm=1, expected bool"),
            ({"weight_format": []}, "weight_format="),
            ({"_class_name": 3}, "_class_name"),
        ],
        ids=str,
    )
    def test_value_of_another_type_in_a_config_is_an_error_that_names_it(self, tiny_model, tmp_path, change, message):
        tiny_model("packed").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load(tmp_path)
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, '{"a":' * 100_000, "[]", "null", "{", '{"num_layers": 1' + "0" * 5000 + "}"]
    )
    def test_config_that_is_no_object_is_an_error_that_names_it(self, tiny_model, tmp_path, text):
        tiny_model().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "config.json"))):
            load(tmp_path)
        with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "config.json"))):
            inspect_weights(tmp_path)

    @pytest.mark.parametrize("name", ["../{}", "{folder}/../outside/{}", "sub/{}", "..", "", "..\\{}", "{}\0"])
    def test_index_that_leads_outside_its_folder_is_an_error(self, tiny_model, tmp_path, name):
        inside, outside = tmp_path / "inside", tmp_path / "outside"
        tiny_model("packed").save_pretrained(inside, **SHARDED)
        shutil.copytree(inside, outside)
        index = json.loads((inside / INDEX).read_text())
        first = sorted(index["weight_map"].values())[0]
        changed = {
            key: name.format(first, folder=inside) if value == first else value
            for key, value in index["weight_map"].items()
        }
        (inside / INDEX).write_text(json.dumps({**index, "weight_map": changed}))
        for read_it in (load, inspect_weights):
            with pytest.raises(ValueError, match=re.escape(f"{inside / INDEX} names")):
                read_it(inside)

    @pytest.mark.parametrize(
        "change",
        [{"weight_map": None}, {"weight_map": {"a": 3}}, {"metadata": None}, {"weight_map": []}, {"weight_map": {}}],
        ids=str,
    )
    def test_index_of_another_form_is_an_error(self, tiny_model, tmp_path, change):
        tiny_model("packed").save_pretrained(tmp_path, **SHARDED)
        index = json.loads((tmp_path / INDEX).read_text())
        (tmp_path / INDEX).write_text(json.dumps(index | change))
        for read_it in (load, inspect_weights):
            with pytest.raises(ValueError, match=re.escape(str(tmp_path / INDEX))):
                read_it(tmp_path)

    def test_tensor_that_says_more_numbers_than_its_pickle_holds_is_an_error(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path, safe_serialization=False)
        rewrite(tmp_path / BIN, lambda t: t.update({PLAIN: torch.zeros(()).expand(2**40, 2**5)}))
        with pytest.raises(OSError, match=f"`{PLAIN}` has shape .* memory for fewer numbers") as error:
            load(tmp_path, use_safetensors=False)
        assert BIN in str(error.value)

    @pytest.mark.parametrize("kind", ["compressed", "flipped"])
    def test_pickle_whose_archive_is_compressed_or_damaged_is_an_error(self, tmp_path, kind):
        layer = TernaryLinear(64, 64).pack()
        layer.save_pretrained(tmp_path, safe_serialization=False)
        data = (tmp_path / BIN).read_bytes()
        if kind == "flipped":  # one code to another, of the three
            place = data.index(layer.weight_packed.numpy().tobytes())
            byte = data[place]
            (tmp_path / BIN).write_bytes(
                data[:place] + bytes([byte & 0xFC | ((byte & 3) + 1) % 3]) + data[place + 1 :]
            )
        else:
            with zipfile.ZipFile(tmp_path / BIN) as old, zipfile.ZipFile(tmp_path / "new", "w", 8) as new:
                for record in old.infolist():
                    new.writestr(record.filename, old.read(record))
            (tmp_path / "new").rename(tmp_path / BIN)
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            TernaryLinear.from_pretrained(tmp_path, use_safetensors=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"transformer": ["diffusers", "UNet2DModel"]}, "`transformer` is"),
            ({"transformer": ["os", "system"]}, "`transformer` is"),
            ({"transformer": [3, None]}, "`transformer` is"),
            ({"scheduler": ["subprocess", "Popen"]}, "`scheduler` is"),
            ({"scheduler": {}}, "`scheduler` is"),
            ({"vae": 3}, "`vae` is"),
            ({"id2label": {"0": 3}}, "`id2label` is"),
            ({"_class_name": 3}, "`_class_name` is"),
        ],
        ids=str,
    )
    def test_model_index_with_other_parts_is_an_error(self, tiny_pipeline, tmp_path, change, message):
        tiny_pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            TerDiTPipeline.from_pretrained(tmp_path)
        assert str(tmp_path / "model_index.json") in str(error.value)

    @pytest.mark.parametrize("steps", [10**15, 10**7, 0, "1000", None, 2**40])
    def test_scheduler_of_a_petabyte_is_refused(self, tiny_pipeline, tmp_path, steps):
        tiny_pipeline().save_pretrained(tmp_path)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": steps}))
        with pytest.raises(ValueError, match="num_train_timesteps") as error:
            TerDiTPipeline.from_pretrained(tmp_path)
        assert str(path) in str(error.value)

    def test_scheduler_setting_that_diffusers_has_not_is_a_value_error(self, tiny_pipeline, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "l,near"}))
        with pytest.raises(ValueError, match="l,near") as error:
            TerDiTPipeline.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)

    def test_scale_of_no_ternary_layer_is_an_error_of_inspect_weights(self, tmp_path):
        save_file({"a.weight": torch.ones(4), "a.weight_scale": torch.ones(1)}, tmp_path / FILE)
        with pytest.raises(ValueError, match=f"{FILE}: `a.weight` has shape"):
            inspect_weights(tmp_path)
