import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, training


FROZEN_UNIFORM = [0.5014364721147898, 0.648593774063379]
FROZEN_NORMAL = [1.2475111484527588, 1.2347158193588257]
FROZEN_ORDER = [6, 4, 7, 2, 3, 5, 1, 0]


def fresh_model(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ffn_dim": 32,
        "num_classes": 10,
    }
    return TerDiTTransformer2DModel(**{**config, **overrides})


def optimizer_of(model, **kwargs):
    return torch.optim.AdamW(training.parameter_groups(model, **kwargs), lr=1e-2)


def take_steps(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        samples = training.normal(0, "test", range(4 * step, 4 * step + 4), (1, 8, 8))
        output = model(samples, torch.arange(4), torch.arange(4), return_dict=False)[0]
        (output[:, :1] - samples).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class TestRandomNumbers:
    def test_numbers_are_a_function_of_seed_stream_and_position_only(self):
        together = training.normal(3, "noise", range(100, 110), (2, 3))
        apart = torch.cat([training.normal(3, "noise", [p], (2, 3)) for p in range(100, 110)])
        assert torch.equal(together, apart)
        together = training.uniform(3, "timestep", range(100, 110))
        apart = torch.cat([training.uniform(3, "timestep", [p]) for p in reversed(range(100, 110))]).flip(0)
        assert torch.equal(together, apart)

    def test_numbers_are_frozen(self):
        # A run that is resumed after an update of this package must go on with the numbers it began with.
        assert training.uniform(0, "timestep", [0, 10**12]).tolist() == FROZEN_UNIFORM
        assert training.normal(7, "noise", [5], (2,)).flatten().tolist() == FROZEN_NORMAL
        assert training.sample_order(8, 0, 1).tolist() == FROZEN_ORDER

    @pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)], ids=["seed", "stream", "position"])
    def test_seed_stream_and_position_each_matter(self, other):
        seed, stream, position = other
        first, second = training.normal(0, "a", [0], (4000,))[0], training.normal(seed, stream, [position], (4000,))[0]
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(4000)

    def test_numbers_are_uniform_and_normal(self):
        number = training.uniform(0, "x", range(4000))
        assert 0 <= number.min() < number.max() < 1
        assert abs(number.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
        noise = training.normal(0, "x", range(100), (100,))
        assert abs(noise.mean()) < 5 / 100
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 1e4)

    def test_every_sample_comes_once_per_epoch_in_a_new_order(self):
        orders = [training.sample_order(1000, 0, epoch) for epoch in range(3)]
        assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
        assert (orders[0] != orders[1]).mean() > 0.99
        assert (orders[1] != orders[2]).mean() > 0.99

    @pytest.mark.parametrize(("processes", "accumulation", "batch"), [(1, 1, 24), (2, 1, 12), (3, 4, 2), (1, 8, 3)])
    def test_any_split_of_a_step_takes_the_same_positions(self, processes, accumulation, batch):
        taken = [
            position
            for process in range(processes)
            for part in training.microbatch_positions(5, batch, accumulation, process, processes)
            for position in part
        ]
        assert sorted(taken) == list(range(5 * 24, 6 * 24))


class TestLearningRate:
    def test_warmup_rises_to_the_full_rate(self):
        factors = [training.learning_rate_factor(step, "constant", 100, warmup_steps=4) for step in range(6)]
        assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])

    def test_wsd_is_flat_and_then_falls_to_nothing(self):
        factors = [training.learning_rate_factor(step, "wsd", 100, decay_steps=20) for step in (0, 79, 80, 90, 99)]
        assert factors == pytest.approx([1, 1, 1, 0.5, 0.05])

    def test_cosine_is_half_at_half_time(self):
        factors = [training.learning_rate_factor(step, "cosine", 110, warmup_steps=10) for step in (10, 60, 109)]
        assert factors == pytest.approx([1, 0.5, 0], abs=1e-3)

    @pytest.mark.parametrize(("step", "rate"), [(0, 5e-4), (1_549_999, 5e-4), (1_550_000, 1e-4), (1_749_999, 1e-4)])
    def test_the_papers_two_phases(self, step, rate):
        factor = training.learning_rate_factor(step, "piecewise_constant", 1_750_000, step_rules="1:1550000,0.2")
        assert 5e-4 * factor == pytest.approx(rate)

    @pytest.mark.parametrize("rules", [None, "", "1:x,2", "1:2:3,4"])
    def test_rules_that_do_not_parse_are_shown(self, rules):
        with pytest.raises(ValueError, match="step_rules"):
            training.learning_rate_factor(0, "piecewise_constant", 10, step_rules=rules)

    def test_unknown_schedule_is_refused(self):
        with pytest.raises(ValueError, match="'linear'"):
            training.learning_rate_factor(0, "linear", 10)


class TestParameterGroups:
    def test_only_matrices_decay_and_scales_stand_alone(self):
        model = fresh_model()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {
            group["name"]: {**group, "names": [names[id(p)] for p in group["params"]]}
            for group in training.parameter_groups(model, weight_decay=0.1, scale_lr_factor=0.5)
        }
        assert sorted(n for g in groups.values() for n in g["names"]) == sorted(names.values())
        assert all(name.endswith("weight_scale") for name in groups["scales"]["names"])
        assert len(groups["scales"]["names"]) == len(model.ternary_layers())
        assert {name: (g["weight_decay"], g["lr_factor"]) for name, g in groups.items()} == {
            "matrices": (0.1, 1.0),
            "vectors": (0.0, 1.0),
            "scales": (0.0, 0.5),
        }
        assert "class_embed.weight" in groups["vectors"]["names"]
        assert all(dict(model.named_parameters())[name].ndim == 2 for name in groups["matrices"]["names"])

    @pytest.mark.parametrize("granularity", ["row", 8])
    def test_scales_with_two_dimensions_do_not_decay(self, granularity):
        model = fresh_model(scale_granularity=granularity)
        matrices = training.parameter_groups(model, weight_decay=0.1)[0]["params"]
        assert not {id(p) for p in matrices} & {id(m.weight_scale) for m in model.ternary_layers().values()}

    def test_the_full_precision_twin_has_no_scales(self):
        groups = training.parameter_groups(fresh_model(ternary=False))
        assert [group["name"] for group in groups] == ["matrices", "vectors"]

    def test_frozen_parameters_are_left_out(self):
        model = fresh_model()
        model.proj_in.requires_grad_(False)
        grouped = {id(p) for group in training.parameter_groups(model) for p in group["params"]}
        assert id(model.proj_in.weight) not in grouped


class TestAverage:
    def test_average_follows_its_formula_and_leaves_the_model_alone(self):
        model, average = fresh_model(0), fresh_model(1)
        before, start = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state_dict())
        training.update_ema(average, model, 0.9)
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * before[name])
            assert torch.equal(model.state_dict()[name], before[name])

    def test_warmup_forgets_the_first_weights(self):
        assert training.ema_decay(0, 0.9999) == pytest.approx(0.1)
        assert training.ema_decay(90, 0.9999) == pytest.approx(0.91)
        assert training.ema_decay(10**7, 0.9999) == 0.9999


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
        statistics = training.ternary_statistics(model)
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
        assert training.ternary_statistics(model)["near_threshold_share"] == 0.5

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_flips_are_counted_since_the_codes_given(self, granularity):
        model = fresh_model(num_layers=1, scale_granularity=granularity)
        codes = training.packed_codes(model)
        assert training.ternary_statistics(model, codes)["flip_share"] == 0
        total = changed = 0
        for layer in model.ternary_layers().values():
            before = layer.ternary_weight()
            with torch.no_grad():
                layer.weight[0] *= -1  # magnitudes and thresholds stay
            changed += int((before != layer.ternary_weight()).sum())
            total += before.numel()
        assert training.ternary_statistics(model, codes)["flip_share"] == pytest.approx(changed / total)
        assert changed > 0

    def test_the_full_precision_twin_has_no_ternary_statistics(self):
        assert training.ternary_statistics(fresh_model(ternary=False)) == {}

    def test_gates_start_at_the_gain_of_the_adaln_norm(self):
        gates = training.gate_sizes(fresh_model(num_layers=3))
        assert [len(values) for values in gates.values()] == [3, 3]
        assert all(0.03 < value < 0.3 for values in gates.values() for value in values)


class TestFolders:
    def test_a_folder_appears_whole_or_not_at_all(self, tmp_path):
        def fail_half_way():
            with training.new_folder(tmp_path / "x") as partial:
                (partial / "a").write_text("1")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail_half_way()
        assert list(tmp_path.iterdir()) == []

        with training.new_folder(tmp_path / "x") as partial:
            (partial / "a").write_text("1")
            assert not (tmp_path / "x").exists()
        with training.new_folder(tmp_path / "x") as partial:
            (partial / "b").write_text("2")
            assert (tmp_path / "x" / "a").exists()
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["b"]
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_only_whole_checkpoints_are_found_and_the_oldest_go(self, tmp_path):
        for step in (100, 20, 3):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / training.STATE_NAME).write_text("{}")
        (tmp_path / "checkpoint-200.partial").mkdir()
        (tmp_path / "checkpoint-300").mkdir()  # empty
        assert [path.name for path in training.checkpoints(tmp_path)] == [
            "checkpoint-3",
            "checkpoint-20",
            "checkpoint-100",
        ]
        training.rotate_checkpoints(tmp_path, None)
        assert len(training.checkpoints(tmp_path)) == 3
        training.rotate_checkpoints(tmp_path, 2)
        assert [path.name for path in training.checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


class TestCheckpoints:
    def test_training_goes_on_in_the_same_bits(self, tmp_path):
        model, average = fresh_model(), fresh_model()
        optimizer = optimizer_of(model)
        take_steps(model, optimizer, 2)
        training.save_checkpoint(tmp_path / "checkpoint-2", model, average, optimizer, {"step": 2})
        take_steps(model, optimizer, 2, start=2)

        resumed, resumed_average = fresh_model(1), fresh_model(2)
        resumed_optimizer = optimizer_of(resumed)
        state = training.load_checkpoint(tmp_path / "checkpoint-2", resumed, resumed_average, resumed_optimizer)
        assert state == {"step": 2}
        take_steps(resumed, resumed_optimizer, 2, start=2)
        for name, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        for name, value in average.state_dict().items():
            assert torch.equal(value, resumed_average.state_dict()[name]), name

    def test_raw_weights_are_the_models_own_tensors_by_name(self, tmp_path):
        model = fresh_model()
        training.save_checkpoint(tmp_path / "checkpoint-0", model, model, optimizer_of(model), {})
        fresh_model(3).load_state_dict(load_file(tmp_path / "checkpoint-0" / "model.safetensors"))

    def test_a_folder_that_is_no_checkpoint_is_refused(self, tmp_path):
        model = fresh_model()
        with pytest.raises(OSError, match="no checkpoint"):
            training.load_checkpoint(tmp_path, model, model, optimizer_of(model))

    def test_another_models_checkpoint_is_refused(self, tmp_path):
        model, deeper, wider = fresh_model(), fresh_model(num_layers=3), fresh_model(ffn_dim=64)
        training.save_checkpoint(tmp_path / "checkpoint-0", model, model, optimizer_of(model), {})
        with pytest.raises(ValueError, match=r"transformer_blocks\.2"):
            training.load_checkpoint(tmp_path / "checkpoint-0", deeper, deeper, optimizer_of(deeper))
        with pytest.raises(ValueError, match=r"\[32, 16\], the model's is \[64, 16\]"):
            training.load_checkpoint(tmp_path / "checkpoint-0", wider, wider, optimizer_of(wider))


class TestExport:
    def test_float_model_packed_export_and_loaded_pipeline_give_the_same_samples(self, tmp_path):
        model = fresh_model().eval()
        take_steps(model, optimizer_of(model), 3)
        before = copy.deepcopy(model.state_dict())
        exported = training.export_pipeline(model, tmp_path, id2label={i: str(i) for i in range(10)})
        loaded = TerDiTPipeline.from_pretrained(tmp_path)
        trained = TerDiTPipeline(model, training.training_scheduler())
        images = [
            pipe(
                [3, 7], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent"
            ).images
            for pipe in (trained, exported, loaded)
        ]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2])
        assert loaded.transformer.config.weight_format == "packed"
        assert loaded.labels["7"] == 7
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_exporting_again_replaces_the_pipeline_and_keeps_other_files(self, tmp_path):
        (tmp_path / "checkpoint-1").mkdir()
        training.export_pipeline(fresh_model(0), tmp_path)
        training.export_pipeline(fresh_model(1), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint-1",
            "model_index.json",
            "scheduler",
            "transformer",
        ]
        codes = training.packed_codes(fresh_model(1))
        loaded = TerDiTPipeline.from_pretrained(tmp_path).transformer
        for name, layer in loaded.ternary_layers().items():
            assert torch.equal(layer.weight_packed, codes[name])

    def test_scales_stay_float32_in_a_half_precision_export(self, tmp_path):
        model = fresh_model()
        training.export_pipeline(model, tmp_path, dtype=torch.float16)
        dtypes = {
            n: t.dtype for n, t in load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors").items()
        }
        assert {d for n, d in dtypes.items() if n.endswith("weight_scale")} == {torch.float32}
        assert {d for n, d in dtypes.items() if n.endswith("weight_packed")} == {torch.uint8}
        assert dtypes["proj_in.weight"] == torch.float16

    def test_the_full_precision_twin_is_exported_as_it_is(self, tmp_path):
        model = fresh_model(ternary=False)
        training.export_pipeline(model, tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path).transformer
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

    def test_a_model_without_learned_variance_samples_with_the_schedulers_own(self, tmp_path):
        training.export_pipeline(fresh_model(learn_sigma=False), tmp_path)
        pipe = TerDiTPipeline.from_pretrained(tmp_path)
        assert pipe.scheduler.config.variance_type == "fixed_small"
        assert pipe([0], num_inference_steps=2, output_type="latent").images.isfinite().all()
        assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == "DDPMScheduler"
