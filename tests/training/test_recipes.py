import copy

import pytest
import torch

from diffusers_terdit import training
from tiny_training import fresh_model


class TestLearningRate:
    def test_warmup_rises_to_the_full_rate(self):
        factors = [training.recipes.learning_rate_factor(step, "constant", 100, warmup_steps=4) for step in range(6)]
        assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])

    def test_wsd_is_flat_and_then_falls_to_nothing(self):
        factors = [
            training.recipes.learning_rate_factor(step, "wsd", 100, decay_steps=20) for step in (0, 79, 80, 90, 99)
        ]
        assert factors == pytest.approx([1, 1, 1, 0.5, 0.05])

    def test_cosine_is_half_at_half_time(self):
        factors = [
            training.recipes.learning_rate_factor(step, "cosine", 110, warmup_steps=10) for step in (10, 60, 109)
        ]
        assert factors == pytest.approx([1, 0.5, 0], abs=1e-3)


class TestPresets:
    def test_each_preset_says_all_that_the_defaults_say(self):
        """The defaults are those of tiny, which must not slip into the recipe of another one."""
        presets = training.recipes.PRESETS
        assert all(presets["tiny"].keys() <= {*preset, "ffn_dim"} for preset in presets.values())
        assert all("ffn_dim" in preset for preset in presets.values())

    @pytest.mark.parametrize("name", ["tiny", "small", "medium", "demo"])
    def test_small_models_know_places_and_have_a_feed_forward_of_three_widths(self, name):
        names = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "pos_embed_type")
        config = {key: training.recipes.PRESETS[name][key] for key in names}
        with torch.device("meta"):
            model = fresh_model(**config)
        widths = {layer.out_features for layer in model.ternary_layers().values()}
        width = config["num_attention_heads"] * config["attention_head_dim"]
        assert config["pos_embed_type"] == "rope+sincos2d"
        assert widths - {width, 6 * width} == {3 * width}


class TestParameterGroups:
    def test_only_matrices_decay_and_scales_are_alone(self):
        model = fresh_model()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {
            group["name"]: {**group, "names": [names[id(p)] for p in group["params"]]}
            for group in training.recipes.parameter_groups(model, weight_decay=0.1, scale_lr_factor=0.5)
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

    def test_muon_takes_the_matrices_of_the_blocks(self):
        model = fresh_model()
        groups = training.recipes.parameter_groups(model, weight_decay=0.1, muon=True)
        assert [(g["name"], g["muon"], g["weight_decay"]) for g in groups][:2] == [
            ("block matrices", True, 0.1),
            ("matrices", False, 0.1),
        ]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        layers = [f"{name}.weight" for name in model.ternary_layers()]
        assert [names[id(p)] for p in groups[0]["params"]] == [n for n in layers if n.startswith("transformer_blocks")]
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(names)

    @pytest.mark.parametrize("granularity", ["row", 8])
    def test_scales_with_two_dimensions_do_not_decay(self, granularity):
        model = fresh_model(scale_granularity=granularity)
        matrices = training.recipes.parameter_groups(model, weight_decay=0.1)[0]["params"]
        assert not {id(p) for p in matrices} & {id(m.weight_scale) for m in model.ternary_layers().values()}

    def test_the_full_precision_baseline_has_no_scales(self):
        groups = training.recipes.parameter_groups(fresh_model(ternary=False))
        assert [group["name"] for group in groups] == ["matrices", "vectors"]

    def test_frozen_parameters_are_left_out(self):
        model = fresh_model()
        model.proj_in.requires_grad_(False)
        grouped = {id(p) for group in training.recipes.parameter_groups(model) for p in group["params"]}
        assert id(model.proj_in.weight) not in grouped


class TestAverage:
    def test_average_follows_its_formula_and_leaves_the_model_alone(self):
        model, average = fresh_model(0), fresh_model(1)
        before, start = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state_dict())
        training.recipes.update_average(average, model, 0.9)
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * before[name])
            assert torch.equal(model.state_dict()[name], before[name])

    def test_warmup_forgets_the_first_weights(self):
        assert training.recipes.average_decay(0, 0.9999) == pytest.approx(0.1)
        assert training.recipes.average_decay(90, 0.9999) == pytest.approx(0.91)
        assert training.recipes.average_decay(10**7, 0.9999) == 0.9999
