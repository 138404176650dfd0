"""Wherever the weights are while a pipeline samples, the pictures stay the plain run's.

From CPU to CPU the hooks run and the copies between devices do not; tests marked `gpu` do both.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit._diffusers import is_offloaded


CPU = torch.device("cpu")
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
both_formats = pytest.mark.parametrize("weight_format", ["float", "packed"])


def sample(pipe):
    """Sample with a callback: adaLN is then computed step by step, as with offloading, and the bits are comparable."""
    return pipe(
        [1, 2],
        num_inference_steps=4,
        output_type="latent" if pipe.vae is None else "pt",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, timestep, tensors: tensors,
    ).images


def same_again(pipe, expected):
    return all(torch.equal(sample(pipe), expected) for _ in range(2))


def sequential(pipe, folder):
    # What `enable_sequential_cpu_offload` does; itself it asks for "cpu:0", which accelerate cannot place.
    for component in (pipe.transformer, pipe.vae):
        cpu_offload(component, CPU, offload_buffers=len(component._parameters) > 0)


OFFLOADS = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "leaves": lambda pipe, folder: pipe.enable_group_offload(CPU, CPU, "leaf_level"),
    "leaves on disk": lambda pipe, folder: pipe.enable_group_offload(
        CPU, CPU, "leaf_level", offload_to_disk_path=str(folder)
    ),
    "disk": lambda pipe, folder: disk_offload(pipe.transformer, folder, CPU),
    "blocks": lambda pipe, folder: pipe.enable_group_offload(CPU, CPU, **BLOCKS),
    "blocks on disk": lambda pipe, folder: pipe.transformer.enable_group_offload(
        CPU, CPU, **BLOCKS, offload_to_disk_path=str(folder)
    ),
}


@both_formats
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_no_bit(tiny_pipeline, tmp_path, weight_format, offload):
    pipe = tiny_pipeline(True, weight_format=weight_format)
    expected = sample(pipe)
    OFFLOADS[offload](pipe, tmp_path)
    assert offload == "model" or is_offloaded(pipe.transformer)
    assert same_again(pipe, expected)
    assert any(tmp_path.iterdir()) == offload.endswith("disk")
    if offload in ("sequential", "disk"):
        assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    if offload.startswith("leaves"):
        holders = [module for module in pipe.transformer.modules() if list(module.parameters(recurse=False))]
        assert all(hasattr(module, "_diffusers_hook") for module in holders)


@pytest.mark.parametrize("offload", ["sequential", "disk"])
@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def test_a_model_whose_weights_are_elsewhere_says_how_to_save_it(tiny_pipeline, tmp_path, offload, part):
    pipe = tiny_pipeline(True, weight_format="packed")
    expected = pipe.transformer.state_dict()
    OFFLOADS[offload](pipe, tmp_path / "offloaded")
    saved = pipe if part == "pipeline" else pipe.transformer
    with pytest.raises(ValueError, match=r"are on the meta device.*remove_hook_from_module\(model, recurse=True\)"):
        saved.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*"))
    remove_hook_from_module(pipe.transformer, recurse=True)
    pipe.transformer.save_pretrained(tmp_path / "saved")
    again = TerDiTTransformer2DModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_components_go_to_the_device_in_order_of_use():
    assert TerDiTPipeline.model_cpu_offload_seq == "transformer->vae"


@pytest.mark.parametrize("options", [{"weight_format": "packed"}, {"weight_format": "float"}, {"ternary": False}])
def test_layerwise_casting_goes_with_group_offloading(tiny_pipeline, options):
    pipe = tiny_pipeline(**options)
    plain, size, ternary = sample(pipe), pipe.transformer.get_memory_footprint(), pipe.transformer.config.ternary
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = sample(pipe)
    assert torch.equal(expected, plain) == ternary  # whose layers are left alone
    assert pipe.transformer.get_memory_footprint() <= size * (1 if ternary else 0.6)
    pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level")
    assert same_again(pipe, expected)


@pytest.mark.gpu
class TestOnAGpu:
    """Against the plain run on the GPU; generators stay on the CPU."""

    @pytest.fixture(params=["float", "packed"])
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

    @pytest.mark.parametrize(("kind", "device"), [("model", "cpu"), ("sequential", "meta")])
    def test_offloading(self, pipe, expected, kind, device):
        getattr(pipe, f"enable_{kind}_cpu_offload")()
        self.agrees(pipe, expected)
        assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {device}

    @pytest.mark.parametrize("group", [{"offload_type": "leaf_level"}, BLOCKS], ids=str)
    @pytest.mark.parametrize("use_stream", [False, True])
    @pytest.mark.parametrize("to_disk", [False, True])
    def test_group_offloading(self, pipe, expected, tmp_path, group, use_stream, to_disk):
        disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
        stream = {"use_stream": True} if use_stream else {}
        pipe.transformer.enable_group_offload(torch.device("cuda"), CPU, **group, **stream, **disk)
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
