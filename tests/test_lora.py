"""LoRA on ternary models through PEFT: frozen packed or float weights and trained adapters."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from huggingface_hub import create_repo, upload_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig
from tiny import randomize


pytest.importorskip("peft")
import peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_terdit.lora import TernaryLoraLinear


FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj", "adaln.linear"]
FORMATS = ["float", "packed"]
both_formats = pytest.mark.parametrize("weight_format", FORMATS)


def config(**kwargs):
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **kwargs})


def adapted(model, seed=0, name="default", **kwargs):
    """The model with an adapter that changes its output."""
    torch.manual_seed(seed)
    model.add_adapter(config(**kwargs), name)
    for key, parameter in model.named_parameters():
        if ".lora_" in key and f".{name}." in key:
            randomize(torch.nn.ParameterList([parameter]), seed)
    return model


INPUTS = {
    "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([7, 307]),
    "class_labels": torch.tensor([0, 3]),
}


@torch.no_grad()
def predict(model, inputs=INPUTS):
    return model(**inputs).sample


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_state(model):
    return {n.replace(".base_layer", ""): t.clone() for n, t in model.state_dict().items() if ".lora_" not in n}


class TestTraining:
    @both_formats
    def test_only_the_adapter_trains_and_the_base_keeps_its_bits(self, tiny_model, weight_format):
        model, inputs = tiny_model(weight_format), INPUTS
        before, expected = frozen_state(model), predict(model, inputs)
        model.add_adapter(config())
        assert torch.equal(predict(model, inputs), expected)  # a fresh adapter adds zero
        assert {name.split(".")[-3] for name in trainable(model)} == {"lora_A", "lora_B"}
        assert len(trainable(model)) == 2 * 8 * 2  # matrices, layers in a block, blocks
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(20):
            loss = (model(**inputs).sample[:, :4] - inputs["hidden_states"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        after = frozen_state(model)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
        )

    @both_formats
    def test_gradient_is_that_of_the_dense_model(self, tiny_model, weight_format):
        gradients = []
        for model in (tiny_model(weight_format), tiny_model(weight_format).dequantize()):
            adapted(model)(**INPUTS).sample.square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        ternary, dense = gradients
        assert ternary.keys() == dense.keys()
        for name, gradient in dense.items():
            torch.testing.assert_close(ternary[name], gradient, rtol=1e-3, atol=1e-6, msg=name)

    def test_gradient_checkpointing_changes_no_gradient(self, tiny_model):
        gradients = []
        for checkpointing in (False, True):
            model = adapted(tiny_model("packed")).train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            model(**INPUTS).sample.square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)

    def test_bfloat16_base_takes_a_float32_adapter(self, tiny_model):
        model = adapted(tiny_model("packed").to(torch.bfloat16))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        expected = predict(adapted(tiny_model("packed")))
        sample = model(**{**INPUTS, "hidden_states": INPUTS["hidden_states"].bfloat16()}).sample
        assert sample.dtype == torch.bfloat16
        torch.testing.assert_close(sample.float(), expected, rtol=0, atol=0.1)
        sample.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_autocast_trains_the_adapter(self, tiny_model):
        model = adapted(tiny_model("packed"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**INPUTS).sample.float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_dense_layers_and_the_label_table_take_part_when_asked(self, tiny_model, tmp_path):
        model = tiny_model("packed")
        base = predict(model)
        adapted(model, target_modules=["to_q", "proj_out", "class_embed"])
        assert {name.split(".lora_")[0] for name in trainable(model)} >= {"proj_out", "class_embed"}
        expected = predict(model)
        model.save_lora_adapter(tmp_path)
        again = tiny_model("packed")
        again.load_lora_adapter(tmp_path)
        assert torch.equal(predict(again), expected)
        again.unload_lora()
        assert torch.equal(predict(again), base)


class TestManaging:
    @both_formats
    def test_saved_adapter_computes_the_same_again(self, tiny_model, tmp_path, weight_format):
        model = adapted(tiny_model(weight_format))
        model.save_lora_adapter(tmp_path)
        assert {name.split(".lora_")[1] for name in load_file(tmp_path / FILE)} == {"A.weight", "B.weight"}
        for again in (tiny_model(weight_format), tiny_model("packed")):
            again.load_lora_adapter(tmp_path, adapter_name="style")
            assert list(again.peft_config) == ["style"]
            assert torch.equal(predict(again), predict(model))

    def test_adapter_comes_from_the_hub(self, tiny_model, tmp_path, fake_hub):
        model = adapted(tiny_model("packed"))
        model.save_lora_adapter(tmp_path)
        create_repo("user/style", token=fake_hub.token)
        upload_folder(repo_id="user/style", folder_path=tmp_path, token=fake_hub.token)
        again = tiny_model("packed")
        again.load_lora_adapter("user/style")
        assert torch.equal(predict(again), predict(model))

    def test_adapter_as_tensors_and_under_a_prefix(self, tiny_model, tmp_path):
        model = adapted(tiny_model("packed"), lora_alpha=3)  # without metadata the host takes alpha = rank
        model.save_lora_adapter(tmp_path)
        tensors = load_file(tmp_path / FILE)
        for prefix in (None, "transformer"):
            again = tiny_model("packed")
            named = {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in tensors.items()}
            again.load_lora_adapter(named, prefix=prefix)
            assert torch.equal(predict(again), predict(model))

    @pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning")
    @both_formats
    def test_disable_enable_set_scale_delete_unload(self, tiny_model, weight_format):
        model = tiny_model(weight_format)
        base = predict(model)
        one = predict(adapted(model, 1, "one"))
        two = predict(adapted(model, 2, "two"))
        assert model.active_adapters() == ["two"]
        assert len({t.sum().item() for t in (base, one, two)}) == 3
        model.set_adapter("one")
        assert torch.equal(predict(model), one)
        model.disable_adapters()
        assert torch.equal(predict(model), base)
        model.enable_adapters()
        assert torch.equal(predict(model), one)
        model.set_adapters(["one", "two"], [0.5, 0.0])
        half = predict(model)
        assert not torch.equal(half, one)
        model.set_adapters("one", 0.0)
        torch.testing.assert_close(predict(model), base)
        model.set_adapters("one", 0.5)
        torch.testing.assert_close(predict(model), half)
        model.delete_adapters("one")
        assert list(model.peft_config) == ["two"]
        model.set_adapters("two", 1.0)
        assert torch.equal(predict(model), two)
        model.delete_adapters("two")
        assert torch.equal(predict(model), base)
        adapted(model, 1, "one")
        model.unload_lora()
        assert not any(isinstance(module, TernaryLoraLinear) for module in model.modules())
        assert torch.equal(predict(model), base)
        assert torch.equal(predict(adapted(model, 1, "one")), one)

    def test_copies_and_pickles_keep_the_adapter(self, tiny_model):
        model = adapted(tiny_model("packed"))
        expected = predict(model)
        assert torch.equal(predict(copy.deepcopy(model)), expected)
        assert torch.equal(predict(pickle.loads(pickle.dumps(model))), expected)

    def test_packing_a_float_model_keeps_its_adapter(self, tiny_model):
        model = adapted(tiny_model())
        expected = predict(model)
        assert torch.equal(predict(model.pack()), expected)
        assert torch.equal(predict(model.unpack()), expected)

    def test_hotswap_puts_one_adapter_in_the_place_of_another(self, tiny_model, tmp_path):
        expected = {}
        for seed in (1, 2):
            model = adapted(tiny_model("packed"), seed)
            expected[seed] = predict(model)
            model.save_lora_adapter(tmp_path / str(seed))
        model = tiny_model("packed")
        model.load_lora_adapter(tmp_path / "1", adapter_name="style")
        assert torch.equal(predict(model), expected[1])
        model.load_lora_adapter(tmp_path / "2", adapter_name="style", hotswap=True)
        assert torch.equal(predict(model), expected[2])

    def test_integer_activations_are_set_as_without_an_adapter(self, tiny_model):
        plain, model = tiny_model("packed"), adapted(tiny_model("packed"))
        for one in (plain, model):
            try:
                one.set_activation_bits(8)
            except ImportError:
                pytest.skip("no numba")
        layers = {name.replace(".base_layer", ""): str(layer) for name, layer in model.ternary_layers().items()}
        assert layers == {name: str(layer) for name, layer in plain.ternary_layers().items()}
        assert all(any(f"computes with {bits} bits" in layer for layer in layers.values()) for bits in (8, 16))

    def test_pipeline_samples_with_the_adapter(self, tiny_pipeline):
        pipe = tiny_pipeline(weight_format="packed")
        # A callback, as offloading, has adaLN computed step by step: otherwise the last bits may differ.
        options = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": lambda *args: args[3]}

        def sample():
            return pipe([1, 2], generator=torch.Generator().manual_seed(0), **options).images

        plain = sample()
        adapted(pipe.transformer)
        with_adapter = sample()
        assert not torch.allclose(with_adapter, plain)
        pipe.enable_model_cpu_offload(device="cpu")
        torch.testing.assert_close(sample(), with_adapter, rtol=1e-5, atol=1e-5)
        pipe.transformer.disable_adapters()
        torch.testing.assert_close(sample(), plain, rtol=1e-5, atol=1e-5)

    def test_group_offloading_takes_an_adapter(self, tiny_model, tmp_path):
        expected = adapted(tiny_model("packed"))
        expected.save_lora_adapter(tmp_path)
        model = tiny_model("packed")
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
        model.load_lora_adapter(tmp_path)
        for _ in range(2):
            assert torch.equal(predict(model), predict(expected))

    @pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
    def test_layerwise_casting_leaves_the_adapter_alone(self, tiny_model, storage):
        model = adapted(tiny_model("packed"))
        expected = predict(model)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
        torch.testing.assert_close(predict(model), expected, rtol=0, atol=0.2)


class TestNewClasses:
    def test_old_labels_and_the_null_label_keep_their_outputs(self, tiny_model, tiny_inputs, tmp_path):
        model, inputs = tiny_model("packed"), {**tiny_inputs(11), "class_labels": torch.arange(11)}
        before = predict(model, inputs)
        assert model.add_classes(2) is model
        assert model.config.num_classes == 12
        assert model.class_embed.weight.requires_grad
        inputs["class_labels"][10] = 12
        assert torch.equal(predict(model, inputs), before)
        for new in (10, 11):
            inputs["class_labels"][10] = new
            assert torch.equal(predict(model, inputs), before)
        model.save_pretrained(tmp_path)
        assert TerDiTTransformer2DModel.from_pretrained(tmp_path).class_embed.num_embeddings == 13
        assert model.remove_classes(2) is model
        plain = tiny_model("packed").state_dict()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())

    def test_a_new_row_trains_alone_and_travels_with_the_adapter(self, tiny_model, tiny_inputs, tmp_path):
        model = tiny_model("packed").add_classes(1)
        adapted(model, trainable_token_indices={"class_embed": [10]})
        assert [name for name in trainable(model) if "class_embed" in name] == [
            "class_embed.token_adapter.trainable_tokens_delta.default"
        ]
        with torch.no_grad():
            model.class_embed.token_adapter.trainable_tokens_delta["default"].add_(1.0)
        inputs = tiny_inputs(3) | {"class_labels": torch.tensor([10, 3, 11])}
        expected = predict(model, inputs)
        model.save_lora_adapter(tmp_path)
        again = tiny_model("packed").add_classes(1)
        base = predict(again, inputs)
        again.load_lora_adapter(tmp_path)
        assert torch.equal(predict(again, inputs), expected)
        again.disable_adapters()
        assert torch.equal(predict(again, inputs), base)
        again.enable_adapters()
        again.unload_lora()
        assert torch.equal(predict(again, inputs), base)
        assert again.state_dict().keys() == tiny_model("packed").state_dict().keys()
        again.load_lora_adapter(tmp_path, adapter_name="second")
        assert torch.equal(predict(again, inputs), expected)
        again.delete_adapters("second")
        assert torch.equal(predict(again, inputs), base)


LATENTS = {"num_inference_steps": 2, "output_type": "latent", "callback_on_step_end": lambda *args: args[3]}


class TestPipeline:
    @pytest.fixture
    def make(self, tiny_pipeline):
        return lambda **options: tiny_pipeline(weight_format="packed", **options)

    @pytest.fixture
    def taught(self, make, tmp_path):
        """`taught("frog", ...)`: saves an adapter with these new classes; returns its folder and their latents."""

        def teach(*names, seed=1):
            pipe = make()
            pipe.transformer.add_classes(len(names))
            rows = list(range(10, 10 + len(names)))
            pipe.register_to_config(id2label={**pipe.config.id2label, **dict(zip(map(str, rows), names, strict=True))})
            adapted(pipe.transformer, seed, trainable_token_indices={"class_embed": rows})
            with torch.no_grad():
                pipe.transformer.class_embed.token_adapter.trainable_tokens_delta["default"].add_(seed)
            pipe.save_lora_weights(tmp_path / names[0])
            return tmp_path / names[0], sample(pipe, list(names))

        return teach

    def test_one_line_loads_an_adapter_with_its_classes_and_unloading_leaves_nothing(self, make, taught):
        folder, expected = taught("frog", "octopus")
        pipe = make()
        before, names, old = copy.deepcopy(pipe.transformer.state_dict()), pipe.config.id2label, sample(pipe, [3])
        pipe.load_lora_weights(folder, adapter_name="animals")
        assert (pipe.labels["frog"], pipe.labels["octopus"]) == (10, 11)
        assert torch.equal(sample(pipe, ["frog", "octopus"]), expected)
        assert pipe.get_active_adapters() == ["animals"]
        assert pipe.get_list_adapters() == {"transformer": ["animals"]}
        pipe.save_lora_weights(folder.with_name("again"))  # of a pipeline that has loaded it
        again = make()
        again.load_lora_weights(folder.with_name("again"))
        assert torch.equal(sample(again, ["frog", "octopus"]), expected)
        pipe.set_adapters("animals", 0.5)
        assert not torch.equal(sample(pipe, ["frog", "octopus"]), expected)
        pipe.disable_lora()
        torch.testing.assert_close(sample(pipe, [3]), old)
        pipe.enable_lora()
        pipe.unload_lora_weights()
        assert pipe.config.id2label == names
        assert pipe.transformer.config.num_classes == 10
        after = pipe.transformer.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        pipe.load_lora_weights(str(folder))
        assert torch.equal(sample(pipe, ["frog", "octopus"]), expected)

    def test_classes_of_several_adapters_get_ids_of_their_own(self, make, taught):
        (first, frog), (second, penguin) = taught("frog"), taught("penguin", seed=2)
        pipe = make()
        pipe.load_lora_weights(first, adapter_name="first")
        pipe.load_lora_weights(second, adapter_name="second")
        assert (pipe.labels["frog"], pipe.labels["penguin"]) == (10, 11)
        assert torch.equal(sample(pipe, ["penguin"]), penguin)
        pipe.set_adapters("first")
        assert torch.equal(sample(pipe, ["frog"]), frog)
        pipe.set_adapters(["first", "second"])
        assert sample(pipe, ["frog", "penguin"]).isfinite().all()
        pipe.delete_adapters("first")
        assert torch.equal(sample(pipe, ["penguin"]), penguin)
        pipe.unload_lora_weights()
        assert pipe.transformer.config.num_classes == 10
        assert pipe.labels == make().labels

    def test_an_adapter_without_classes_goes_with_one_that_has_some(self, make, taught, tmp_path):
        folder, frog = taught("frog")
        adapted(make().transformer, 3).save_lora_adapter(tmp_path / "style")
        pipe = make()
        pipe.load_lora_weights(folder, adapter_name="frog")
        pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
        plain = make()
        plain.load_lora_weights(tmp_path / "style")
        assert torch.equal(sample(pipe, [1, 2]), sample(plain, [1, 2]))
        pipe.set_adapters(["frog", "style"], [1.0, 0.0])
        torch.testing.assert_close(sample(pipe, ["frog"]), frog)
        pipe.set_adapters("style")
        assert torch.equal(sample(pipe, [1, 2]), sample(plain, [1, 2]))
        pipe.set_adapters("frog")
        pipe.delete_adapters("style")
        assert torch.equal(sample(pipe, ["frog"]), frog)

    def test_a_class_that_the_model_knows_keeps_its_id(self, make, taught):
        folder, expected = taught("frog")
        pipe = make()
        pipe.transformer.add_classes(2)
        pipe.register_to_config(id2label={**pipe.config.id2label, "11": "frog"})
        pipe.load_lora_weights(folder)
        assert (pipe.labels["frog"], pipe.transformer.config.num_classes) == (11, 12)
        assert torch.equal(sample(pipe, ["frog"]), expected)
        pipe.unload_lora_weights()
        assert (pipe.labels["frog"], pipe.transformer.config.num_classes) == (11, 12)

    @pytest.mark.parametrize("prefix", ["", "transformer."])
    def test_plain_adapters_of_peft_and_diffusers(self, make, prefix):
        pipe = make()
        adapted(pipe.transformer, lora_alpha=3)  # without settings the host takes alpha = rank
        expected = sample(pipe, [1, 2])
        tensors = {f"{prefix}{key}": t for key, t in get_peft_model_state_dict(pipe.transformer).items()}
        again = make()
        again.load_lora_weights(tensors, adapter_name="style")
        assert torch.equal(sample(again, [1, 2]), expected)

    def test_adapters_come_from_the_hub_and_go_to_a_named_file(self, make, tmp_path, fake_hub):
        pipe = make()
        adapted(pipe.transformer)
        pipe.save_lora_weights(tmp_path, weight_name="style.safetensors")
        create_repo("user/style", token=fake_hub.token)
        upload_folder(repo_id="user/style", folder_path=tmp_path, token=fake_hub.token)
        again = make()
        again.load_lora_weights("user/style", weight_name="style.safetensors")
        assert torch.equal(sample(again, [1]), sample(pipe, [1]))

    def test_an_adapter_that_is_refused_leaves_the_pipeline_as_it_was(self, make, taught):
        folder, _ = taught("frog")
        data = (folder / FILE).read_bytes()
        pipe = make()
        before = copy.deepcopy(pipe.transformer.state_dict())
        tensors, rows = load_file(folder / FILE), "class_embed.token_adapter.trainable_tokens_delta"
        for change, error in (
            (
                lambda: (folder / FILE).write_bytes(data.replace(b'\\"frog', b'\\"grog', 1)),
                "not those that were saved",
            ),
            (
                lambda: changed_settings(folder, trainable_token_indices={"class_embed": [*range(10, 10**6)]}),
                "999990 row",
            ),
            (lambda: changed_settings(folder, trainable_token_indices={"class_embed": [10]}, r=4), "rank is 4"),
            (
                lambda: save_file({**tensors, rows: torch.ones(1, 7)}, folder / FILE, metadata_of(folder)),
                "digest|shape",
            ),
        ):
            change()
            with pytest.raises(ValueError, match=error):
                pipe.load_lora_weights(folder)
            (folder / FILE).write_bytes(data)
            assert pipe.transformer.config.num_classes == 10
            assert "frog" not in pipe.labels
            after = pipe.transformer.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        pipe.load_lora_weights(folder)

    @pytest.mark.parametrize("classes", ["[1]", '{"10": 1}', '{"x": "frog"}', "{"])
    def test_names_that_are_none(self, make, taught, classes):
        folder, _ = taught("frog")
        save_file(load_file(folder / FILE), folder / FILE, {**metadata_of(folder), "terdit.classes": classes})
        with pytest.raises(ValueError, match=r"adapter's classes are|are no JSON"):
            make().load_lora_weights(folder)

    def test_fusing_is_refused_for_ternary_layers_and_keeps_new_classes_of_others(self, make, taught, tiny_pipeline):
        folder, _ = taught("frog")
        pipe = make()
        pipe.load_lora_weights(folder)
        with pytest.raises(ValueError, match="no longer ternary"):
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        dense = TerDiTPipeline(pipe.transformer.dequantize(), pipe.scheduler, id2label=pipe.config.id2label)
        dense.set_progress_bar_config(disable=True)
        dense.load_lora_weights(folder)
        expected = sample(dense, ["frog"])
        dense.fuse_lora()
        dense.unload_lora_weights()
        torch.testing.assert_close(sample(dense, ["frog"]), expected, rtol=1e-3, atol=1e-4)


def sample(pipe, labels):
    return pipe(labels, generator=torch.Generator().manual_seed(0), **LATENTS).images


def metadata_of(folder):
    with safe_open(folder / FILE, framework="pt") as file:
        return file.metadata()


class TestFusing:
    @both_formats
    @pytest.mark.parametrize("safe", [False, True])
    def test_fusing_into_ternary_weights_is_refused_and_changes_nothing(self, tiny_model, weight_format, safe):
        model = adapted(tiny_model(weight_format), target_modules=[*TARGETS, "proj_in"])
        expected = predict(model)
        with pytest.raises(ValueError, match=r"no longer ternary.*model\.dequantize\(\)"):
            model.fuse_lora(safe_fusing=safe)
        layer = next(module for module in model.modules() if isinstance(module, TernaryLoraLinear))
        with pytest.raises(ValueError, match="no longer ternary"):
            layer.merge(safe_merge=safe)
        assert torch.equal(predict(model), expected)

    def test_the_way_out_is_a_dense_copy(self, tiny_model, tmp_path):
        model = adapted(tiny_model("packed"))
        model.save_lora_adapter(tmp_path / "adapter")
        expected = predict(model)
        with pytest.raises(ValueError, match=r"carries adapters, \['default'\].*unload_lora"):
            model.dequantize()
        model.unload_lora()
        dense = model.dequantize()
        dense.load_lora_adapter(tmp_path / "adapter")
        torch.testing.assert_close(predict(dense), expected, rtol=1e-4, atol=1e-5)
        dense.fuse_lora()
        dense.unload_lora()
        dense.save_pretrained(tmp_path / "dense")
        fused = TerDiTTransformer2DModel.from_pretrained(tmp_path / "dense")
        assert not any(".lora_" in name for name in fused.state_dict())
        torch.testing.assert_close(predict(fused), expected, rtol=1e-4, atol=1e-5)

    def test_dense_model_fuses_and_unfuses_as_ever(self, tiny_model):
        model = adapted(tiny_model(ternary=False))
        expected = predict(model)
        model.fuse_lora()
        torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-5)
        model.unfuse_lora()
        torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-5)

    def test_a_pipeline_with_adapters_is_not_saved(self, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline(weight_format="packed")
        adapted(pipe.transformer)
        with pytest.raises(ValueError, match="save_lora_adapter"):
            pipe.save_pretrained(tmp_path)
        pipe.transformer.unload_lora()
        pipe.save_pretrained(tmp_path)
        TerDiTPipeline.from_pretrained(tmp_path)


class TestRefusals:
    @both_formats
    @pytest.mark.parametrize(
        "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str
    )
    def test_what_reads_the_dense_weight_changes_nothing(self, tiny_model, weight_format, options):
        model = tiny_model(weight_format)
        expected = predict(model)
        with pytest.raises(ValueError, match="reads a dense weight"):
            model.add_adapter(config(**options))
        assert torch.equal(predict(adapted(model)), predict(adapted(tiny_model(weight_format))))
        model.unload_lora()
        assert torch.equal(predict(model), expected)

    def test_dense_model_takes_dora(self, tiny_model, tmp_path):
        model = adapted(tiny_model(ternary=False), use_dora=True)
        assert predict(model).isfinite().all()
        model.save_lora_adapter(tmp_path)
        again = tiny_model(ternary=False)
        again.load_lora_adapter(tmp_path)
        assert torch.equal(predict(again), predict(model))
        for given in (tmp_path, load_file(tmp_path / FILE)):  # with and without the settings of the adapter
            with pytest.raises(ValueError, match="use_dora: reads a dense weight"):
                tiny_model("packed").load_lora_adapter(given)

    def test_adapter_of_a_deeper_model_is_refused_by_layer(self, tiny_model, tmp_path):
        adapted(tiny_model("packed", num_layers=3)).save_lora_adapter(tmp_path)
        model = tiny_model("packed")
        expected = predict(model)
        with pytest.raises(ValueError, match=r"`transformer_blocks\.2\..*does not have"):
            model.load_lora_adapter(tmp_path)
        assert torch.equal(predict(model), expected)


def changed_settings(folder, **changes):
    """Write an adapter's file again with other settings, and everything else as it is."""
    tensors = load_file(folder / FILE)
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = file.metadata()
    metadata.pop("terdit.config")
    settings = json.loads(metadata["lora_adapter_metadata"])
    metadata["lora_adapter_metadata"] = json.dumps({**settings, **changes})
    save_file(tensors, folder / FILE, metadata)


class TestStrangersFiles:
    @pytest.fixture
    def adapter(self, tiny_model, tmp_path):
        adapted(tiny_model("packed"), target_modules=["to_q"]).save_lora_adapter(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        "name",
        [
            "proj_out.bias", "class_embed.weight", "norm_out.linear.weight",
            *(f"transformer_blocks.0.attn.{n}" for n in ("to_q.weight_scale", "to_q.base_layer.weight_scale")),
            *(f"transformer_blocks.0.attn.{n}" for n in ("to_q.base_layer.weight_packed", "to_k.weight_packed")),
        ],
    )  # fmt: skip
    def test_a_weight_of_the_model_is_no_part_of_an_adapter(self, tiny_model, adapter, name):
        """PEFT would put it in the place of the model's own, where it stays after `unload_lora`."""
        model = tiny_model("packed")
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        own = before[name.replace(".base_layer", "")]
        save_file({**load_file(adapter / FILE), name: torch.full_like(own, 3)}, adapter / FILE, {"format": "pt"})
        with pytest.raises(ValueError, match=f"take LoRA adapters, got a tensor `{name}` in {adapter}"):
            model.load_lora_adapter(adapter)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_numbers_that_are_not_finite(self, tiny_model, adapter, value):
        tensors = load_file(adapter / FILE)
        next(iter(tensors.values()))[0, 0] = value
        with pytest.raises(ValueError, match=r"the adapter: tensor `.*lora_.*` holds NaN or infinity"):
            tiny_model("packed").load_lora_adapter(tensors)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn])
    def test_another_dtype(self, tiny_model, adapter, dtype):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / FILE).items()}
        with pytest.raises(ValueError, match=f"is {dtype}, expected float32"):
            tiny_model("packed").load_lora_adapter(tensors)

    def test_every_flipped_bit_of_the_tensors_is_found(self, tiny_model, adapter):
        data = (adapter / FILE).read_bytes()
        start, random = 8 + int.from_bytes(data[:8], "little"), np.random.default_rng(0)
        model = tiny_model("packed")
        for place in random.integers(start, len(data), 30):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(random.integers(8))
            (adapter / FILE).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"do not match the digest|NaN or infinity"):
                model.load_lora_adapter(adapter)
            assert not getattr(model, "peft_config", None)

    def test_settings_that_are_not_those_that_were_saved(self, tiny_model, adapter):
        data = (adapter / FILE).read_bytes()
        (adapter / FILE).write_bytes(data.replace(b'lora_alpha\\": 6', b'lora_alpha\\": 7', 1))
        with pytest.raises(ValueError, match="settings are not those that were saved"):
            tiny_model("packed").load_lora_adapter(adapter)

    def test_without_settings_alpha_is_the_rank_and_said_to_be(self, tiny_model, adapter, caplog):
        save_file(load_file(adapter / FILE), adapter / FILE)
        model = tiny_model("packed")
        model.load_lora_adapter(adapter)
        assert "alpha is taken to be the rank" in caplog.text
        assert next(iter(model.peft_config.values())).lora_alpha == 3

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("target_modules", r"(\w+\.?)+!"),
            ("exclude_modules", [r"(\w+\.?)+!"]),
            ("rank_pattern", {r"(\w+\.?)+!": 2}),
            ("rank_pattern", {"to_q": "2"}),
            ("r", "3"),
            ("r", 0),
            ("lora_alpha", None),
            ("megatron_config", {}),  # PEFT would import a module that the file names
            ("layer_replication", [[0, 2]]),
            ("from_the_future", 1),
        ],
    )
    def test_odd_settings(self, tiny_model, adapter, name, value):
        """Regular expressions that take hours, other types, and settings that change more than the layers named."""
        changed_settings(adapter, **{name: value})
        with pytest.raises(ValueError, match=rf"{adapter}: the adapter has {name}=.*Save it again"):
            tiny_model("packed").load_lora_adapter(adapter)

    @pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", "3"])
    def test_settings_that_are_no_object(self, tiny_model, adapter, text):
        save_file(load_file(adapter / FILE), adapter / FILE, {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=f"{adapter}: the adapter's settings are"):
            tiny_model("packed").load_lora_adapter(adapter)

    def test_a_pickle_is_not_read(self, tiny_model, adapter):
        torch.save(load_file(adapter / FILE), adapter / "pytorch_lora_weights.bin")
        for options in ({"weight_name": "pytorch_lora_weights.bin"}, {"use_safetensors": False}):
            with pytest.raises(ValueError, match="from safetensors only"):
                tiny_model("packed").load_lora_adapter(adapter, **options)


OTHER_KINDS = {
    "LoKr": {"r": 2},
    "LoHa": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 4},
    "HRA": {"r": 2},
    "AdaLora": {"total_step": 10},
}


def of_another_kind(kind, targets):
    return getattr(peft, f"{kind}Config")(target_modules=targets, **OTHER_KINDS[kind])


def ternarized_sd3():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    return TernaryConfig().quantize(model).eval()


BASES = ["packed", "float", "full precision", "SD3"]


@pytest.mark.parametrize(
    ("base", "targets", "kind"),
    [
        *[(base, targets, "LoKr") for base in BASES for targets in (["to_q"], ["proj_out"])],
        *[("packed", ["to_q"], kind) for kind in OTHER_KINDS if kind != "LoKr"],
    ],
)
class TestOtherKinds:
    """Adapters that are not LoRA are refused before anything is changed, also where no ternary layer takes part."""

    @pytest.fixture
    def model(self, base, tiny_model):
        if base == "SD3":
            return ternarized_sd3()
        return tiny_model(ternary=False) if base == "full precision" else tiny_model(base)

    @pytest.fixture
    def unchanged(self, base, model):
        """Raises where type, tensors or output of the model differ from what they were."""
        inputs = INPUTS
        if base == "SD3":
            generator = torch.Generator().manual_seed(0)
            shapes = {
                "hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 3, 16), "pooled_projections": (1, 16)
            }  # fmt: skip
            inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            inputs["timestep"] = torch.tensor([500.0])
        cls, before, expected = type(model), copy.deepcopy(model.state_dict()), predict(model, inputs)
        trained = trainable(model)

        def check():
            assert type(model) is cls
            assert not getattr(model, "peft_config", None)
            assert trainable(model) == trained
            after = model.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
            assert torch.equal(predict(model, inputs), expected)

        return check

    def test_adding(self, model, unchanged, kind, targets):
        with pytest.raises(ValueError, match=rf"take LoRA adapters, got {kind}Config.*LoraConfig"):
            model.add_adapter(of_another_kind(kind, targets))
        unchanged()

    @pytest.mark.filterwarnings("ignore::UserWarning:peft")
    def test_loading(self, model, base, unchanged, kind, targets, tiny_model, tmp_path):
        dense = ternarized_sd3().dequantize() if base == "SD3" else tiny_model(ternary=False)
        settings = of_another_kind(kind, targets)
        peft.inject_adapter_in_model(settings, dense, "default")
        tensors = get_peft_model_state_dict(dense, adapter_name="default")
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings.to_dict(), default=list)}
        save_file(tensors, tmp_path / FILE, metadata)
        with pytest.raises(ValueError, match=r"take LoRA adapters, got a tensor `.*LoraConfig"):
            model.load_lora_adapter(tmp_path, prefix=None)
        unchanged()
        save_file(tensors, tmp_path / FILE, {"format": "pt"})
        with pytest.raises(ValueError, match=r"take LoRA adapters, got a tensor `.*LoraConfig"):
            model.load_lora_adapter(tmp_path, prefix=None)
        unchanged()
        with pytest.raises(ValueError, match=r"take LoRA adapters, got a tensor `.*LoraConfig"):
            model.load_lora_adapter({f"transformer.{name}": t for name, t in tensors.items()}, prefix="transformer")
        unchanged()


class TestContactWithTheHost:
    def test_peft_takes_custom_layers(self):
        assert callable(LoraConfig(target_modules=["x"])._register_custom_module)

    def test_other_threads_load_into_models_of_diffusers_meanwhile(self, tiny_model, tmp_path):
        adapted(tiny_model("packed")).save_lora_adapter(tmp_path / "ours")
        expected = predict(adapted(tiny_model("packed")))
        dense = ternarized_sd3().dequantize()
        dense.add_adapter(config(target_modules=["to_q"]))
        dense.save_lora_adapter(tmp_path / "theirs")
        ours = [tiny_model("packed") for _ in range(4)]
        theirs = [ternarized_sd3().dequantize() for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            loads = [
                threads.submit(model.load_lora_adapter, tmp_path / folder, prefix=None, weight_name=FILE)
                for pair in zip(ours, theirs, strict=True)
                for model, folder in zip(pair, ("ours", "theirs"), strict=True)
            ]
        assert [load.result() for load in loads] == [None] * 8
        assert all(list(model.peft_config) == ["default_0"] for model in (*ours, *theirs))
        assert all(torch.equal(predict(model), expected) for model in ours)
