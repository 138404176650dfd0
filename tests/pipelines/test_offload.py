"""Where the weights may lie while a pipeline samples, and in which dtype: the pictures stay the plain run's.

From CPU to CPU the hooks run and the copies between devices do not; tests marked `gpu` do both. Model, sequential and
group offloading from CPU to CPU: test_pipeline_terdit.py and tests/models.
"""

import pytest
import torch

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit._diffusers import is_offloaded


CPU = torch.device("cpu")
FORMATS = ["float", "packed"]
both_formats = pytest.mark.parametrize("weight_format", FORMATS)
GROUPS = [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
groups = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group["offload_type"])


def sample(pipe, seed=0, **kwargs):
    """Sample with a callback: adaLN is then computed step by step, as with offloading, and the bits are comparable."""
    options = {"num_inference_steps": 4, "output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
    options["callback_on_step_end"] = lambda pipe, step, timestep, tensors: tensors
    return pipe([1, 2], **options | kwargs).images


def same_again(pipe, expected):
    return all(torch.equal(sample(pipe), expected) for _ in range(2))


class TestDeviceMap:
    @both_formats
    @pytest.mark.parametrize(
        "placing",
        [
            {"device_map": {"": "disk"}},
            {"device_map": {"transformer_blocks.1": "disk", "class_embed": "disk"}},
            {"device_map": "auto", "max_memory": {"cpu": "20KB"}},
            {"device_map": "balanced", "max_memory": {"cpu": "20KB"}},
        ],
        ids=str,
    )
    def test_weights_on_disk_change_no_bit(self, tiny_pipeline, tmp_path, weight_format, placing):
        pipe = tiny_pipeline(weight_format=weight_format)
        expected = sample(pipe)
        pipe.save_pretrained(tmp_path / "pipe")
        folder = {"subfolder": "transformer", "offload_folder": tmp_path / "offload"}
        if "class_embed" in placing["device_map"]:
            placing = {"device_map": completed(placing["device_map"], pipe.transformer)}
        transformer = TerDiTTransformer2DModel.from_pretrained(tmp_path / "pipe", **folder, **placing)
        assert "disk" in transformer.hf_device_map.values()
        assert "meta" in {parameter.device.type for parameter in transformer.parameters()}
        loaded = TerDiTPipeline.from_pretrained(tmp_path / "pipe", transformer=transformer)
        loaded.set_progress_bar_config(disable=True)
        assert same_again(loaded, expected)

    @pytest.mark.parametrize("device_map", ["disk", "auto"])
    def test_a_whole_pipeline_goes_to_no_such_place(self, tiny_pipeline, tmp_path, device_map):
        tiny_pipeline(weight_format="packed").save_pretrained(tmp_path)
        with pytest.raises(NotImplementedError, match=f"{device_map} not supported"):
            TerDiTPipeline.from_pretrained(tmp_path, device_map=device_map)


def completed(device_map, model):
    """With all other parts on the CPU: accelerate wants every one named."""
    names = [name for name, _ in model.named_children() if name != "transformer_blocks"]
    names += [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    return dict.fromkeys(names, "cpu") | device_map


class TestGroupOffloading:
    @both_formats
    @groups
    def test_from_disk_changes_no_bit(self, tiny_pipeline, tmp_path, weight_format, group):
        pipe = tiny_pipeline(weight_format=weight_format)
        expected = sample(pipe)
        pipe.transformer.enable_group_offload(CPU, CPU, **group, offload_to_disk_path=str(tmp_path))
        assert list(tmp_path.glob("*.safetensors"))
        assert is_offloaded(pipe.transformer)
        assert same_again(pipe, expected)

    @both_formats
    def test_with_the_vae_from_disk(self, tiny_pipeline, tmp_path, weight_format):
        pipe = tiny_pipeline(True, weight_format=weight_format)
        expected = sample(pipe)
        pipe.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path))
        assert same_again(pipe, expected)


class TestDtypes:
    @pytest.mark.parametrize("name", ["half", "bfloat16", "float", "double"])
    def test_methods_named_after_a_dtype_are_to(self, tiny_model, tiny_inputs, name):
        dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}
        inputs = tiny_inputs(dtype=dtype[name])
        with torch.no_grad():
            one = getattr(tiny_model("packed"), name)()(**inputs).sample
            other = tiny_model("packed").to(dtype[name])(**inputs).sample
        assert one.dtype == dtype[name]
        assert torch.equal(one, other)

    @pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)], ids=str)
    def test_half_precision_and_back_rounds_only_what_is_not_ternary(self, tiny_pipeline, dtype, error):
        pipe = tiny_pipeline(True, weight_format="packed")
        expected = sample(pipe)
        before = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
        assert (sample(pipe.to(dtype)) - expected).abs().max() < error
        pipe.to(torch.float32)
        assert (sample(pipe) - expected).abs().max() < error
        for name, tensor in pipe.transformer.state_dict().items():
            ternary = name.endswith(("weight_packed", "weight_scale"))
            assert torch.equal(tensor, before[name] if ternary else before[name].to(dtype).float()), name

    @both_formats
    @pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
    def test_layerwise_casting_of_a_ternary_model_changes_no_bit(self, tiny_pipeline, weight_format, storage):
        # Ternary layers and what stands between them are left alone.
        pipe = tiny_pipeline(weight_format=weight_format)
        expected = sample(pipe)
        pipe.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert same_again(pipe, expected)

    def test_layerwise_casting_of_the_dense_twin_stores_its_blocks_in_eight_bits(self, tiny_pipeline):
        pipe = tiny_pipeline(ternary=False)
        expected, before = sample(pipe), pipe.transformer.get_memory_footprint()
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert pipe.transformer.get_memory_footprint() < 0.6 * before
        error = (sample(pipe) - expected).abs().mean()
        assert 0 < error < 0.05

    def test_layerwise_casting_goes_with_group_offloading(self, tiny_pipeline):
        pipe = tiny_pipeline(ternary=False)
        casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        pipe.transformer.enable_layerwise_casting(**casting)
        expected = sample(pipe)
        pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level")
        assert same_again(pipe, expected)


@pytest.mark.gpu
class TestOnAGpu:
    """Against the plain run on the GPU; generators stay on the CPU."""

    @pytest.fixture(params=FORMATS)
    def pipe(self, tiny_pipeline, request):
        return tiny_pipeline(True, weight_format=request.param)

    @pytest.fixture
    def expected(self, pipe):
        images = sample(pipe.to("cuda")).cpu()
        pipe.to("cpu")
        return images

    def agrees(self, pipe, expected):
        for _ in range(2):
            torch.testing.assert_close(sample(pipe).cpu(), expected, rtol=1e-4, atol=1e-4)

    def test_gpu_and_cpu_draw_the_same(self, pipe, expected):
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-2, atol=1e-2)

    def test_model_offloading(self, pipe, expected):
        pipe.enable_model_cpu_offload()
        self.agrees(pipe, expected)
        assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"cpu"}

    def test_sequential_offloading(self, pipe, expected):
        pipe.enable_sequential_cpu_offload()
        self.agrees(pipe, expected)
        assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}

    @groups
    @pytest.mark.parametrize("use_stream", [False, True])
    @pytest.mark.parametrize("to_disk", [False, True])
    def test_group_offloading(self, pipe, expected, tmp_path, group, use_stream, to_disk):
        disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
        if use_stream:
            group = group | {"use_stream": True}
        pipe.transformer.enable_group_offload(torch.device("cuda"), CPU, **group, **disk)
        pipe.vae.to("cuda")
        self.agrees(pipe, expected)

    def test_device_map(self, pipe, expected, tmp_path):
        pipe.save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, device_map="cuda")
        loaded.set_progress_bar_config(disable=True)
        self.agrees(loaded, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, pipe, expected, dtype):
        if pipe.transformer.config.weight_format == "float":
            pipe.transformer.pack()
        torch.testing.assert_close(sample(pipe.to("cuda", dtype)).cpu().float(), expected, rtol=0, atol=0.1)
