import inspect
import json
import os
import re
import resource
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from safetensors.torch import save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.modeling import check_config
from tiny import read_weights, rewrite_weights


FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"
BIN = "diffusion_pytorch_model.bin"
FORMATS = ["float", "packed"]
SHARDED = {"max_shard_size": "20KB"}
PLAIN, QUERY = "proj_out.weight", "transformer_blocks.1.attn.to_q"
both_memory_modes = pytest.mark.parametrize("low_cpu_mem_usage", [True, False], ids=["low memory", "plain"])


def load(folder, **kwargs):
    return TerDiTTransformer2DModel.from_pretrained(folder, **kwargs)


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def damage(path):
    """Change one code to another valid one, which only the digest tells."""

    def edit(tensors):
        codes = tensors[f"{QUERY}.weight_packed"].view(-1)
        codes[3] = codes[3] & 0b11111100 | (codes[3] + 1 & 0b11) % 3

    rewrite_weights(path, edit, keep_metadata=True)


class TestStrictLoading:
    """Every way to load asks `check_weights`, whose faults tests/storage/test_weights.py goes through."""

    @both_memory_modes
    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    def test_missing_tensor_is_an_error_that_names_file_and_tensor(
        self, tiny_model, tmp_path, save, low_cpu_mem_usage
    ):
        tiny_model("packed").save_pretrained(tmp_path, **save)
        path = shard_of(tmp_path, PLAIN) if save else tmp_path / FILE
        rewrite_weights(path, lambda t: t.pop(PLAIN))
        with pytest.raises(ValueError, match=re.escape(f"`{PLAIN}`")) as error:
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert path.name in str(error.value)

    @both_memory_modes
    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    def test_damage_is_found_by_the_digest(self, tiny_model, tmp_path, save, low_cpu_mem_usage):
        tiny_model("packed").save_pretrained(tmp_path, **save)
        damage(shard_of(tmp_path, f"{QUERY}.weight_packed") if save else tmp_path / FILE)
        with pytest.raises(ValueError, match="digest"):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
    def test_device_map_loads_as_strictly(self, tiny_model, tmp_path, device_map):
        tiny_model("packed").save_pretrained(tmp_path)
        rewrite_weights(tmp_path / FILE, lambda t: t.pop(PLAIN))
        with pytest.raises(ValueError, match=PLAIN):
            load(tmp_path, device_map=device_map)

    def test_layer_loads_as_strictly(self, tmp_path):
        TernaryLinear(8, 8).pack().save_pretrained(tmp_path)
        rewrite_weights(tmp_path / FILE, lambda t: t["bias"].fill_(float("nan")))
        with pytest.raises(ValueError, match=f"{FILE}: tensor `bias` holds NaN or infinity"):
            TernaryLinear.from_pretrained(tmp_path)

    def test_error_of_a_contradicting_weight_format_says_what_to_do(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r'weight_format="packed" and call `\.unpack\(\)`'):
            load(tmp_path, weight_format="float")
        assert load(tmp_path).config.weight_format == "packed"

    @both_memory_modes
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_file_without_our_metadata_loads(self, tiny_model, tmp_path, weight_format, low_cpu_mem_usage):
        model = tiny_model(weight_format)
        model.save_pretrained(tmp_path)
        save_file(read_weights(tmp_path / FILE)[0], tmp_path / FILE)
        assert equal_state(load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage), model)

    @both_memory_modes
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_scale_that_another_program_stored_in_half_becomes_float32(
        self, tiny_model, tmp_path, weight_format, dtype, low_cpu_mem_usage
    ):
        tiny_model(weight_format).save_pretrained(tmp_path)
        name = f"{QUERY}.weight_scale"
        rewrite_weights(tmp_path / FILE, lambda t: t.update({name: t[name].bfloat16()}))
        kwargs = {} if dtype is None else {"dtype": dtype}
        scale = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs).state_dict()[name]
        assert scale.dtype == torch.float32
        assert torch.equal(scale, read_weights(tmp_path / FILE)[0][name].float())

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
        damage(tmp_path / "transformer" / FILE)
        with pytest.raises(ValueError, match="digest"):
            cls.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="digest"):
            AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")


class TestUnreadableFiles:
    @both_memory_modes
    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    @pytest.mark.parametrize(
        "contents", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"]
    )
    def test_unreadable_file_is_an_oserror_that_names_it(
        self, tiny_model, tmp_path, contents, save, low_cpu_mem_usage
    ):
        tiny_model("packed").save_pretrained(tmp_path, **save)
        path = shard_of(tmp_path, PLAIN) if save else tmp_path / FILE
        path.write_bytes(contents)
        with pytest.raises(OSError, match=f"{re.escape(path.name)}|git-lfs"):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize("index", [False, True], ids=["single", "sharded"])
    @pytest.mark.parametrize("use_safetensors", [None, False])
    def test_pickle_is_an_oserror_that_names_it_and_runs_nothing(self, tiny_model, tmp_path, index, use_safetensors):
        class Exploit:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        model = tiny_model("packed")
        model.save_pretrained(tmp_path)
        torch.save({PLAIN: Exploit()}, tmp_path / BIN)
        if index:
            weight_map = dict.fromkeys(model.state_dict(), BIN)
            (tmp_path / f"{BIN}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert equal_state(load(tmp_path, use_safetensors=use_safetensors), model)
        (tmp_path / FILE).unlink()
        with pytest.raises(OSError, match=f"{BIN}; ternary weights are read from safetensors only"):
            load(tmp_path, use_safetensors=use_safetensors)
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

    @both_memory_modes
    def test_index_that_names_a_tensor_its_shard_lacks_is_an_error(self, folder, low_cpu_mem_usage):
        rewrite_weights(shard_of(folder, PLAIN), lambda t: t.pop(PLAIN))
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
                (a, a_metadata), (b, b_metadata) = read_weights(first / name), read_weights(second / name)
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

    @pytest.mark.parametrize("other", [{"safe_serialization": False}, {"use_flashpack": True}], ids=str)
    def test_another_format_than_safetensors_is_an_error_and_nothing_is_written(
        self, tiny_model, tiny_pipeline, tmp_path, other
    ):
        models = [TernaryLinear(8, 8), tiny_model()]
        for saved in [*models, tiny_pipeline()] if "safe_serialization" in other else models:
            with pytest.raises(ValueError, match="Ternary weights are saved as safetensors only, got"):
                saved.save_pretrained(tmp_path / "x", **other)
            assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class TestContactWithTheHost:
    """Each of these breaks when diffusers changes what strict loading leans on; `modeling.py` is the file to mend."""

    def test_loading_hook_takes_the_arguments_that_are_read(self):
        parameters = list(inspect.signature(ModelMixin._load_pretrained_model).parameters)
        assert parameters[:3] == ["model", "state_dict", "resolved_model_file"]
        assert {"ignore_mismatched_sizes", "keep_in_fp32_modules", "dtype"} <= set(parameters)
        assert inspect.ismethod(ModelMixin._load_pretrained_model)

    @both_memory_modes
    @pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
    def test_host_calls_the_loading_hook_with_every_file(self, tiny_model, tmp_path, save, low_cpu_mem_usage):
        seen = []

        class Watched(TerDiTTransformer2DModel):
            @classmethod
            def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
                seen.extend(os.path.basename(path) for path in resolved_model_file)
                return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

        tiny_model("packed").save_pretrained(tmp_path, **save)
        Watched.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert sorted(seen) == sorted(path.name for path in tmp_path.glob("*.safetensors"))

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


class TestHostileFiles:
    """What stress_files.py found: each is an error that names the file."""

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

    @pytest.mark.parametrize(
        ("file", "change"),
        [
            ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}),
            ("scheduler/scheduler_config.json", {"beta_start": 0, "unknown": {}}),
            ("vae/config.json", {"sample_size": [8, 8]}),
            ("vae/config.json", {"scaling_factor": 1, "shift_factor": None}),
        ],
        ids=str,
    )
    def test_what_diffusers_takes_beyond_its_annotations_loads(self, tiny_pipeline, tmp_path, file, change):
        tiny_pipeline(vae=True).save_pretrained(tmp_path)
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
        assert TerDiTPipeline.from_pretrained(tmp_path)

    def test_every_scheduler_fits_its_annotations(self):
        names = {name for name in dir(diffusers) if name.endswith("Scheduler")} - {"VQDiffusionScheduler"}
        classes = [getattr(diffusers, name) for name in sorted(names)]
        classes = [cls for cls in classes if "num_train_timesteps" in inspect.signature(cls).parameters]
        assert len(classes) > 30
        for cls in classes:
            check_config(cls.__name__, json.loads(cls().to_json_string()), cls)

    def test_scheduler_setting_that_diffusers_has_not_is_a_value_error(self, tiny_pipeline, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "l,near"}))
        with pytest.raises(ValueError, match="l,near") as error:
            TerDiTPipeline.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)
