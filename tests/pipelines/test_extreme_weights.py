"""250 steps in half precision with extreme weights: finite, or refused where float16 cannot hold the numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffusers_terdit.ops import has_integer_kernel


LARGEST = torch.finfo(torch.float16).max


def scales(factor):
    def change(model):
        for layer in model.ternary_layers().values():
            layer.weight_scale.data *= factor

    return change


def outliers(factor):
    """A channel of what attention and feed-forward read, and inputs of every float weight before it is ternarized."""

    def change(model):
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight.data[::16] *= factor
        for layer in model.ternary_layers().values():
            layer.weight.data[:, ::16] *= factor

    return change


def gains(factor):
    def change(model):
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2, block.adaln.norm):
                norm.weight.data *= factor

    return change


EXTREMES = {
    "scales 1e-4": scales(1e-4),
    "scales 1e-2": scales(1e-2),
    "scales 10": scales(10.0),
    "scales 1e2": scales(1e2),
    "outliers 20": outliers(20.0),
    "outliers 1000": outliers(1000.0),
    "gains 1e-4": gains(1e-4),
    "gains 30": gains(30.0),
    "gains 1e3": gains(1e3),
}
QUICK = [("scales 1e2", 8), ("outliers 20", None)]


@pytest.fixture
def extreme(tiny_pipeline):
    """`extreme("scales 1e2", dtype, bits)`: float weights made extreme, then packed."""

    def make(name, dtype, bits=None, **options):
        pipe = tiny_pipeline(**{"sample_size": 4, "num_layers": 1, **options})
        EXTREMES[name](pipe.transformer)
        pipe.transformer.pack()
        pipe.to(dtype)
        pipe.transformer.set_activation_bits(bits)
        return pipe

    return make


def sample(pipe, steps=250):
    generator = torch.Generator().manual_seed(0)
    return pipe(3, num_inference_steps=steps, generator=generator, output_type="latent").images


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
    for name in EXTREMES:
        for bits in (None, 16, 8):
            slow = () if (name, bits) in QUICK else (pytest.mark.slow,)
            yield pytest.param(name, bits, marks=slow, id=f"{name}-{bits}")


@pytest.mark.parametrize(("name", "bits"), [*combinations()])
@pytest.mark.parametrize("qk_norm", [True, pytest.param(False, marks=pytest.mark.slow)])
class TestExtremeWeights:
    @pytest.fixture(autouse=True)
    def _kernel(self, bits):
        if bits and not has_integer_kernel("cpu"):
            pytest.skip("no AVX2 or no numba")

    def test_bfloat16_stays_finite(self, extreme, name, bits, qk_norm):
        assert sample(extreme(name, torch.bfloat16, bits, qk_norm=qk_norm)).isfinite().all()

    def test_float16_stays_finite_or_says_where_it_cannot(self, extreme, name, bits, qk_norm):
        """It may refuse numbers that it does not hold, and nothing else; the same model in float32 tells."""
        wide = extreme(name, torch.float32, qk_norm=qk_norm)
        with largest_number(wide.transformer) as largest:
            sample(wide, steps=10)
        pipe = extreme(name, torch.float16, bits, qk_norm=qk_norm)
        if largest[0] < LARGEST / 4:
            assert sample(pipe).isfinite().all(), largest
        elif largest[0] > 4 * LARGEST:
            with pytest.raises(ValueError, match=r"Step \d+ of 250 .*: layer \S+ gives NaN or infinity in float16\. "):
                sample(pipe)
        else:
            pytest.skip(f"the largest number in float32 is {largest[0]:.0f}: either may be")


def test_the_extremes_are_of_both_kinds(extreme):
    for name, overflows in (("scales 1e2", True), ("outliers 20", False)):
        pipe = extreme(name, torch.float32)
        with largest_number(pipe.transformer) as largest:
            sample(pipe, steps=2)
        assert (largest[0] > 4 * LARGEST) is overflows
        assert (largest[0] < LARGEST / 4) is not overflows
