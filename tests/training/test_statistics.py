import pytest
import torch

from diffusers_terdit import training
from tiny_training import fresh_model


class TestStatistics:
    def test_shares_of_a_matrix_made_by_hand(self):
        model = fresh_model(num_layers=1)
        layers = model.ternary_layers()
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.fill_(1.0)
            first = next(iter(layers.values()))
            first.weight.zero_()
            first.weight_scale.fill_(-3.0)
        statistics = training.statistics.ternary_statistics(model)
        total = sum(layer.weight.numel() for layer in layers.values())
        assert statistics["zero_share"] == pytest.approx(first.weight.numel() / total)
        assert statistics["dead_layers"] == [next(iter(layers))]
        assert statistics["scale_max"] == 3.0
        assert statistics["scale_negative_share"] == pytest.approx(1 / len(layers))
        assert statistics["near_threshold_share"] == 0
        assert "flip_share" not in statistics

    def test_weights_next_to_the_threshold_are_counted(self):
        model = fresh_model(num_layers=1)
        with torch.no_grad():
            for layer in model.ternary_layers().values():
                half = layer.weight.numel() // 2
                # Half of the weights at 1, half at 1/3: the mean is 2/3, and 1/3 is where rounding changes.
                layer.weight.copy_(torch.tensor([1.0, 1 / 3]).repeat(half).view_as(layer.weight))
        assert training.statistics.ternary_statistics(model)["near_threshold_share"] == 0.5

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_flips_are_counted_since_the_codes_given(self, granularity):
        model = fresh_model(num_layers=1, scale_granularity=granularity)
        codes = training.statistics.packed_codes(model)
        assert training.statistics.ternary_statistics(model, codes)["flip_share"] == 0
        total = changed = 0
        for layer in model.ternary_layers().values():
            before = layer.ternary_weight()
            with torch.no_grad():
                layer.weight[0] *= -1  # magnitudes and thresholds stay
            changed += int((before != layer.ternary_weight()).sum())
            total += before.numel()
        assert training.statistics.ternary_statistics(model, codes)["flip_share"] == pytest.approx(changed / total)
        assert changed > 0

    def test_the_full_precision_baseline_has_no_ternary_statistics(self):
        assert training.statistics.ternary_statistics(fresh_model(ternary=False)) == {}

    def test_gates_start_at_the_gain_of_the_adaln_norm(self):
        gates = training.statistics.gate_sizes(fresh_model(num_layers=3))
        assert [len(values) for values in gates.values()] == [3, 3]
        assert all(0.03 < value < 0.3 for values in gates.values() for value in values)
