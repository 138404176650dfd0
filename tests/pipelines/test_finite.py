"""Sampling ends at the step and the layer that give NaN or infinity, and extreme weights do so in float16 alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffusers_terdit.ops import has_integer_kernel


class TestWhereItStops:
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_step_and_layer_are_named(self, tiny_pipeline, weight_format):
        pipe = tiny_pipeline(weight_format=weight_format)
        pipe.transformer.transformer_blocks[1].norm2.weight.data[3] = float("nan")
        layer = r"layer transformer_blocks\.1\.norm2 gives NaN or infinity in float32"
        with pytest.raises(ValueError, match=rf"Step 1 of 3 \(timestep \d+\): {layer}"):
            pipe(3, num_inference_steps=3)
        assert pipe.current_timestep is None

    def test_a_later_step(self, tiny_pipeline):
        def damage(pipe, step, timestep, kwargs):
            if step == 1:
                pipe.transformer.proj_out.bias.data[0] = float("inf")
            return kwargs

        with pytest.raises(ValueError, match=r"Step 3 of 4 .*: layer proj_out"):
            tiny_pipeline()(3, num_inference_steps=4, callback_on_step_end=damage)

    @pytest.mark.gpu
    @pytest.mark.parametrize("step", [1, 2, 4])
    def test_a_gpu_reports_the_step_that_failed_though_it_looks_one_step_late(self, tiny_pipeline, step):
        pipe = tiny_pipeline(weight_format="packed").to("cuda")
        calls = []

        def damage(module, inputs):
            calls.append(module)
            if len(calls) == step:
                module.bias.data[0] = float("inf")

        pipe.transformer.proj_out.register_forward_pre_hook(damage)
        with pytest.raises(ValueError, match=rf"Step {step} of 4 .*: layer proj_out gives NaN or infinity in float32"):
            pipe(3, num_inference_steps=4)
        assert len(calls) == min(step + 1, 4) + 1  # one step is queued before the look; another call finds the layer

    def test_half_precision_that_overflows_says_what_to_use(self, tiny_pipeline):
        pipe = tiny_pipeline(weight_format="packed").to(dtype=torch.float16)
        pipe.transformer.proj_in.bias.data.fill_(60000.0)
        pipe.transformer.proj_in.weight.data.fill_(60000.0)
        with pytest.raises(ValueError, match=r"layer proj_in .* in float16\. Try bfloat16 or float32"):
            pipe(3, num_inference_steps=2)

    def test_latents_of_the_caller_or_a_callback(self, tiny_pipeline):
        latents = torch.randn(1, 3, 8, 8)
        latents[0, 0, 0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"Step 1 of 2 .* starts from latents with NaN or infinity"):
            tiny_pipeline()(3, num_inference_steps=2, latents=latents)
        with pytest.raises(ValueError, match=r"Step 2 of 3 .* starts from latents with NaN"):
            tiny_pipeline()(3, num_inference_steps=3, callback_on_step_end=lambda *_: {"latents": latents})

    def test_no_hook_stays(self, tiny_pipeline):
        pipe = tiny_pipeline()
        bias = pipe.transformer.proj_out.bias.data
        kept, expected = bias.clone(), sample(pipe, steps=2)
        bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="layer proj_out"):
            sample(pipe, steps=2)
        assert not any(module._forward_hooks for module in pipe.transformer.modules())
        bias.copy_(kept)
        assert torch.equal(sample(pipe, steps=2), expected)


LARGEST = torch.finfo(torch.float16).max
EXTREMES = [("scales", 1e-4), ("scales", 1e2), ("outliers", 20), ("outliers", 1000), ("gains", 1e-4), ("gains", 1e3)]
QUICK = [("scales", 1e2, 8), ("outliers", 20, None)]


def sample(pipe, steps=250):
    generator = torch.Generator().manual_seed(0)
    return pipe(3, num_inference_steps=steps, generator=generator, output_type="latent").images


@torch.no_grad()
def make_extreme(model, what, factor):
    """Of all scales; of a channel before attention and feed-forward, and of inputs of every layer; of all gains."""
    for layer in model.ternary_layers().values():
        if what == "scales":
            layer.weight_scale *= factor
        elif what == "outliers":
            layer.weight[:, ::16] *= factor
    for block in model.transformer_blocks:
        if what != "scales":
            every = 16 if what == "outliers" else 1
            for norm in (block.norm1, block.norm2, block.adaln.norm)[: 2 if every == 16 else 3]:
                norm.weight[::every] *= factor
    return model.pack()


@pytest.fixture
def extreme(tiny_pipeline):
    """`extreme("scales", 1e2, dtype, bits)`: float weights made extreme, then packed."""

    def make(what, factor, dtype, bits=None, **options):
        pipe = tiny_pipeline(**{"sample_size": 4, "num_layers": 1, **options})
        make_extreme(pipe.transformer, what, factor)
        pipe.to(dtype).transformer.set_activation_bits(bits)
        return pipe

    return make


@contextmanager
def largest_number(model) -> Iterator[list[float]]:
    """The largest number that any layer is given or gives while the model runs."""
    found = [0.0]

    def look(module, inputs, outputs):
        tensors = [*inputs, *(outputs if isinstance(outputs, tuple) else [outputs])]
        numbers = [t.abs().max().item() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
        found[0] = max(found[0], *numbers, 0.0)

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    yield found
    for hook in hooks:
        hook.remove()


def combinations():
    for what, factor in EXTREMES:
        for bits in (None, 16, 8):
            slow = () if (what, factor, bits) in QUICK else (pytest.mark.slow,)
            yield pytest.param(what, factor, bits, marks=slow)


@pytest.mark.parametrize(("what", "factor", "bits"), [*combinations()])
@pytest.mark.parametrize("qk_norm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_extreme_weights_stay_finite_but_where_float16_does_not_hold_a_number(extreme, what, factor, bits, qk_norm):
    """250 steps. float16 may refuse numbers that it does not hold, and nothing else; the model in float32 tells."""
    if bits and not has_integer_kernel("cpu"):
        pytest.skip("no AVX2 or no numba")
    assert sample(extreme(what, factor, torch.bfloat16, bits, qk_norm=qk_norm)).isfinite().all()
    wide = extreme(what, factor, torch.float32, qk_norm=qk_norm)
    with largest_number(wide.transformer) as largest:
        sample(wide, steps=10)
    pipe = extreme(what, factor, torch.float16, bits, qk_norm=qk_norm)
    if largest[0] < LARGEST / 4:
        assert (what, factor) != ("scales", 1e2)
        assert sample(pipe).isfinite().all(), largest
    elif largest[0] > 4 * LARGEST:
        assert (what, factor) != ("outliers", 20)
        with pytest.raises(ValueError, match=r"Step \d+ of 250 .*: layer \S+ gives NaN or infinity in float16\. "):
            sample(pipe)
    else:
        pytest.skip(f"the largest number in float32 is {largest[0]:.0f}: either may be")
