import pytest
import torch

from diffusers_terdit import ternarize, training
from diffusers_terdit.ops import dequantize
from diffusers_terdit.ops.reference import least_squares_scale
from tiny import randomize
from tiny_training import fresh_model


class TestStartingWeights:
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_the_scale_is_the_least_squares_one(self, granularity):
        weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
        ternary = ternarize(weight, granularity)
        scale = least_squares_scale(weight, ternary, granularity)

        def error(candidate):
            return (dequantize(ternary, candidate) - weight).square().sum()

        assert all(error(scale) < error(scale * factor) for factor in (0.99, 1.01))

    def test_a_ternary_model_starts_from_full_precision(self):
        source, target = fresh_model(0, ternary=False), fresh_model(1)
        assert training.initialize.transfer_weights(source, target) == []
        for name, layer in target.ternary_layers().items():
            assert torch.equal(layer.weight, source.state_dict()[f"{name}.weight"])
            expected = least_squares_scale(layer.weight, ternarize(layer.weight), "tensor")
            assert torch.equal(layer.weight_scale, expected)
        assert torch.equal(target.proj_in.weight, source.proj_in.weight)

    def test_fine_tuning_starts_from_the_packed_codes(self):
        source, target = fresh_model(0).pack(), fresh_model(1)
        before = {name: layer.weight_packed.clone() for name, layer in source.ternary_layers().items()}
        training.initialize.transfer_weights(source, target)
        assert all(
            torch.equal(codes, before[name]) for name, codes in training.statistics.packed_codes(target).items()
        )

    def test_a_full_precision_model_starts_from_ternary(self):
        source, target = randomize(fresh_model(0)), fresh_model(1, ternary=False)
        training.initialize.transfer_weights(source, target)
        inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10]))
        torch.testing.assert_close(target(*inputs).sample, source(*inputs).sample)

    def test_other_classes_get_a_fresh_label_table(self):
        source, target = fresh_model(0), fresh_model(1, num_classes=3)
        assert training.initialize.transfer_weights(source, target) == ["class_embed.weight"]

    def test_gradual_ternarization_goes_from_full_precision_to_ternary(self):
        source, model = randomize(fresh_model(ternary=False)), fresh_model()
        training.initialize.transfer_weights(source, model)
        inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10]))
        ternary, names = model(*inputs).sample, set(model.state_dict())
        set_strength = training.initialize.gradual_ternarization(model)
        torch.testing.assert_close(model(*inputs).sample, source(*inputs).sample)
        set_strength(0.5)
        half = model(*inputs).sample
        assert not torch.allclose(half, ternary)
        assert not torch.allclose(half, source(*inputs).sample)
        half.sum().backward()
        assert all(layer.weight.grad.abs().sum() > 0 for layer in model.ternary_layers().values())
        assert all(layer.weight_scale.grad is not None for layer in model.ternary_layers().values())
        assert set(model.state_dict()) == names
        set_strength(1.0)
        assert torch.equal(model(*inputs).sample, ternary)
        assert not any("forward" in vars(layer) for layer in model.ternary_layers().values())
