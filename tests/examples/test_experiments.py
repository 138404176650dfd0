"""examples/experiments: the committed pages, tiny runs of every arm, resuming, what arms differ in."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusers_terdit import TernaryLinear
from diffusers_terdit.models.transformer_terdit import TerDiTRMSNorm
from tiny import randomize


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import adaln_norm  # noqa: E402
import common  # noqa: E402
import worth_it  # noqa: E402
from common import Arm, Records  # noqa: E402


EXPERIMENTS = {"adaln_norm": adaln_norm, "worth_it": worth_it}
ADALN_ARMS = {**adaln_norm.ARMS, **adaln_norm.MORE_ARMS}


def tiny(arm: Arm) -> Arm:
    return replace(arm, size="tiny")


EVERY_ARM = {
    **{f"adaln_norm: {name}": Arm("tiny", **arm) for name, arm in ADALN_ARMS.items()},
    **{f"worth_it: {name}": tiny(arm) for name, arm in worth_it.ALL_ARMS.items()},
}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([1, 500, 999]), torch.tensor([0, 4, 10])


def initialized(arm: Arm) -> nn.Module:
    """A model in which no weight is zero."""
    return randomize(common.build(arm, 0)).eval()


class TestPages:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_the_committed_page_is_what_the_committed_records_render_to(self, name):
        assert EXPERIMENTS[name].render(RESULTS) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_the_plot_is_there_and_small(self, name):
        assert 1000 < (RESULTS / f"{name}.png").stat().st_size < 100_000

    def test_both_pages_use_one_run_of_a_shared_arm(self):
        runs = [{json.dumps(r["run"]): r for r in Records.read(RESULTS / f"{name}.jsonl")} for name in EXPERIMENTS]
        shared = [key for key in runs[0] if key in runs[1]]
        assert any("small_gain" in key for key in shared)
        assert all(runs[0][key] == runs[1][key] for key in shared)

    def test_arms_that_overlap_are_called_so(self):
        low, high = ({"seeds": [{"e": value} for value in numbers]} for numbers in ([1, 2, 3], [4, 5, 6]))
        wide = {"seeds": [{"e": value} for value in (2.5, 9, 9)]}
        assert common.verdict(low, high, "e") == "**better** (-60%)"
        assert common.verdict(high, low, "e") == "**worse** (+150%)"
        assert common.verdict(low, wide, "e").startswith("within the spread")
        assert common.verdict({"seeds": [{"e": math.inf}] * 3}, low, "e") == "not every seed finite"


class TestRuns:
    @pytest.mark.parametrize("name", EVERY_ARM)
    def test_an_arm_trains_and_is_measured(self, name):
        steps = EVERY_ARM[name].steps
        result = common.train(EVERY_ARM[name], 1e-3, seed=0, curve=True)
        assert [point["step"] for point in result["curve"]] == list(range(2, steps + 1, 2))
        keys = ("noise_error", "noise_error_held_out", "frechet_distance", "max_grad_norm")
        assert all(math.isfinite(result[key]) and result[key] > 0 for key in keys)
        assert result == {
            **common.train(EVERY_ARM[name], 1e-3, seed=0, curve=True),
            "cpu_seconds": result["cpu_seconds"],
        }

    def test_training_lowers_the_noise_error(self, monkeypatch):
        monkeypatch.setitem(common.SIZES, "tiny", replace(common.SIZES["tiny"], steps=60))
        assert common.train(Arm("tiny"), 1e-2, seed=0, curve=False)["noise_error_held_out"] < 0.9

    def test_learning_rates_are_screened_and_extended_at_the_edge(self, tmp_path, monkeypatch):
        calls = []

        def train(arm, rate, seed, curve):
            calls.append((rate, seed, curve))
            return {"noise_error_held_out": abs(math.log(rate / 1e-2)), "noise_error": 1.0, "frechet_distance": 1.0}

        monkeypatch.setattr(common, "train", train)
        outcome = common.run_arm(Records(tmp_path / "r.jsonl"), Arm("tiny"))
        assert outcome["learning_rate"] == 8e-3
        assert sorted(outcome["screened"]) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
        assert [call[1:] for call in calls] == [(common.SCREEN_SEED, False)] * 5 + [(s, True) for s in common.SEEDS]

    def test_sampling_of_the_bundled_checkpoint(self):
        from diffusers import DDIMScheduler

        from diffusers_terdit import TerDiTPipeline
        from diffusers_terdit.checkpoints import bundled

        pipe = TerDiTPipeline.from_pretrained(bundled("digits"))
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        judged = common.judge(common.sample(pipe, 100, 10, 1.5))
        assert judged["recognised"] > 0.9
        noise = common.judge(torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        assert noise["frechet_distance"] > 2 * judged["frechet_distance"]


class TestRecords:
    @pytest.fixture
    def small(self, monkeypatch):
        monkeypatch.setattr(adaln_norm, "PARTS", {"one": lambda r: common.run_arm(r, Arm("tiny"))})

    def run(self, folder: Path) -> None:
        common.main("", "adaln_norm", adaln_norm.PARTS, lambda folder, plot: "page", ["--records", str(folder)])

    def test_a_killed_run_goes_on_where_it_was(self, small, tmp_path, monkeypatch):
        train, count = common.train, 0

        def killed(*args):
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            return train(*args)

        monkeypatch.setattr(common, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path)
        path = tmp_path / "adaln_norm.jsonl"
        before = path.read_text()
        assert len(before.splitlines()) == 2
        path.write_text(before + '{"run": {"arm"')  # killed while writing

        self.run(tmp_path)
        after = path.read_text()
        assert after.startswith(before)
        assert all(json.loads(line) for line in after.splitlines())
        done = count
        self.run(tmp_path)
        assert (count, path.read_text()) == (done, after)

    def test_a_run_of_the_other_experiment_is_copied(self, tmp_path):
        Records(tmp_path / "a.jsonl").get({"x": 1}, lambda: {"y": 2})
        other = Records(tmp_path / "b.jsonl", (tmp_path / "a.jsonl",))
        assert other.get({"x": 1}, lambda: pytest.fail("ran again")) == {"y": 2}
        assert Records.read(tmp_path / "a.jsonl") == Records.read(tmp_path / "b.jsonl")

    def test_a_broken_line_in_the_middle_is_an_error_that_names_it(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"run"\n{"run": 1, "result": 2}\n')
        with pytest.raises(ValueError, match=r"a.jsonl, line 1 is not JSON"):
            Records(tmp_path / "a.jsonl")

    def test_everything_that_changes_a_run_is_in_its_definition(self):
        base = common.definition(Arm("64"), 1e-3, 0, True)
        others = [
            common.definition(arm, rate, seed, curve)
            for arm, rate, seed, curve in [
                (Arm("64", scale="row"), 1e-3, 0, True),
                (Arm("64", steps_factor=2.0), 1e-3, 0, True),
                (Arm("128"), 1e-3, 0, True),
                (Arm("64"), 2e-3, 0, True),
                (Arm("64"), 1e-3, 1, True),
                (Arm("64"), 1e-3, 0, False),
            ]
        ]
        assert base not in others

    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_command_line(self, name, capsys, tmp_path):
        module = EXPERIMENTS[name]
        common.main("", name, module.PARTS, module.render, ["--list"])
        assert capsys.readouterr().out.splitlines() == list(module.PARTS)
        with pytest.raises(SystemExit):
            common.main("", name, module.PARTS, module.render, ["--render", str(tmp_path)])
        assert f"has no {name}.jsonl" in capsys.readouterr().err


class TestArms:
    def build(self, name: str):
        return common.build(Arm("tiny", **ADALN_ARMS[name]), 0)

    def test_norms_and_initializations(self):
        def facts(model):
            adaln = model.transformer_blocks[0].adaln
            scale = getattr(adaln.linear, "weight_scale", None)
            return (
                isinstance(adaln.norm, TerDiTRMSNorm) and adaln.norm.weight[0].item(),
                bool(adaln.linear.weight.any()),
                scale is not None and scale.item() == pytest.approx(1 / math.sqrt(0.75 * 16)),
            )

        # gain of the norm, whether adaLN's weight starts non-zero, whether its scale keeps the variance
        assert facts(self.build("reference, RMSNorm")) == (1.0, False, False)
        assert facts(self.build("reference, no norm")) == (False, False, False)
        assert facts(self.build("small gain, RMSNorm")) == (pytest.approx(0.1), True, True)
        assert facts(self.build("small gain, no norm")) == (False, False, True)

    def test_where_layers_are_ternary(self):
        def kinds(name):
            block = self.build(name).transformer_blocks[0]
            return type(block.adaln.linear), type(block.ff.up_proj)

        assert kinds("reference, RMSNorm") == (TernaryLinear, TernaryLinear)
        assert kinds("reference, full-precision adaLN") == (nn.Linear, TernaryLinear)
        assert kinds("full precision") == (nn.Linear, nn.Linear)

    def test_bitnet_has_a_norm_before_every_ternary_layer_and_none_after_adaln(self):
        model = self.build("reference, BitNet layout")
        layers = model.ternary_layers()
        assert len(layers) == 8
        for name in layers:
            before, layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(before, nn.RMSNorm)
            assert before.weight.shape == (layer.in_features,)
        assert isinstance(model.transformer_blocks[0].adaln.norm, nn.Identity)

    def test_arms_of_a_seed_share_their_float_weights(self):
        names = ("ternary, 64", "four levels, 64", "row scales, 64", "absmean scale, 64")
        models = [common.build(tiny(worth_it.ALL_ARMS[name]), 3) for name in names]
        weights = [model.transformer_blocks[0].ff.up_proj.weight for model in models]
        assert all(torch.equal(weight, weights[0]) for weight in weights[1:])

    @pytest.mark.parametrize("name", EVERY_ARM)
    def test_the_exported_model_computes_the_same_but_for_bfloat16(self, name, inputs):
        model = initialized(EVERY_ARM[name])
        dense = common.exported(model)
        assert not any(isinstance(module, TernaryLinear) for module in dense.modules())
        with torch.no_grad():
            expected, got = (m(*inputs, return_dict=False)[0] for m in (model, dense))
        assert 0 < (expected - got).abs().max() < 0.05 * expected.abs().max()

    def test_four_levels(self):
        layer = common.FourLevelLinear(64, 32, bias=False)
        levels, counts = layer.levels().unique(return_counts=True)
        assert levels.tolist() == [-1.5, -0.5, 0.5, 1.5]
        assert counts.min() > 0.8 * counts.max()  # a fresh weight is uniform
        x = torch.randn(500, 64)
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T)
        assert layer(x).std().item() == pytest.approx(1, abs=0.1)
        layer(x).square().sum().backward()
        assert layer.weight.grad.any()
        assert layer.weight_scale.grad.any()

    def test_absmean_scale_is_not_learned(self):
        layer = common.AbsmeanLinear(16, 8, bias=False)
        x = torch.randn(5, 16)
        torch.testing.assert_close(layer(x), x @ (layer.ternary_weight() * layer.weight.abs().mean()).T)
        layer(x).square().sum().backward()
        assert layer.weight.grad.any()
        assert layer.weight_scale.grad is None

    def test_row_scales(self):
        model = common.build(Arm("tiny", scale="row"), 0)
        assert model.transformer_blocks[0].ff.up_proj.weight_scale.shape == (16, 1)

    def test_the_start_goes_to_ternary_by_degrees(self, monkeypatch):
        from diffusers_terdit import training

        strengths, make = [], training.initialize.gradual_ternarization

        def spied(model):
            set_strength = make(model)
            return lambda value: (strengths.append(value), set_strength(value))

        monkeypatch.setattr(training.initialize, "gradual_ternarization", spied)
        monkeypatch.setitem(common.SIZES, "tiny", replace(common.SIZES["tiny"], steps=16))
        common.train(Arm("tiny", full_share=0.5, blend_share=0.5), 1e-3, 0, False)
        assert strengths == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


class TestCosts:
    def test_bytes_are_equal_where_the_page_says_so(self):
        ternary, small = (common.file_bytes(worth_it.ALL_ARMS[n]) for n in ("ternary, 64", "bfloat16, equal bytes"))
        assert small == pytest.approx(ternary, rel=0.005)

    def test_compute_is_equal_where_the_page_says_so(self):
        ternary, small = (
            worth_it.costs(worth_it.ALL_ARMS[name])["training_flops"]
            for name in ("ternary, 64", "bfloat16, equal bytes, equal compute")
        )
        assert small == pytest.approx(ternary, rel=0.001)

    def test_operations_are_those_of_the_matrices(self):
        size = common.SIZES["64"]
        dim = size.num_attention_heads * size.attention_head_dim
        per_token = size.num_layers * (4 * dim * dim + 3 * dim * size.ffn_dim) + 4 * dim + 8 * dim
        per_image = 256 * dim + dim * dim + size.num_layers * 6 * dim * dim + 2 * dim * dim
        matrices = 2 * 3 * (16 * per_token + per_image)  # forward, and two products backward
        assert matrices < 1.05 * common.training_flops("64")
        assert common.training_flops("64") < 1.15 * matrices  # attention


class TestActivations:
    @pytest.fixture
    def small(self, monkeypatch):
        monkeypatch.setattr(adaln_norm, "SHAPE", (2, 256, 1024))

    def test_scale_and_norm_bound_the_outputs(self, small):
        std = {kind: adaln_norm.activations(kind, norm=False)["std"] for kind in adaln_norm.KINDS}
        assert all(0.9 < value < 1.1 for value in std["small gain"])
        assert max(std["reference"]) > 10 * max(std["full precision"])
        normed = adaln_norm.activations("reference", norm=True)
        assert all(0.95 < value < 1.05 for value in normed["std"])
        assert sum(normed["histogram"]) == adaln_norm.DRAWS * 1024


def test_the_records_say_how_each_run_is_defined():
    arms = [record["run"]["arm"] for record in Records.read(RESULTS / "worth_it.jsonl") if "arm" in record["run"]]
    assert all(set(arm) == set(asdict(Arm("64"))) for arm in arms)
