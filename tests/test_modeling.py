"""Loading is strict whichever way it is asked for, and what is saved loads again."""

import inspect
import json
import os
import re
import resource

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from safetensors.torch import save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.storage.configs import check_config, fits
from tiny import read_weights, rewrite_weights


FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"
BIN = "diffusion_pytorch_model.bin"
FORMATS = ["float", "packed"]
SHARDED = {"max_shard_size": "20KB"}
PLAIN, QUERY = "proj_out.weight", "transformer_blocks.1.attn.to_q"
single_or_sharded = pytest.mark.parametrize("save", [{}, SHARDED], ids=["single", "sharded"])
load = TerDiTTransformer2DModel.from_pretrained


def shard_of(folder, name):
    """The file with a tensor."""
    index = folder / INDEX
    return folder / json.loads(index.read_text())["weight_map"][name] if index.exists() else folder / FILE


def equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestStrictLoading:
    """Every way to load asks `check_weights`, whose faults tests/storage/test_weights.py goes through."""

    @single_or_sharded
    @pytest.mark.parametrize(
        "load",
        [
            lambda folder: load(folder / "transformer"),
            lambda folder: load(folder / "transformer", low_cpu_mem_usage=False),
            lambda folder: load(folder / "transformer", device_map="auto"),
            lambda folder: load(folder / "transformer", device_map={"": "cpu"}),
            lambda folder: AutoModel.from_pretrained(str(folder), subfolder="transformer"),
            TerDiTPipeline.from_pretrained,
            DiffusionPipeline.from_pretrained,
        ],
        ids=["low memory", "plain", "auto", "device map", "AutoModel", "TerDiTPipeline", "DiffusionPipeline"],
    )
    def test_every_way_to_load_finds_what_only_the_digest_tells(self, tiny_pipeline, tmp_path, load, save):
        def another_code(tensors):
            codes = tensors[f"{QUERY}.weight_packed"].view(-1)
            codes[3] = codes[3] & 0b11111100 | (codes[3] + 1 & 0b11) % 3

        tiny_pipeline(weight_format="packed").save_pretrained(tmp_path, **save)
        path = shard_of(tmp_path / "transformer", f"{QUERY}.weight_packed")
        rewrite_weights(path, another_code, keep_metadata=True)
        with pytest.raises(ValueError, match="digest") as error:
            load(tmp_path)
        assert path.name in str(error.value)

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_file_without_our_metadata_loads(self, tiny_model, tmp_path, weight_format, low_cpu_mem_usage):
        model = tiny_model(weight_format)
        model.save_pretrained(tmp_path)
        save_file(read_weights(tmp_path / FILE)[0], tmp_path / FILE)
        assert equal_state(load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage), model)

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_scale_that_another_program_stored_in_half_becomes_float32(
        self, tiny_model, tmp_path, weight_format, options, low_cpu_mem_usage
    ):
        tiny_model(weight_format).save_pretrained(tmp_path)
        name = f"{QUERY}.weight_scale"
        rewrite_weights(tmp_path / FILE, lambda t: t.update({name: t[name].bfloat16()}))
        scale = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **options).state_dict()[name]
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

    @single_or_sharded
    def test_pointer_of_git_lfs_is_an_oserror(self, tiny_model, tmp_path, save):
        tiny_model("packed").save_pretrained(tmp_path, **save)
        path = shard_of(tmp_path, PLAIN)
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        with pytest.raises(OSError, match=f"{re.escape(path.name)}|git-lfs"):
            load(tmp_path)

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

    def test_shards_and_index_that_differ_are_an_error_that_names_the_tensor(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path, **SHARDED)
        path, index = shard_of(tmp_path, PLAIN), json.loads((tmp_path / INDEX).read_text())
        names = index["weight_map"]
        for name, weight_map in {
            "ghost.weight": {**names, "ghost.weight": path.name},
            PLAIN: {name: file for name, file in names.items() if file != path.name},
        }.items():
            edit_json(tmp_path / INDEX, weight_map=weight_map)
            with pytest.raises(ValueError, match=re.escape(name)):
                load(tmp_path)
        edit_json(tmp_path / INDEX, weight_map=names)
        rewrite_weights(path, lambda tensors: tensors.pop(PLAIN))
        with pytest.raises(ValueError, match=re.escape(PLAIN)):
            load(tmp_path)


class TestConfigOfTheWeights:
    @single_or_sharded
    @pytest.mark.parametrize(("key", "value"), [("norm_eps", 1e-3), ("pos_embed_type", "rope+sincos2d")])
    def test_a_config_of_another_model_is_warned_of(self, tiny_model, tmp_path, caplog, key, value, save):
        """What changes no shape is taken as it is, with a warning that names both values."""
        before = tiny_model("packed").config[key]
        tiny_model("packed").save_pretrained(tmp_path, **save)
        edit_json(tmp_path / "config.json", **{key: value})
        assert load(tmp_path).config[key] == value
        assert f"was saved with {key}={before!r}, not {value!r}" in caplog.text

    def test_the_same_config_and_one_without_a_later_option_are_not(self, tiny_model, tmp_path, caplog):
        model = tiny_model("float")
        model.pack().save_pretrained(tmp_path)
        load(tmp_path)
        tensors, metadata = read_weights(tmp_path / FILE)
        saved = json.loads(metadata["terdit.config"])
        assert saved.pop("norm_eps")
        save_file(tensors, tmp_path / FILE, {**metadata, "terdit.config": json.dumps(saved)})
        load(tmp_path)
        assert "was saved with" not in caplog.text


class TestSaving:
    @single_or_sharded
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

    @pytest.mark.parametrize(
        ("before", "after"), [(SHARDED, {}), ({}, SHARDED), (SHARDED, {"max_shard_size": "60KB"})]
    )
    def test_saving_again_leaves_nothing_stale(self, tiny_model, tmp_path, before, after):
        tiny_model(seed=1).save_pretrained(tmp_path, **before)
        model = tiny_model("packed", seed=2)
        model.save_pretrained(tmp_path, **after)
        assert equal_state(load(tmp_path), model)
        fresh = tmp_path / "fresh"
        model.save_pretrained(fresh, **after)
        left = {path.name for path in tmp_path.iterdir()} - {"fresh"}
        assert left == {path.name for path in fresh.iterdir()}

    def test_saving_clears_neither_variants_nor_strangers(self, tiny_model, tmp_path):
        ema, model = tiny_model(seed=1), tiny_model(seed=2)
        ema.save_pretrained(tmp_path, variant="ema", **SHARDED)
        (tmp_path / "notes.safetensors").write_bytes(b"mine")
        model.save_pretrained(tmp_path)
        assert equal_state(load(tmp_path, variant="ema"), ema)
        assert equal_state(load(tmp_path), model)
        assert (tmp_path / "notes.safetensors").read_bytes() == b"mine"

    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    def test_weights_are_as_readable_as_the_config(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        assert (tmp_path / FILE).stat().st_mode == (tmp_path / "config.json").stat().st_mode

    def test_views_and_transposed_weights_are_saved_by_value(self, tiny_model, tmp_path):
        model = tiny_model()
        model.proj_out.weight.data = model.proj_out.weight.data.T.contiguous().T
        model.save_pretrained(tmp_path)
        assert equal_state(load(tmp_path), model)

    def test_another_format_than_safetensors_is_an_error_and_nothing_is_written(self, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline()
        for saved, other in [
            (TernaryLinear(8, 8), {"use_flashpack": True}),
            (pipe.transformer, {"safe_serialization": False}),
            (pipe, {"safe_serialization": False}),
        ]:
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

    @single_or_sharded
    def test_host_calls_the_loading_hook_with_every_file(self, tiny_model, tmp_path, save):
        seen = []

        class Watched(TerDiTTransformer2DModel):
            @classmethod
            def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
                seen.extend(os.path.basename(path) for path in resolved_model_file)
                return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

        tiny_model("packed").save_pretrained(tmp_path, **save)
        Watched.from_pretrained(tmp_path)
        assert sorted(seen) == sorted(path.name for path in tmp_path.glob("*.safetensors"))

    def test_loading_information_is_still_given(self, tiny_model, tmp_path):
        tiny_model("packed").save_pretrained(tmp_path)
        model, information = load(tmp_path, output_loading_info=True)
        assert isinstance(model, TerDiTTransformer2DModel)
        assert information == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}

    def test_every_scheduler_fits_its_annotations(self):
        names = {name for name in dir(diffusers) if name.endswith("Scheduler")} - {"VQDiffusionScheduler"}
        classes = [getattr(diffusers, name) for name in sorted(names)]
        classes = [cls for cls in classes if "num_train_timesteps" in inspect.signature(cls).parameters]
        assert len(classes) > 30
        for cls in classes:
            check_config(cls.__name__, json.loads(cls().to_json_string()), cls)

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
        edit_json(tmp_path / file, **change)
        assert TerDiTPipeline.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((torch.bfloat16,), {}), ((), {"dtype": torch.bfloat16}), (("cpu", torch.bfloat16), {}),
            ((torch.device("cpu"), torch.bfloat16, True), {}), ((), {"device": "cpu", "dtype": torch.bfloat16}),
            ((torch.zeros(1, dtype=torch.bfloat16),), {}),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_cast_warns_of_nothing(self, tiny_model, caplog, args, kwargs):
        model = tiny_model("packed")
        assert model.to(*args, **kwargs) is model
        assert model.dtype == torch.bfloat16
        assert model.get_submodule(QUERY).weight_scale.dtype == torch.float32
        assert model.to(dtype=None).to("cpu") is model
        assert "kept in float32" not in caplog.text


@pytest.mark.parametrize(("value", "hint", "expected"), [
    ({"a": [1]}, dict, True), ([1, "a"], list, True), ({"a": 1}, dict[str, int], True),
    ({"a": "1"}, dict[str, int], False),
    ({1: 1}, dict[str, int], False), (None, dict[str, int] | None, True), ([1, None], list[int], False),
])  # fmt: skip
def test_types_of_json(value, hint, expected):
    assert fits(value, hint, 1) is expected


class TestHostileFiles:
    """What damaged and hostile files once did; now each is an error that names the file."""

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize(
        "change",
        [
            {"ffn_dim": 10**15},
            {"ffn_dim": 2**31 - 4},
            {"num_classes": 2**31 - 1, "attention_head_dim": 2**30},
            {"num_layers": 1001},
            {"num_layers": 10**400},
            {"in_channels": 2**62},
            {"sample_size": 2**63},
        ],
        ids=lambda change: ",".join(f"{key}=2**{value.bit_length()}" for key, value in change.items()),
    )
    def test_config_of_a_petabyte_is_refused_before_anything_is_allocated(
        self, tiny_model, tmp_path, change, low_cpu_mem_usage
    ):
        tiny_model("packed").save_pretrained(tmp_path)
        edit_json(tmp_path / "config.json", **change)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
        assert torch.empty(1).device.type == "cpu"

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("transformer/config.json", {"num_layers": True}, "num_layers=True"),
            ("transformer/config.json", {"qk_norm": 1}, "qk_norm=1, expected bool"),
            ("transformer/config.json", {"weight_format": []}, "weight_format="),
            ("transformer/config.json", {"_class_name": 3}, "_class_name"),
            ("model_index.json", {"transformer": ["os", "system"]}, "`transformer` is"),
            ("model_index.json", {"transformer": [3, None]}, "`transformer` is"),
            ("model_index.json", {"scheduler": ["subprocess", "Popen"]}, "`scheduler` is"),
            ("model_index.json", {"scheduler": {}}, "`scheduler` is"),
            # diffusers would build whole pipelines
            ("model_index.json", {"scheduler": ["diffusers", "DiffusionPipeline"]}, "`scheduler` is"),
            ("model_index.json", {"vae": ["diffusers", "DiffusionPipeline"]}, "`vae` is"),
            ("model_index.json", {"sampling_defaults": {"guidance_scale": "high"}}, "`sampling_defaults` is"),
            ("model_index.json", {"id2label": {"9" * 5000: "cat"}}, "`id2label` is"),
            ("model_index.json", {"id2label": {"0": ["cat"]}}, "`id2label` is"),
            ("transformer/config.json", {"_converted_from": 5}, "_converted_from=5"),
            (
                "transformer/config.json",
                {"_converted_from": {"repo_id": "a/b\n# c", "sha256": {}}},
                "_converted_from=",
            ),
            (
                "transformer/config.json",
                {"_converted_from": {"repo_id": None, "sha256": {"a": "b"}}},
                "_converted_from=",
            ),
            ("scheduler/scheduler_config.json", {"trained_betas": []}, "these settings make no"),
            ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**15}, "num_train_timesteps"),
            ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ],
        ids=str,
    )
    def test_value_that_cannot_be_is_an_error_that_names_it(self, tiny_pipeline, tmp_path, file, change, message):
        tiny_pipeline().save_pretrained(tmp_path)
        edit_json(tmp_path / file, **change)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            TerDiTPipeline.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize("name", ["CLIPProcessor", "AutoModel", "PreTrainedModel"])
    def test_a_vae_of_transformers_does_not_run_the_code_that_it_brings(
        self, tiny_pipeline, tmp_path, monkeypatch, name
    ):
        """transformers would ask whether to run it, and a hasty "y" would."""
        folder = tmp_path / "pipeline"
        tiny_pipeline().save_pretrained(folder)
        edit_json(folder / "model_index.json", vae=["transformers", name])
        (folder / "vae").mkdir()
        (folder / "vae" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        places = dict.fromkeys(("AutoModel", "AutoConfig", "AutoProcessor"), "evil.Evil")
        for file in ("config.json", "processor_config.json", "preprocessor_config.json"):
            (folder / "vae" / file).write_text(json.dumps({"auto_map": places, "processor_class": "Evil"}))
        monkeypatch.setattr("builtins.input", lambda *prompt: "y")
        with pytest.raises(ValueError, match=rf"model_index\.json: `vae` is \['transformers', '{name}'\]"):
            TerDiTPipeline.from_pretrained(folder)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("text", ['{"a":' * 100_000, "null", '{"num_layers": 1' + "0" * 5000 + "}"])
    def test_config_that_is_no_object_is_an_error_that_names_it(self, tiny_model, tmp_path, text):
        tiny_model().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "config.json"))):
            load(tmp_path)
