import copy

import pytest
import torch

from diffusers_terdit import training
from tiny_training import fresh_model


class TestAverage:
    def test_average_follows_its_formula_and_leaves_the_model_alone(self):
        model, average = fresh_model(0), fresh_model(1)
        before, start = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state_dict())
        training.ema.update(average, model, 0.9)
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * before[name])
            assert torch.equal(model.state_dict()[name], before[name])

    def test_warmup_forgets_the_first_weights(self):
        assert training.ema.decay_at(0, 0.9999) == pytest.approx(0.1)
        assert training.ema.decay_at(90, 0.9999) == pytest.approx(0.91)
        assert training.ema.decay_at(10**7, 0.9999) == 0.9999
