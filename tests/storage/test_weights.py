"""The weights format: what is written, and that every fault of a file is one error that names file and tensor."""

import json
import logging
import random
import re
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from diffusers_terdit.storage import weights
from diffusers_terdit.storage.weights import WeightsFile, check_file, check_weights, read_index, write_weights
from tiny import read_weights, rewrite_weights


FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"
FORMATS = ["float", "packed"]
SHARDED = {"max_shard_size": "20KB"}
PLAIN, QUERY = "proj_out.weight", "transformer_blocks.1.attn.to_q"
CODES, SCALE = f"{QUERY}.weight_packed", f"{QUERY}.weight_scale"
VALUES = "transformer_blocks.1.attn.to_v.weight_packed"
one_or_many = pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])


@pytest.fixture
def saved(tiny_model, tmp_path):
    """`saved(weight_format, **save)`: a model, and the weights files that it was saved to."""

    def make(weight_format="packed", **save):
        model = tiny_model(weight_format)
        model.save_pretrained(tmp_path, **save)
        return model, sorted(tmp_path.glob("*.safetensors"))

    return make


def file_with(files, name):
    """The one of several files that holds a tensor."""
    return next((path for path in files if name in read_weights(path)[0]), files[0])


def flip_bit(tensors, name, byte=5, bit=1):
    tensors[name].view(-1).view(torch.uint8)[byte] ^= 1 << bit


def change_code(tensors, name):
    codes = tensors[name].view(-1)
    codes[3] = codes[3] & 0b11111100 | (codes[3] + 1 & 0b11) % 3  # another of the three valid codes


def put(name, change):
    """An edit that changes one tensor."""
    return lambda tensors: tensors.update({name: change(tensors[name])})


# name of the fault: (formats it applies to, the tensor that must be named, the edit)
STRUCTURE = {
    "missing": (FORMATS, PLAIN, lambda t: t.pop(PLAIN)),
    "missing scale": (FORMATS, SCALE, lambda t: t.pop(SCALE)),
    "missing codes": (["packed"], CODES, lambda t: t.pop(CODES)),
    "unexpected": (FORMATS, "extra.weight", lambda t: t.update({"extra.weight": torch.zeros(2)})),
    "unexpected block": (
        FORMATS,
        "transformer_blocks.2.norm1.weight",
        lambda t: t.update({"transformer_blocks.2.norm1.weight": torch.zeros(32)}),
    ),
    "renamed": (FORMATS, "proj_out.weights", lambda t: t.update({"proj_out.weights": t.pop(PLAIN)})),
    "rows cut": (FORMATS, PLAIN, put(PLAIN, lambda w: w[:-1])),
    "transposed codes": (["packed"], CODES, put(CODES, torch.t)),
    "scale per row": (FORMATS, SCALE, put(SCALE, lambda _: torch.ones(32, 1))),
    "codes as float32": (["packed"], CODES, put(CODES, torch.Tensor.float)),
    "codes as int8": (["packed"], CODES, put(CODES, lambda w: w.view(torch.int8))),
    "float as uint8": (FORMATS, PLAIN, put(PLAIN, lambda w: w.to(torch.uint8))),
    "float as int64": (FORMATS, PLAIN, put(PLAIN, torch.Tensor.long)),
    "code 3": (["packed"], CODES, lambda t: t[CODES][2, 3].fill_(0b01110101)),
    "code 3 in the last bits": (["packed"], CODES, lambda t: t[CODES][-1, -1].fill_(0b01010111)),
}
# What leaves every name and shape the same
DAMAGE = {
    "flipped mantissa bit": (FORMATS, PLAIN, lambda t: flip_bit(t, PLAIN)),
    "flipped bit of a scale": (FORMATS, SCALE, lambda t: flip_bit(t, SCALE, 1)),
    "another valid code": (["packed"], CODES, lambda t: change_code(t, CODES)),
    "rounded": (FORMATS, PLAIN, put(PLAIN, torch.Tensor.bfloat16)),
    "codes swapped": (["packed"], CODES, lambda t: t.update({CODES: t[VALUES], VALUES: t[CODES]})),
}


def cases(faults):
    return [
        pytest.param(weight_format, name, edit, id=f"{weight_format}-{fault}")
        for fault, (formats, name, edit) in faults.items()
        for weight_format in formats
    ]


class TestCheckWeights:
    @one_or_many
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_what_was_saved_passes(self, saved, weight_format, save):
        check_weights(*saved(weight_format, **save))

    @pytest.mark.parametrize(("weight_format", "name", "edit"), cases(STRUCTURE))
    def test_wrong_tensor_is_an_error_that_names_file_and_tensor(self, saved, weight_format, name, edit):
        model, files = saved(weight_format, **SHARDED)
        path = file_with(files, name if name in model.state_dict() else PLAIN)
        rewrite_weights(path, edit)
        with pytest.raises(ValueError, match=re.escape(f"`{name}`")) as error:
            check_weights(model, files)
        assert path.name in str(error.value)

    @pytest.mark.parametrize(("weight_format", "name", "edit"), cases(DAMAGE))
    def test_damage_is_found_by_the_digest(self, saved, weight_format, name, edit):
        model, files = saved(weight_format)
        rewrite_weights(files[0], edit, keep_metadata=True)
        with pytest.raises(ValueError, match=f"{FILE}.* digest"):
            check_weights(model, files)

    @pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "bare"])
    @pytest.mark.parametrize(
        ("stored", "asked"),
        [
            ({}, {"weight_format": "packed"}),
            ({"weight_format": "packed"}, {}),
            ({}, {"ternary": False}),
            ({"weight_format": "packed"}, {"ternary": False}),
            ({"ternary": False}, {}),
        ],
        ids=str,
    )
    def test_file_of_another_format_than_the_model_is_an_error(self, tiny_model, tmp_path, stored, asked, metadata):
        tiny_model(**stored).save_pretrained(tmp_path)
        if not metadata:
            rewrite_weights(tmp_path / FILE, lambda tensors: None)
        with pytest.raises(ValueError, match="diffusion_pytorch_model"):
            check_weights(tiny_model(**asked), [tmp_path / FILE])

    @pytest.mark.parametrize("weight_format", FORMATS)
    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_file_without_our_metadata_passes_with_one_line_of_information(
        self, saved, caplog, weight_format, metadata
    ):
        model, files = saved(weight_format)
        save_file(read_weights(files[0])[0], files[0], metadata)
        with caplog.at_level(logging.INFO, "diffusers_terdit"):
            check_weights(model, files)
        assert [(r.levelname, FILE in r.getMessage()) for r in caplog.records] == [("INFO", True)]

    def test_shapes_may_be_left_to_the_host(self, saved):
        model, files = saved()
        rewrite_weights(files[0], put(PLAIN, lambda w: w[:-1]))
        check_weights(model, files, ignore_mismatched_sizes=True)


FLOATS = [dtype for dtype in weights.DTYPE_NAMES if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_of_every_dtype_are_judged(tmp_path, dtype):
    info = torch.finfo(dtype)
    bias = torch.tensor([info.max, info.min, info.tiny, -0.0, 0, 1, -1, info.smallest_normal], dtype=dtype)
    save_file({"bias": bias}, tmp_path / FILE)
    check_file(tmp_path / FILE, packed=False)
    for value in (float("nan"), float("inf"), -float("inf")):
        bias[3] = float("nan") if dtype is torch.float8_e4m3fn else value  # that type has no infinity
        save_file({"bias": bias}, tmp_path / FILE)
        with pytest.raises(ValueError, match=f"{FILE}: tensor `bias` holds NaN or infinity"):
            check_file(tmp_path / FILE, packed=False)


def test_the_last_of_many_chunks_is_looked_at(tmp_path):
    values = torch.zeros(1_000_003)
    values[-1] = float("nan")
    save_file({"a": torch.zeros(()), "b": values}, tmp_path / FILE)
    with pytest.raises(ValueError, match="tensor `b` holds NaN"):
        check_file(tmp_path / FILE, packed=False)


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


class TestWeightsFile:
    @pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
    def test_unreadable_file_is_an_oserror_that_names_it(self, saved, damage):
        _, (path,) = saved()
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(OSError, match=re.escape(f"{path} is not a readable safetensors file")):
            WeightsFile(path)

    def test_chunks_are_the_bytes_of_the_tensors(self, saved):
        model, (path,) = saved()
        file = WeightsFile(path)
        for name, tensor in model.state_dict().items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert b"".join(file.chunks(name, size=7)) == data
            begin, end = file.offsets[name]
            assert path.read_bytes()[begin:end] == data
            assert file.tensors[name] == (weights.DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


class TestIndex:
    @pytest.fixture
    def index(self, saved, tmp_path):
        saved(**SHARDED)
        return tmp_path / INDEX

    @pytest.mark.parametrize("name", ["../{}", "{folder}/../outside/{}", "sub/{}", "..", "", "..\\{}", "{}\0"])
    def test_one_that_leads_outside_its_folder_is_an_error(self, index, name):
        shutil.copytree(index.parent, index.parent / "outside")
        contents = json.loads(index.read_text())
        first = sorted(contents["weight_map"].values())[0]
        other = name.format(first, folder=index.parent / "outside")
        changed = {key: other if value == first else value for key, value in contents["weight_map"].items()}
        index.write_text(json.dumps({**contents, "weight_map": changed}))
        with pytest.raises(ValueError, match=re.escape(f"{index} names")):
            read_index(index)

    @pytest.mark.parametrize(
        "change",
        [{"weight_map": None}, {"weight_map": {"a": 3}}, {"metadata": None}, {"weight_map": []}, {"weight_map": {}}],
        ids=str,
    )
    def test_one_of_another_form_is_an_error(self, index, change):
        index.write_text(json.dumps(json.loads(index.read_text()) | change))
        with pytest.raises(ValueError, match=re.escape(str(index))):
            read_index(index)


class TestWriting:
    def write(self, folder, sizes, limit, variant=None):
        """Write float32 tensors of so many numbers; names of the files, and the tensors of each."""
        tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
        write_weights(folder, iter(tensors.items()), {"format": "pt", "key": "value"}, limit, variant)
        found = {path.name: read_weights(path)[0] for path in sorted(folder.glob("*.safetensors"))}
        together = {name: tensor for part in found.values() for name, tensor in part.items()}
        assert together.keys() == tensors.keys()
        assert all(torch.equal(together[name], tensors[name]) for name in tensors)
        return {file: sorted(part) for file, part in found.items()}

    def test_what_fits_is_one_file_without_an_index(self, tmp_path):
        assert self.write(tmp_path, [10, 20], 120) == {FILE: ["t0", "t1"]}
        assert [path.name for path in tmp_path.iterdir()] == [FILE]

    def test_a_file_holds_what_the_limit_allows_and_a_larger_tensor_stands_alone(self, tmp_path):
        found = self.write(tmp_path, [10, 100, 10, 10, 10, 10], 80)
        names = [f"diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
        assert found == dict(zip(names, [["t1"], ["t0", "t2"], ["t3", "t4"], ["t5"]], strict=True))
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"format": "pt", "key": "value", "total_size": 600}
        assert index["weight_map"] == {name: file for file, part in found.items() for name in part}
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names, INDEX]

    def test_a_variant_stands_in_the_names(self, tmp_path):
        assert set(self.write(tmp_path, [10], 40, "fp16")) == {"diffusion_pytorch_model.fp16.safetensors"}
        (tmp_path / "x").mkdir()
        self.write(tmp_path / "x", [10, 10], 40, "fp16")
        names = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
        names += ["diffusion_pytorch_model.safetensors.index.fp16.json"]
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == names

    def test_one_shard_is_held_at_a_time(self, tmp_path):
        alive = []

        def tensors():
            for i in range(6):
                tensor = torch.zeros(10)
                alive.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
                yield f"t{i}", tensor
                del tensor
                assert sum(not storage.expired() for storage in alive) <= 3  # two of a shard, one that follows

        write_weights(tmp_path, tensors(), {}, 80)
        assert len(read_index(tmp_path / INDEX)) == 3

    def test_every_file_carries_its_digest(self, saved):
        _, files = saved(**SHARDED)
        assert len(files) > 2
        metadata = [read_weights(path)[1] for path in files]
        assert len({found["terdit.sha256"] for found in metadata}) == len(files)
        assert len({found["terdit.model"] for found in metadata}) == 1
        assert {found["terdit.packing"] for found in metadata} == {"row-chunk-2bit"}

    def test_digest_in_the_file_is_of_the_bytes_in_the_file(self, saved):
        _, (path,) = saved()
        header, body = header_of(path.read_bytes())
        metadata = header.pop("__metadata__")
        tensors = [
            (name, header[name]["dtype"], tuple(header[name]["shape"]), [body[slice(*header[name]["data_offsets"])]])
            for name in sorted(header)
        ]
        assert metadata["terdit.sha256"] == weights.digest(tensors)

    def test_digest_is_the_documented_one(self):
        # Frozen: another value here means that files written before no longer load.
        tensors = [("a", "U8", (2,), [b"\x01", b"\x02"]), ("b", "F32", (), [struct.pack("<f", 1.0)])]
        assert weights.digest(tensors) == "65547c964be2abaf3b92879ef825574158cb59f4254d8109626fdd15a97ab1e4"
        assert weights.digest(tensors[:1]) == weights.digest([("a", "U8", (2,), [b"\x01\x02"])])


@pytest.mark.parametrize("contents", [b"", b"text", None], ids=["empty", "text", "last byte cut"])
def test_a_pickle_that_is_none_is_an_oserror_that_names_it(tmp_path, contents):
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.ones(8)}, path)
    path.write_bytes(path.read_bytes()[:-1] if contents is None else contents)
    with pytest.raises(OSError, match=re.escape(str(path))):
        weights.load_pickle(path)


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path):
    """Mapped and unmapped, torch reads different bytes of it."""
    torch.save({"x": torch.ones(4)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as source, zipfile.ZipFile(tmp_path / "y.pth", "w") as target:
        for record in source.infolist():
            marked = zipfile.ZipInfo(record.filename)
            marked.external_attr = 0x10 if record.filename.endswith("data/0") else 0
            target.writestr(marked, source.read(record))
    with pytest.raises(OSError, match="marked as a folder"):
        weights.load_pickle(tmp_path / "y.pth")
