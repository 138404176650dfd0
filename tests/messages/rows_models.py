"""The network, the pipeline, ternary layers in other models, adapters."""

from functools import partial

import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler, FasterCacheConfig, FlowMatchEulerDiscreteScheduler
from message_table import TINY, WEIGHTS, Fixed, Row, changed, dit, edit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig, lora, quantization
from diffusers_terdit.ops import reference
from diffusers_terdit.pipelines.schedulers import default_scheduler
from diffusers_terdit.quantization import TernaryQuantizer


X, T, Y = torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
Q = "transformer_blocks.0.attn1.to_q"
SHORT = {"num_inference_steps": 1, "guidance_scale": 1.0}
SIZES = [
    ("num_layers", -1), ("num_attention_heads", 0), ("patch_size", 0), ("sample_size", None), ("num_classes", -3),
    ("in_channels", 0), ("num_key_value_heads", 0), ("num_layers", "2"),
]  # fmt: skip
CONFIG = {"quant_method": "ternary", "scale_granularity": "column", "version": "1"}


def new(**changes):
    return lambda w: TerDiTTransformer2DModel(**{**TINY, **changes})


def decoded_in_float32_on_a_gpu(w):
    model = w.model("packed")
    w.monkeypatch.setattr(TerDiTTransformer2DModel, "device", torch.device("cuda"))
    model.set_decoded_budget(100)


def graphs_of_an_offloaded_model(w):
    model = w.model()
    w.monkeypatch.setattr(TerDiTTransformer2DModel, "device", torch.device("cuda"))
    cpu_offload(model)
    model.cuda_graphs().__enter__()


def forward(*inputs):
    return lambda w: w.model()(*inputs)


def call(class_labels=0, **options):
    return lambda w: w.pipe()(class_labels, **{**SHORT, **options})


def add(kind="LoraConfig", **options):
    """A model with an adapter of `to_q`."""
    return lambda w: with_adapter(w, kind, **options)


def with_adapter(w, kind="LoraConfig", **options):
    import peft

    model = w.model()
    model.add_adapter(getattr(peft, kind)(**{"target_modules": ["to_q"], **options}))
    return model


def merge(w):
    next(module for module in with_adapter(w).modules() if isinstance(module, lora.TernaryLoraLinear)).merge()


def saved_adapter(w, **changes):
    """The tensors of an adapter of `to_q`, changed."""
    with_adapter(w, r=2).save_lora_adapter(w.tmp / "lora")
    return edit(w.tmp / "lora" / "pytorch_lora_weights.safetensors", **changes).parent


LORA = "transformer_blocks__0__attn__to_q__lora_{}__weight"


def load_adapter(**changes):
    return lambda w: w.model().load_lora_adapter(saved_adapter(w, **changes))


def load_settings(w, text, keep=False):
    """Load an adapter whose settings say `text`; those that are compared with them are kept, or not."""
    file = saved_adapter(w) / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        saved = {"terdit.config": opened.metadata()["terdit.config"]} if keep else {}
    save_file(load_file(file), file, {**saved, "lora_adapter_metadata": text})
    w.model().load_lora_adapter(file.parent)


def with_classes(**changes):
    """Load an adapter with a new class whose file has another entry in its metadata."""

    def provoke(w):
        taught(w).save_lora_weights(w.tmp)
        file = w.tmp / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as opened:
            saved = {key: value for key, value in opened.metadata().items() if key != "terdit.config"}
        save_file(load_file(file), file, {**saved, **{k.replace("__", "."): v for k, v in changes.items()}})
        w.pipe().load_lora_weights(w.tmp)

    return provoke


def taught(w):
    """A pipeline with a new class, row 4, that an adapter has learned."""
    import peft

    pipe = w.pipe()
    pipe.transformer.add_classes(1)
    pipe.register_to_config(id2label={"4": "new"})
    rows = {"class_embed": [4]}
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], trainable_token_indices=rows))
    return pipe


def rows_without_names(w):
    taught(w).save_lora_weights(w.tmp / "named")
    taught(w).transformer.save_lora_adapter(w.tmp / "unnamed")
    pipe = w.pipe()
    pipe.load_lora_weights(w.tmp / "named", adapter_name="a")
    pipe.load_lora_weights(w.tmp / "unnamed", adapter_name="b")


def offloaded(w):
    from accelerate.hooks import ModelHook, add_hook_to_module

    taught(w).save_lora_weights(w.tmp / "named")
    pipe = w.pipe()
    add_hook_to_module(pipe.transformer.class_embed, ModelHook())
    pipe.load_lora_weights(w.tmp / "named")


def no_safetensors(w):
    (w.tmp / "pytorch_lora_weights.safetensors").write_bytes(b"nothing")
    w.model().load_lora_adapter(w.tmp)


def no_peft(w):
    w.monkeypatch.setattr(lora, "is_peft_available", lambda: False)
    w.model().add_adapter(None)


def on_a_file(save):
    """Save to where a file is."""

    def provoke(w):
        (w.tmp / "file").touch()
        save(w).save_pretrained(w.tmp / "file")

    return provoke


def broken(layer, **options):
    """Sample with a pipeline one of whose layers has a bias of NaN."""

    def provoke(w):
        pipe = w.pipe(**{key: getattr(w, key) if value is True else value for key, value in options.items()})
        layer(pipe).bias.data.fill_(float("nan"))
        pipe(0, **SHORT)

    return provoke


def within_a_call(w):
    pipe = w.pipe()
    pipe(0, num_inference_steps=1, callback_on_step_end=lambda *arguments: pipe(0, num_inference_steps=1))


def variance(w):
    scheduler = DDPMScheduler(variance_type="learned_range")
    w.pipe(scheduler=scheduler, learn_sigma=False)(0, **SHORT)


def quantize(model=dit, **options):
    return lambda w: TernaryConfig(**options).quantize(model())


def dit_with(change):
    """Make a model whose first attention is changed."""

    def make():
        model = dit()
        change(model.transformer_blocks[0].attn1)
        return model

    return make


def fill(layer):
    layer.weight.data[0, 0] = float("nan")
    return layer


def nan_in_a_layer(w):
    model = w.model()
    fill(model.transformer_blocks[0].attn.to_q)
    model.pack()


def nan_pack(w):
    model = TernaryConfig(weight_format="float").quantize(dit())
    fill(model.transformer_blocks[0].attn1.to_q)
    quantization.pack(model)


def twice(w):
    model = dit()
    TernaryConfig().quantize(model)
    TernaryConfig().quantize(model)


def text_encoder(w):
    CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1)).save_pretrained(w.tmp)
    CLIPTextModel.from_pretrained(w.tmp, quantization_config=TernaryConfig())


load = type(dit()).from_pretrained
load_dense = partial(changed, "dense", partial(load, quantization_config=TernaryConfig()), WEIGHTS)
load_config = partial(changed, "quantized", load, "config.json")
load_quantized = partial(changed, "quantized", load, WEIGHTS)


# fmt: off
ROWS = [
    # the network
    *[Row(new(**{name: value}), f"{name}={value!r}", "expected a positive int") for name, value in SIZES],
    Row(new(norm_eps=float("nan")), "norm_eps=nan", "expected float"),
    Row(new(num_layers=10**6), "num_layers=1000000", "more than 1000; nothing was allocated"),
    Row(new(attention_head_dim=7), "got 7", "need an even `attention_head_dim`"),
    Row(new(num_attention_heads=3, num_key_value_heads=2), "num_attention_heads=3",
        "must be a multiple of num_key_value_heads=2"),
    Row(new(sample_size=7), "sample_size=7", "must be a multiple of patch_size=2"),
    Row(new(class_dropout_prob=-0.5), "got -0.5", "`class_dropout_prob` must be a probability, 0 to 1"),
    Row(new(prediction_type="noise"), "'noise'", "must be None, epsilon, v_prediction"),
    Row(new(pos_embed_type="learned"), "'learned'", 'must be "rope" or "rope+sincos2d"'),
    Row(new(pos_embed_type="rope+sincos2d", num_attention_heads=1, attention_head_dim=6), "got 6",
        "needs a width divisible by 4"),
    Row(new(ternary=False, weight_format="packed"), "weight_format='packed'", "ternary=False has no packed weights"),
    Row(lambda w: TerDiTTransformer2DModel.from_preset("terdit-9b"), "'terdit-9b'", "No preset", "'terdit-600m-256'"),
    Row(new(initialization="zeros"), "'zeros'", 'must be "small_gain" or "reference"'),
    Row(lambda w: w.model().enable_cache(FasterCacheConfig(current_timestep_callback=None)), Fixed("FasterCache"),
        "leaves out the first half of a guided batch", "`is_guidance_distilled=True`"),
    Row(nan_in_a_layer, "transformer_blocks.0.attn.to_q", "NaN or infinity",
        "Take one from before training diverged."),
    Row(lambda w: w.model().add_classes(0), "got 0", "`count` must be a positive int"),
    Row(lambda w: with_adapter(w, target_modules=["class_embed"]).add_classes(1),
        Fixed("The label table"), "in an adapter's `target_modules`, which fixes its size",
        "or after `unload_lora()`"),
    Row(lambda w: w.model().set_decoded_budget("much"), "'much'", "must be a number of bytes", '"4GB"'),
    Row(lambda w: w.model().set_decoded_budget(100), "budget of 100", "needs a packed model", "Call `pack()`"),
    Row(lambda w: w.model().pack().to("meta").set_decoded_budget(100), "budget of 100", "on the meta device",
        "Leave one of the two out"),
    Row(decoded_in_float32_on_a_gpu, "budget of 100", "would be slower on a GPU", "Cast the model to bfloat16"),
    Row(lambda w: w.model(activation_bits=8).pack().set_decoded_budget(100), "budget of 100",
        "compute in integers on cpu", "`set_activation_bits(None)`"),
    Row(lambda w: w.model().cuda_graphs().__enter__(), "on cpu", "need a model on a GPU", 'Call `.to("cuda")`.'),
    Row(graphs_of_an_offloaded_model, Fixed("offloading, a step cache, or another block of `cuda_graphs()`"),
        "runs in Python", "Use one of them alone."),
    Row(lambda w: w.model(ternary=False).set_activation_bits(8), "bits=8", "full precision (ternary=False)",
        "Leave the call out."),
    Row(lambda w: w.model(ternary=False).pack(), Fixed("ternary=False"), "no ternary weights to pack",
        "Save it as it is."),
    Row(lambda w: w.model(activation_bits=8).dequantize(), "8-bit", "which a dense model does not do",
        "Use it as it is."),
    Row(forward(None, T, Y), "NoneType", "(batch, 4, height, width)"),
    Row(forward(X.numpy(), T, Y), "ndarray", "(batch, 4, height, width)"),
    Row(forward(X.long(), T, Y), "torch.int64", "in the model's dtype"),
    Row(forward(X[..., :7], T, Y), "(2, 4, 8, 7)", "sides that divide by 2"),
    Row(forward(X[:0], T[:0], Y[:0]), "(0, 4, 8, 8)", "(batch, 4, height, width)"),
    Row(forward(X, 5, Y), "got int", "a tensor of shape (2,) or a scalar"),
    Row(forward(X, torch.ones(3), Y), "(3,), torch.float32", "a tensor of shape (2,) or a scalar"),
    Row(forward(X, T, None), "NoneType", "an int64 or int32 tensor of shape (2,)"),
    Row(forward(X, T, Y.float()), "torch.float32", "an int64 or int32 tensor of shape (2,)"),
    Row(forward(X, T, Y[:, None]), "(2, 1)", "an int64 or int32 tensor of shape (2,)"),

    # the pipeline
    Row(lambda w: TerDiTPipeline("folder", default_scheduler()), "got str",
        "`transformer` must be a TerDiTTransformer2DModel", "TerDiTPipeline.from_pretrained"),
    Row(lambda w: TerDiTPipeline(w.model(), "ddim"), "str", "must be a scheduler of diffusers",
        "such as DDPMScheduler"),
    Row(lambda w: TerDiTPipeline(w.model(learn_sigma=False), None), Fixed("learn_sigma=False"),
        "does not say what it predicts", "or pass a `scheduler`"),
    Row(lambda w: TerDiTPipeline(w.model(), default_scheduler(), vae="auto"), "got str",
        "`vae` must be an AutoencoderKL or None"),
    Row(lambda w: TerDiTPipeline(w.model(), default_scheduler(), id2label=["cat"]), "got list",
        "must be a dict of names by class id"),
    Row(lambda w: TerDiTPipeline(w.model(), default_scheduler(), id2label={"a": "cat"}), "['a']", "must be class ids",
        'such as 0 or "0"'),
    Row(lambda w: TerDiTPipeline(w.model(), default_scheduler(), guidance_channels=5), "got 5",
        "must be None (all) or an int from 1 to 4"),
    Row(lambda w: TerDiTPipeline(w.model(), default_scheduler(), sampling_defaults={"steps": 5}), "{'steps': 5}",
        "must be a dict of num_inference_steps and guidance_scale"),
    Row(call(None), "has 4 classes", "`class_labels` is missing", "Pass ids from 0 to 3, or names: `pipe.labels`."),
    Row(lambda w: TerDiTPipeline.from_pretrained("emoji"), "emoji", "the name of a checkpoint that comes with this",
        "Pass its folder: `diffusers_terdit.checkpoints.bundled('emoji')`.", error=FileNotFoundError),
    Row(lambda w: TerDiTPipeline.from_pretrained(w.tmp / "nowhere"), "TMP/nowhere", "is not a folder",
        "Pass that of a saved pipeline, or a Hub id.", error=FileNotFoundError),
    Row(on_a_file(lambda w: w.pipe()), "TMP/file", "must be a folder"),
    Row(on_a_file(lambda w: w.model()), "TMP/file", "must be a folder"),
    Row(call("crane"), "'crane'", "2 classes are named", "pass one of their ids, [2, 3]"),
    Row(lambda w: TerDiTPipeline(w.model(), default_scheduler())("cat"), "'cat'", "has no label names",
        "Pass class ids."),
    Row(call("dogs"), "'dogs'", "is not a label of this model", "Close matches: 'dog'"),
    Row(lambda w: w.pipe().get_label_ids([3]), "got 3", "A label name is a string", "pass it as it is"),
    Row(call([[[[[[[[[[1]]]]]]]]]]), Fixed("in 9 lists"), "Labels are lists in", "Pass a flat list."),
    Row(call([None]), "got None (NoneType)", "is an int or a name"),
    Row(call(float("nan")), "got nan (float)", "is an int or a name"),
    Row(call(-1), "-1", "is out of range", "classes 0 to 3"),
    Row(call([[]]), Fixed("`class_labels` is empty"), "is empty", "at least one class id"),
    Row(call(guidance_scale="4"), "got '4'", "`guidance_scale` must be a number"),
    Row(call(guidance_scale=float("nan")), "got nan", "must be finite"),
    Row(call(num_inference_steps=0), "got 0", "must be a positive int"),
    Row(call(height=7), "7 x 8", "must be positive multiples of 2 pixels"),
    Row(call(generator=3), "got 3", "must be a torch.Generator or a list"),
    Row(call(generator=[torch.Generator()] * 3), "3 generators for 1 images", "Got",
        "Pass one per image, or a single generator."),
    Row(call(latents=X), "(2, 4, 8, 8)", "must be a tensor of shape (1, 3, 8, 8)"),
    Row(call(output_type="jpg"), "'jpg'", 'must be "pil", "np", "pt" or "latent"'),
    Row(lambda w: w.pipe(in_channels=4)(0, **SHORT), "4 channels", "no VAE",
        'Pass `vae=` when loading, or `output_type="latent"`.'),
    Row(lambda w: w.pipe(vae=w.vae)(0, **SHORT), "4 latent channels, the transformer 3", "The VAE has",
        "Pass the VAE that the transformer was trained with."),
    Row(within_a_call, Fixed("This pipeline"), "is in use by another call",
        "Sample with a pipeline and a scheduler of its", error=RuntimeError),
    Row(call(callback_on_step_end=3), "got 3", "must be a function (pipe, step, timestep, kwargs) -> dict"),
    Row(call(callback_on_step_end=lambda *arguments: None), "got None", "must return a dict",
        "such as the one it is called with"),
    Row(call(callback_on_step_end_tensor_inputs=["noise"]), "['noise']", "may hold ['latents']"),
    Row(lambda w: w.pipe(scheduler=FlowMatchEulerDiscreteScheduler())(0, **SHORT), "FlowMatchEulerDiscreteScheduler",
        "cannot sample this model, which was trained for noise prediction (epsilon)", "Try DDIMScheduler"),
    Row(call(sigmas=[1.0]), "Got sigmas=[1.0]", "DDPMScheduler takes `timesteps`", "one list that is not empty"),
    Row(variance, "This DDPMScheduler", "expects a learned variance", 'variance_type="fixed_small"'),
    Row(broken(lambda pipe: pipe.vae.decoder.conv_out, vae=True, in_channels=4), "VAE in float32", "NaN or infinity",
        "Try `pipe.vae.to(torch.float32)`"),
    Row(broken(lambda pipe: pipe.transformer.proj_out), "layer proj_out", "NaN or infinity in float32",
        "Its weights are damaged, or were never trained."),
    Row(call(latents=torch.full((1, 3, 8, 8), float("nan"))), "Step 1 of 1", "starts from latents with NaN",
        "those passed in, a callback's or the scheduler's"),

    # ternary layers in other models
    Row(quantize(bits=2), "bits", "TernaryConfig has no", "it has scale_granularity"),
    Row(quantize(exact=True), "exact", "TernaryConfig has no", "now `lossless`"),
    Row(quantize(version="2"), "version '2'", "reads '1'", "Update diffusers-terdit."),
    Row(quantize(lossless="yes"), "'yes'", "must be True or False"),
    Row(quantize(strict=1), "got 1", "`strict` must be True or False"),
    Row(quantize(weight_format="int8"), "'int8'", 'must be "packed" or "float"'),
    Row(quantize(lossless=True, weight_format="float"), Fixed("`lossless=True`"), "takes over ternary codes",
        'use weight_format="packed"'),
    Row(quantize(include=5), "got 5", "must be names or patterns of modules", '["transformer_blocks.*"]'),
    Row(load_config(quantization_config=CONFIG), "'column'", "The `quantization_config` in config.json",
        'must be "tensor", "row" or a positive int'),
    Row(quantize(lambda: None), "NoneType", "must be a model of diffusers"),
    Row(text_encoder, "TernaryConfig", "this one is of transformers", 'components_to_quantize=["transformer"]'),
    Row(twice, "DiTTransformer2DModel", "is quantized already (ternary)", "call `dequantize()` first"),
    Row(lambda w: TernaryConfig().quantize(w.model()), "TerDiTTransformer2DModel", "has ternary layers already",
        "it needs no TernaryConfig"),
    Row(quantize(modules_to_not_convert="blocks.*"), "'blocks.*'", "matches no linear layer", "which has "),
    Row(quantize(modules_to_not_convert="*"), "DiTTransformer2DModel", "No linear layer of", "`include` some of "),
    Row(quantize(dit_with(lambda a: setattr(a, "to_k", a.to_q))), Q, "are one layer, used twice",
        "name it in `modules_to_not_convert`, or make it two"),
    Row(quantize(dit_with(lambda a: setattr(a.to_k, "weight", a.to_q.weight))), Q, "is tied to",
        "name the layer in `modules_to_not_convert`, or untie them"),
    Row(quantize(dit_with(lambda a: setattr(a, "to_q", nn.Linear(32, 30))), strict=True), "this one has 30",
        "needs outputs in multiples of 4", "Name it in `modules_to_not_convert`, or choose"),
    Row(quantize(dit_with(lambda a: fill(a.to_q))), f"{Q}.weight", "NaN or infinity", "Take an undamaged one."),
    Row(lambda w: reference.exact_codes(torch.tensor([[1.0, 0.25]]), "tensor", "proj"),
        "row 0 holds 0.25 where the scale is 1", "proj.weight is not ternary", "Another granularity may fit"),
    Row(lambda w: reference.find_granularity(torch.tensor([[1.0, 0.25], [0.5, -0.5]]), "proj"), "proj.weight",
        "No granularity fits the first layer", "without `lossless` the weight is rounded"),
    Row(lambda w: quantization.pack(dit()), "DiTTransformer2DModel", "was not quantized with a TernaryConfig",
        "Call `TernaryConfig().quantize(model)`."),
    Row(nan_pack, Q, "NaN or infinity", "Take one from before training diverged."),
    Row(load_dense(**{f"{Q}.weight": None}), f"{Q}.weight", "1 dense tensors are missing",
        "Download or save it again."),
    Row(load_dense(**{f"{Q}.weight": torch.zeros(32, 32, dtype=torch.int32)}), f"{Q}.weight is (32, 32), torch.int32",
        "the model asks for (32, 32), floats", "Download or save file and"),
    Row(load_dense(**{f"{Q}.weight": torch.zeros(32, 16)}), "(32, 16)", "the model asks for (32, 32)",
        "Download or save file and config.json again."),
    Row(load_quantized(**{f"{Q}.weight_scale": torch.ones(1)}), f"`{Q}.weight_scale` has shape [1]",
        "the config asks for [32, 1]", "config.json and weights again, together"),
    Row(load_quantized(**{f"{Q}.weight_packed": torch.full((8, 32), 255, dtype=torch.uint8)}), f"{Q}.weight_packed",
        "holds code 3", "Download or save it again."),
    Row(load_quantized(**{f"{Q}.weight_scale": None}), f"{Q}.weight_scale", "1 missing tensor(s)",
        "config.json and weights again, together"),
    Row(lambda w: TernaryQuantizer(TernaryConfig(), pre_quantized=False).maybe_update_state_dict({}),
        Fixed("single file"), "works with `from_pretrained` only", "as a folder first"),

    # adapters
    Row(no_peft, Fixed("LoRA"), "needs PEFT", "pip install peft", error=ImportError),
    Row(lambda w: w.model().to("meta").save_pretrained(w.tmp / "x"), "`proj_in.weight`", "are on the meta device",
        "Save it before, or bring them back"),
    Row(lambda w: with_adapter(w).save_pretrained(w.tmp / "x"), "['default']", "The model carries adapters",
        "`save_lora_adapter` saves them"),
    Row(add(trainable_token_indices={"class_embed": [4]}), "[4]", "here row 4 is the null label",
        "call `model.add_classes(...)` first"),
    Row(rows_without_names, "rows [4]", "without names, and another adapter has brought classes of these ids",
        "save it by `pipe.save_lora_weights`"),
    Row(offloaded, Fixed("The label table"), "is offloaded", "Load and unload adapters before offloading"),
    Row(lambda w: w.model().remove_classes(4), "got 4", "an int from 1 to 3", "so that a class is left"),
    Row(with_classes(terdit__classes="[1]"), "classes are [1]", "expected names by row", "Save it again."),
    Row(lambda w: w.pipe().save_lora_weights(w.tmp), "got None", "The model has the adapters []",
        "Pass one as `adapter_name`"),
    Row(with_classes(lora_adapter_metadata='{"r": 2, "target_modules": ["to_q"]}'), "trainable_tokens_delta",
        "the adapter's settings name 0 row(s)", "Download or save it again."),
    Row(add(bias="all"), "bias='all'", "trains weights of the model itself", "Name the layers in `target_modules`"),
    Row(add(modules_to_save=["class_embed"]), "modules_to_save=['class_embed']", "trains weights of the model itself",
        "for rows of the label table, `trainable_token_indices`"),
    Row(add("LoHaConfig"), "LoHaConfig", "take LoRA adapters", "Pass a `peft.LoraConfig`"),
    Row(load_adapter(transformer_blocks__0__attn__to_q__hada_w1_a=torch.ones(2, 2)),
        "a tensor `transformer_blocks.0.attn.to_q.hada_w1_a`", "take LoRA adapters", "a file that was trained with"),
    Row(add(use_dora=True), "use_dora", "reads a dense weight", "Use plain LoRA"),
    Row(merge, Fixed("A ternary weight"), "the sum is no longer ternary", "fuse it into a dense copy"),
    Row(lambda w: with_adapter(w).fuse_lora(), Fixed("A ternary weight"), "the sum is no longer ternary",
        "fuse it into a dense copy"),
    Row(lambda w: w.model().load_lora_adapter(saved_adapter(w), prefix="unet"), "'unet'", "There is no LoRA in",
        "Try `prefix=None`."),
    Row(no_safetensors, "TMP", "no readable safetensors file", "Download or save it again.", error=OSError),
    Row(load_adapter(**{LORA.format("A").replace("_0_", "_9_"): torch.ones(2, 16)}), "transformer_blocks.9.attn.to_q",
        "for a layer that", "Load it into the model that it was trained on."),
    Row(load_adapter(**{LORA.format("B"): None}), "to_q.lora_A.weight",
        "but no `transformer_blocks.0.attn.to_q.lora_B.weight`", "Save it again."),
    Row(load_adapter(**{LORA.format("A"): torch.ones(32)}), "to_q.lora_A.weight` has shape [32]", "expected two sides",
        "Save it again."),
    Row(load_adapter(**{LORA.format("A"): torch.ones(3, 16)}), "to_q.lora_A.weight` has shape [3, 16]",
        "the adapter's rank is 2", "Download or save it again."),
    Row(lambda w: load_settings(w, '{"r": 2, "target_modules": ["to_q"], "lora_bias": true}'),
        "to_q.lora_A.weight", "but no `transformer_blocks.0.attn.to_q.lora_B.bias`", "Save it again."),
    Row(load_adapter(**{LORA.format("A"): torch.ones(2, 24)}), "[2, 24]", "the layer's `in_features` is 16",
        "Load it into the model that it was trained on."),
    Row(load_adapter(**{LORA.format("A"): torch.ones(2, 16, dtype=torch.int8)}), "to_q.lora_A.weight` is torch.int8",
        "expected float32, bfloat16 or float16", "Save it again with `save_lora_adapter`."),
    Row(lambda w: load_settings(w, '{"r": "3"}'), "r='3'", "TMP/lora: the adapter has", "Save it again with"),
    Row(lambda w: load_settings(w, "[1]"), "settings are [1]", "expected an object", "Save it again."),
    Row(lambda w: load_settings(w, "{"), "TMP/lora: the adapter's settings", "are no JSON",
        "Download or save it again."),
    Row(lambda w: load_settings(w, "{}", keep=True), "TMP/lora", "settings are not those that were saved",
        "download or save it again"),
    Row(lambda w: w.model().load_lora_adapter(w.tmp, use_safetensors=False), Fixed("Adapters"),
        "read from safetensors only", "Save it as one."),
    Row(lambda w: with_adapter(w).save_lora_adapter(__file__), "rows_models.py is a file",
        "`save_directory` must be a folder"),
]
