import math

import numpy as np
import pytest
import torch

from diffusers_terdit import training


FROZEN_UNIFORM = [0.5014364721147898, 0.648593774063379]
FROZEN_NORMAL = [1.2475111484527588, 1.2347158193588257]
FROZEN_ORDER = [6, 4, 7, 2, 3, 5, 1, 0]


class TestRandomNumbers:
    def test_numbers_are_a_function_of_seed_stream_and_position_only(self):
        together = training.random.normal(3, "noise", range(100, 110), (2, 3))
        apart = torch.cat([training.random.normal(3, "noise", [p], (2, 3)) for p in range(100, 110)])
        assert torch.equal(together, apart)
        together = training.random.uniform(3, "timestep", range(100, 110))
        apart = torch.cat([training.random.uniform(3, "timestep", [p]) for p in reversed(range(100, 110))]).flip(0)
        assert torch.equal(together, apart)

    def test_numbers_are_frozen(self):
        # A run that is resumed after an update of this package must go on with the numbers it began with.
        assert training.random.uniform(0, "timestep", [0, 10**12]).tolist() == FROZEN_UNIFORM
        assert training.random.normal(7, "noise", [5], (2,)).flatten().tolist() == FROZEN_NORMAL
        assert training.random.sample_order(8, 0, 1).tolist() == FROZEN_ORDER

    @pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)], ids=["seed", "stream", "position"])
    def test_seed_stream_and_position_each_matter(self, other):
        seed, stream, position = other
        first, second = (
            training.random.normal(0, "a", [0], (4000,))[0],
            training.random.normal(seed, stream, [position], (4000,))[0],
        )
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(4000)

    def test_numbers_are_uniform_and_normal(self):
        number = training.random.uniform(0, "x", range(4000))
        assert 0 <= number.min() < number.max() < 1
        assert abs(number.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
        noise = training.random.normal(0, "x", range(100), (100,))
        assert abs(noise.mean()) < 5 / 100
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 1e4)

    def test_every_sample_comes_once_per_epoch_in_a_new_order(self):
        orders = [training.random.sample_order(1000, 0, epoch) for epoch in range(3)]
        assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
        assert (orders[0] != orders[1]).mean() > 0.99
        assert (orders[1] != orders[2]).mean() > 0.99

    @pytest.mark.parametrize(("processes", "accumulation", "batch"), [(1, 1, 24), (2, 1, 12), (3, 4, 2), (1, 8, 3)])
    def test_any_split_of_a_step_takes_the_same_positions(self, processes, accumulation, batch):
        taken = [
            position
            for process in range(processes)
            for part in training.random.microbatch_positions(5, batch, accumulation, process, processes)
            for position in part
        ]
        assert sorted(taken) == list(range(5 * 24, 6 * 24))
