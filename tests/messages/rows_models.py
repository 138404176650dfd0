"""The network, the pipeline, ternary layers in other models, adapters."""

import torch
from diffusers import DDPMScheduler, FasterCacheConfig, FlowMatchEulerDiscreteScheduler
from message_table import REASON, TINY, WEIGHTS, Fixed, Row, dit, edit_json, edit_tensors
from torch import nn

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig, lora, quantization
from diffusers_terdit.ops import reference
from diffusers_terdit.pipelines.schedulers import default_scheduler


X, T, Y = torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
Q = "transformer_blocks.0.attn1.to_q"
SHORT = {"num_inference_steps": 1, "guidance_scale": 1.0}
IS_SIZE = "expected a positive int"


def new(**changes):
    return lambda w: TerDiTTransformer2DModel(**{**TINY, **changes})


def forward(*inputs):
    return lambda w: w.model()(*inputs)


def call(class_labels=0, **options):
    return lambda w: w.pipe()(class_labels, **{**SHORT, **options})


def nan_in_a_layer(w):
    model = w.model()
    model.transformer_blocks[0].ff.up_proj.weight.data[0, 0] = float("inf")
    model.pack()


def rows_of_labels():
    from peft import LoraConfig

    return LoraConfig(target_modules=["to_q"], trainable_token_indices={"class_embed": [1]})


def adapter(**options):
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": ["to_q"], **options})


def with_adapter(w):
    model = w.model()
    model.add_adapter(rows_of_labels())
    return model


def classes_after_adapters(w):
    with_adapter(w).add_classes(1)


def add(make):
    return lambda w: w.model().add_adapter(make())


def loha():
    from peft import LoHaConfig

    return LoHaConfig(target_modules=["to_q"])


def merge(w):
    model = with_adapter(w)
    next(module for module in model.modules() if isinstance(module, lora.TernaryLoraLinear)).merge()


def saved_adapter(w, **changes):
    """The tensors of an adapter of `to_q`, changed."""
    model = w.model()
    model.add_adapter(adapter(r=2))
    model.save_lora_adapter(w.tmp / "lora")
    return edit_tensors(w.tmp / "lora" / "pytorch_lora_weights.safetensors", **changes).parent


LORA = "transformer_blocks__0__attn__to_q__lora_{}__weight"


def load_adapter(**changes):
    return lambda w: w.model().load_lora_adapter(saved_adapter(w, **changes))


def no_safetensors(w):
    (w.tmp / "pytorch_lora_weights.safetensors").write_bytes(b"nothing")
    w.model().load_lora_adapter(w.tmp)


def within_a_call(w):
    pipe = w.pipe()
    pipe(0, num_inference_steps=1, callback_on_step_end=lambda *arguments: pipe(0, num_inference_steps=1))


def no_peft(w):
    w.monkeypatch.setattr(lora, "is_peft_available", lambda: False)
    w.model().add_adapter(None)


def of_the_unet(w):
    w.model().load_lora_adapter(saved_adapter(w), prefix="unet")


def variance(w):
    scheduler = DDPMScheduler(variance_type="learned_range")
    w.pipe(scheduler=scheduler, learn_sigma=False)(0, **SHORT)


def vae_of_another(w):
    w.pipe(vae=w.vae)(0, **SHORT)


def broken_vae(w):
    w.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    w.pipe(vae=w.vae, in_channels=4)(0, **SHORT)


def broken_model(w):
    pipe = w.pipe()
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    pipe(0, **SHORT)


def onto_a_file(save):
    def provoke(w):
        (w.tmp / "file").touch()
        save(w).save_pretrained(w.tmp / "file")

    return provoke


def quantize(model=dit, **options):
    return lambda w: TernaryConfig(**options).quantize(model())


def twice(w):
    model = dit()
    TernaryConfig().quantize(model)
    TernaryConfig().quantize(model)


def ternary_already(w):
    TernaryConfig().quantize(w.model())


def shared_layer():
    model = dit()
    attention = model.transformer_blocks[0].attn1
    attention.to_k = attention.to_q
    return model


def tied_layer():
    model = dit()
    attention = model.transformer_blocks[0].attn1
    attention.to_k.weight = attention.to_q.weight
    return model


def odd_layer():
    model = dit()
    model.transformer_blocks[0].attn1.to_q = nn.Linear(32, 30)
    return model


def nan_layer():
    model = dit()
    model.transformer_blocks[0].attn1.to_q.weight.data[0, 0] = float("nan")
    return model


def nan_pack(w):
    model = TernaryConfig(weight_format="float").quantize(dit())
    model.transformer_blocks[0].attn1.to_q.weight.data[0, 0] = float("nan")
    quantization.pack(model)


def load_dense(metadata=None, **changes):
    """Ternarize while loading, after a change of the file."""

    def provoke(w):
        folder = w.saved("dense")
        edit_tensors(folder / WEIGHTS, metadata, **changes)
        type(dit()).from_pretrained(folder, quantization_config=TernaryConfig())

    return provoke


def load_quantized(config=None, **changes):
    """Load a ternary model, after a change of its file or config."""

    def provoke(w):
        folder = w.saved("quantized")
        edit_tensors(folder / WEIGHTS, **changes)
        if config:
            edit_json(folder / "config.json", quantization_config=config)
        type(dit()).from_pretrained(folder)

    return provoke


def single_file(w):
    quantization.TernaryQuantizer(TernaryConfig(), pre_quantized=False).maybe_update_state_dict({})


def not_ternary(w):
    reference.find_granularity(torch.tensor([[1.0, 0.25], [0.5, -0.5]]), "proj")


def exact(w):
    reference.exact_codes(torch.tensor([[1.0, 0.25]]), "tensor", "proj")


# fmt: off
ROWS = [
    # the network
    Row("model-layers", new(num_layers=-1), ValueError, "num_layers=-1", IS_SIZE, REASON),
    Row("model-heads", new(num_attention_heads=0), ValueError, "num_attention_heads=0", IS_SIZE, REASON),
    Row("model-patch", new(patch_size=0), ValueError, "patch_size=0", IS_SIZE, REASON),
    Row("model-size-none", new(sample_size=None), ValueError, "sample_size=None", IS_SIZE, REASON),
    Row("model-classes", new(num_classes=-3), ValueError, "num_classes=-3", IS_SIZE, REASON),
    Row("model-channels", new(in_channels=0), ValueError, "in_channels=0", IS_SIZE, REASON),
    Row("model-kv-heads-zero", new(num_key_value_heads=0), ValueError, "num_key_value_heads=0", IS_SIZE, REASON),
    Row("model-layers-string", new(num_layers="2"), ValueError, "num_layers='2'", IS_SIZE, REASON),
    Row("model-eps", new(norm_eps=float("nan")), ValueError, "norm_eps=nan", "expected float", REASON),
    Row("model-many-layers", new(num_layers=10**6), ValueError,
        "num_layers=1000000", "more than 1000; nothing was allocated", REASON),
    Row("model-head-dim", new(attention_head_dim=7), ValueError,
        "got 7", "need an even `attention_head_dim`", REASON),
    Row("model-kv-heads", new(num_attention_heads=3, num_key_value_heads=2), ValueError,
        "num_attention_heads=3", "must be a multiple of num_key_value_heads=2", REASON),
    Row("model-size", new(sample_size=7), ValueError, "sample_size=7", "must be a multiple of patch_size=2", REASON),
    Row("model-dropout", new(class_dropout_prob=-0.5), ValueError,
        "got -0.5", "`class_dropout_prob` must be a probability, 0 to 1", REASON),
    Row("model-positions", new(pos_embed_type="learned"), ValueError,
        "'learned'", 'must be "rope" or "rope+sincos2d"', REASON),
    Row("model-width", new(pos_embed_type="rope+sincos2d", num_attention_heads=1, attention_head_dim=6), ValueError,
        "got 6", "needs a width divisible by 4", REASON),
    Row("model-dense-packed", new(ternary=False, weight_format="packed"), ValueError,
        "weight_format='packed'", "ternary=False has no packed weights", REASON),
    Row("model-preset", lambda w: TerDiTTransformer2DModel.from_preset("terdit-9b"), ValueError,
        "'terdit-9b'", "No preset", "'terdit-600m-256'"),
    Row("model-initialization", new(initialization="zeros"), ValueError,
        "'zeros'", 'must be "small_gain" or "reference"', REASON),
    Row("model-cache", lambda w: w.model().enable_cache(FasterCacheConfig(current_timestep_callback=None)), ValueError,
        Fixed("FasterCache"), "leaves out the first half of a guided batch", "`is_guidance_distilled=True`"),
    Row("model-pack-nan", nan_in_a_layer, ValueError,
        "transformer_blocks.0.ff.up_proj", "NaN or infinity", "Take one from before training diverged."),
    Row("model-count", lambda w: w.model().add_classes(0), ValueError,
        "got 0", "`count` must be a positive int", REASON),
    Row("model-classes-after-adapters", classes_after_adapters, ValueError,
        "TrainableTokensWrapper", "The label table is a", "add classes before adapters"),
    Row("model-bits-dense", lambda w: w.model(ternary=False).set_activation_bits(8), ValueError,
        "bits=8", "full precision (ternary=False)", "Leave the call out."),
    Row("model-pack-dense", lambda w: w.model(ternary=False).pack(), ValueError,
        Fixed("ternary=False"), "no ternary weights to pack", "Save it as it is."),
    Row("model-dequantize", lambda w: w.model(activation_bits=8).dequantize(), ValueError,
        "8-bit", "which a dense model does not do", "Use it as it is."),
    Row("forward-none", forward(None, T, Y), ValueError, "NoneType", "(batch, 4, height, width)", REASON),
    Row("forward-array", forward(X.numpy(), T, Y), ValueError, "ndarray", "(batch, 4, height, width)", REASON),
    Row("forward-int", forward(X.long(), T, Y), ValueError, "torch.int64", "in the model's dtype", REASON),
    Row("forward-sides", forward(X[..., :7], T, Y), ValueError, "(2, 4, 8, 7)", "sides that divide by 2", REASON),
    Row("forward-empty", forward(X[:0], T[:0], Y[:0]), ValueError,
        "(0, 4, 8, 8)", "(batch, 4, height, width)", REASON),
    Row("forward-timestep", forward(X, 5, Y), ValueError, "got int", "a tensor of shape (2,) or a scalar", REASON),
    Row("forward-timesteps", forward(X, torch.ones(3), Y), ValueError,
        "(3,), torch.float32", "a tensor of shape (2,) or a scalar", REASON),
    Row("forward-labels-none", forward(X, T, None), ValueError,
        "NoneType", "an int64 or int32 tensor of shape (2,)", REASON),
    Row("forward-labels-float", forward(X, T, Y.float()), ValueError,
        "torch.float32", "an int64 or int32 tensor of shape (2,)", REASON),
    Row("forward-labels-shape", forward(X, T, Y[:, None]), ValueError,
        "(2, 1)", "an int64 or int32 tensor of shape (2,)", REASON),

    # the pipeline
    Row("pipe-transformer", lambda w: TerDiTPipeline("folder", default_scheduler()), ValueError,
        "got str", "`transformer` must be a TerDiTTransformer2DModel", "TerDiTPipeline.from_pretrained"),
    Row("pipe-scheduler", lambda w: TerDiTPipeline(w.model(), None), ValueError,
        "NoneType", "must be a scheduler of diffusers", "such as DDPMScheduler"),
    Row("pipe-vae", lambda w: TerDiTPipeline(w.model(), default_scheduler(), vae="auto"), ValueError,
        "got str", "`vae` must be an AutoencoderKL or None", REASON),
    Row("pipe-names", lambda w: TerDiTPipeline(w.model(), default_scheduler(), id2label=["cat"]), ValueError,
        "got list", "must be a dict of names by class id", REASON),
    Row("pipe-name-keys", lambda w: TerDiTPipeline(w.model(), default_scheduler(), id2label={"a": "cat"}), ValueError,
        "['a']", "must be class ids", 'such as 0 or "0"'),
    Row("pipe-guidance-channels", lambda w: TerDiTPipeline(w.model(), default_scheduler(), guidance_channels=5),
        ValueError, "got 5", "must be None (all) or an int from 1 to 4", REASON),
    Row("pipe-folder", lambda w: TerDiTPipeline.from_pretrained(w.tmp / "nowhere"), FileNotFoundError,
        "TMP/nowhere", "is not a folder", "Pass that of a saved pipeline, or a Hub id."),
    Row("pipe-onto-file", onto_a_file(lambda w: w.pipe()), ValueError, "TMP/file", "must be a folder", REASON),
    Row("model-onto-file", onto_a_file(lambda w: w.model()), ValueError, "TMP/file", "must be a folder", REASON),
    Row("label-twice", call("crane"), ValueError, "'crane'", "2 classes are named", "pass one of their ids, [2, 3]"),
    Row("label-no-names", lambda w: TerDiTPipeline(w.model(), default_scheduler())("cat"), ValueError,
        "'cat'", "has no label names", "Pass class ids."),
    Row("label-unknown", call("dogs"), ValueError, "'dogs'", "is not a label of this model", "Close matches: 'dog'"),
    Row("label-ids", lambda w: w.pipe().get_label_ids([3]), ValueError,
        "got 3", "A label name is a string", "pass it as it is"),
    Row("label-none", call(None), ValueError, "got None (NoneType)", "is an int or a name", REASON),
    Row("label-nan", call(float("nan")), ValueError, "got nan (float)", "is an int or a name", REASON),
    Row("label-range", call(-1), ValueError, "-1", "is out of range", "classes 0 to 3"),
    Row("call-empty", call([[]]), ValueError, Fixed("`class_labels` is empty"), "is empty", "at least one class id"),
    Row("call-guidance", call(guidance_scale="4"), ValueError, "got '4'", "`guidance_scale` must be a number", REASON),
    Row("call-guidance-nan", call(guidance_scale=float("nan")), ValueError, "got nan", "must be finite", REASON),
    Row("call-steps", call(num_inference_steps=0), ValueError,
        "got 0", "must be a positive int", REASON),
    Row("call-sides", call(height=7), ValueError, "7 x 8", "must be positive multiples of 2 pixels", REASON),
    Row("call-generator", call(generator=3), ValueError, "got 3", "must be a torch.Generator or a list", REASON),
    Row("call-generators", call(generator=[torch.Generator()] * 3), ValueError,
        "3 generators for 1 images", "Got", "Pass one per image, or a single generator."),
    Row("call-latents", call(latents=X), ValueError, "(2, 4, 8, 8)", "must be a tensor of shape (1, 3, 8, 8)", REASON),
    Row("call-output", call(output_type="jpg"), ValueError, "'jpg'", 'must be "pil", "np", "pt" or "latent"', REASON),
    Row("call-no-vae", lambda w: w.pipe(in_channels=4)(0, **SHORT), ValueError,
        "4 channels", "no VAE", 'Pass `vae=` when loading, or `output_type="latent"`.'),
    Row("call-vae", vae_of_another, ValueError,
        "4 latent channels, the transformer 3", "The VAE has", "Pass the VAE that the transformer was trained with."),
    Row("call-within-a-call", within_a_call, RuntimeError,
        Fixed("This pipeline"), "is in use by another call", "Sample with a pipeline and a scheduler of its"),
    Row("call-callback", call(callback_on_step_end=3), ValueError,
        "got 3", "must be a function (pipe, step, timestep, kwargs) -> dict", REASON),
    Row("call-callback-result", call(callback_on_step_end=lambda *arguments: None), ValueError,
        "got None", "must return a dict", "such as the one it is called with"),
    Row("call-callback-inputs", call(callback_on_step_end_tensor_inputs=["noise"]), ValueError,
        "['noise']", "may hold ['latents']", REASON),
    Row("call-flow", lambda w: w.pipe(scheduler=FlowMatchEulerDiscreteScheduler())(0, **SHORT), ValueError,
        "FlowMatchEulerDiscreteScheduler", "predicts the noise of DDPM's steps", "Take one of DDPM's family"),
    Row("call-variance", variance, ValueError,
        "This DDPMScheduler", "expects a learned variance", 'variance_type="fixed_small"'),
    Row("call-broken-vae", broken_vae, ValueError,
        "VAE in float32", "NaN or infinity", "Try `pipe.vae.to(torch.float32)`"),
    Row("call-broken-model", broken_model, ValueError,
        "layer proj_out", "NaN or infinity in float32", "Its weights are damaged, or were never trained."),
    Row("call-nan-latents", call(latents=torch.full((1, 3, 8, 8), float("nan"))), ValueError,
        "Step 1 of 1", "starts from latents with NaN", "those passed in, a callback's or the scheduler's"),

    # ternary layers in other models
    Row("config-unknown", quantize(bits=2), ValueError, "bits", "TernaryConfig has no", "it has scale_granularity"),
    Row("config-first-name", quantize(exact=True), ValueError, "exact", "TernaryConfig has no", "now `lossless`"),
    Row("config-version", quantize(version="2"), ValueError, "version '2'", "reads '1'", "Update diffusers-terdit."),
    Row("config-lossless", quantize(lossless="yes"), ValueError, "'yes'", "must be True or False", REASON),
    Row("config-format", quantize(weight_format="int8"), ValueError, "'int8'", 'must be "packed" or "float"', REASON),
    Row("config-lossless-float", quantize(lossless=True, weight_format="float"), ValueError,
        Fixed("`lossless=True`"), "takes over ternary codes", 'use weight_format="packed"'),
    Row("config-patterns", quantize(include=5), ValueError,
        "got 5", "must be names or patterns of modules", '["transformer_blocks.*"]'),
    Row("config-json", load_quantized({"quant_method": "ternary", "scale_granularity": "column", "version": "1"}),
        ValueError,
        "'column'", "The `quantization_config` in config.json", 'must be "tensor", "row" or a positive int'),
    Row("quantize-none", quantize(lambda: None), ValueError, "NoneType", "must be a model of diffusers", REASON),
    Row("quantize-twice", twice, ValueError,
        "DiTTransformer2DModel", "is quantized already (ternary)", "call `dequantize()` first"),
    Row("quantize-terdit", ternary_already, ValueError,
        "TerDiTTransformer2DModel", "has ternary layers already", "it needs no TernaryConfig"),
    Row("quantize-pattern", quantize(modules_to_not_convert="blocks.*"), ValueError,
        "'blocks.*'", "matches no linear layer", "which has "),
    Row("quantize-none-chosen", quantize(modules_to_not_convert="*"), ValueError,
        "DiTTransformer2DModel", "No linear layer of", "`include` some of "),
    Row("quantize-shared", quantize(shared_layer), ValueError,
        Q, "are one layer, used twice", "name it in `modules_to_not_convert`, or make it two"),
    Row("quantize-tied", quantize(tied_layer), ValueError,
        Q, "is tied to", "name the layer in `modules_to_not_convert`, or untie them"),
    Row("quantize-outputs", quantize(odd_layer), ValueError,
        "this one has 30", "needs outputs in multiples of 4", "Name it in `modules_to_not_convert`, or choose"),
    Row("quantize-nan", quantize(nan_layer), ValueError, f"{Q}.weight", "NaN or infinity", "Take an undamaged one."),
    Row("quantize-exact", exact, ValueError,
        "row 0 holds 0.25 beside 1", "proj.weight is not ternary", "Another granularity may fit"),
    Row("quantize-granularity", not_ternary, ValueError,
        "proj.weight", "No granularity fits the first layer", "without `lossless` the weight is rounded"),
    Row("quantized-pack", lambda w: quantization.pack(dit()), ValueError,
        "DiTTransformer2DModel", "was not quantized with a TernaryConfig", "Call `TernaryConfig().quantize(model)`."),
    Row("quantized-pack-nan", nan_pack, ValueError, Q, "NaN or infinity", "Take one from before training diverged."),
    Row("dense-missing", load_dense(**{f"{Q}.weight": None}), ValueError,
        f"{Q}.weight", "1 dense tensors are missing", "Download or save it again."),
    Row("dense-ints", load_dense(**{f"{Q}.weight": torch.zeros(32, 32, dtype=torch.int32)}), ValueError,
        f"{Q}.weight is (32, 32), torch.int32", "the model asks for (32, 32), floats", "Download or save file and"),
    Row("dense-shape", load_dense(**{f"{Q}.weight": torch.zeros(32, 16)}), ValueError,
        "(32, 16)", "the model asks for (32, 32)", "Download or save file and config.json again."),
    Row("quantized-shape", load_quantized(**{f"{Q}.weight_scale": torch.ones(1)}), ValueError,
        f"`{Q}.weight_scale` has shape [1]", "the config asks for [32, 1]", "config.json and weights again, together"),
    Row("quantized-code-3", load_quantized(**{f"{Q}.weight_packed": torch.full((8, 32), 255, dtype=torch.uint8)}),
        ValueError, f"{Q}.weight_packed", "holds code 3", "Download or save it again."),
    Row("quantized-missing", load_quantized(**{f"{Q}.weight_scale": None}), ValueError,
        f"{Q}.weight_scale", "1 missing tensor(s)", "config.json and weights again, together"),
    Row("quantized-single-file", single_file, ValueError,
        Fixed("single file"), "works with `from_pretrained` only", "as a folder first"),

    # adapters
    Row("lora-peft", no_peft, ImportError, Fixed("LoRA"), "needs PEFT", "pip install 'diffusers-terdit[lora]'"),
    Row("lora-save", lambda w: with_adapter(w).save_pretrained(w.tmp / "x"), ValueError,
        "['default']", "The model carries adapters", "`save_lora_adapter` saves them"),
    Row("lora-rows", add(lambda: adapter(trainable_token_indices={"class_embed": [4]})), ValueError,
        "[4]", "here row 4 is the null label", "call `model.add_classes(...)` first"),
    Row("lora-bias", add(lambda: adapter(bias="all")), ValueError,
        "bias='all'", "trains weights of the model itself", "Name the layers in `target_modules`"),
    Row("lora-kind", add(loha), ValueError, "LoHaConfig", "take LoRA adapters", "Pass a `peft.LoraConfig`"),
    Row("lora-file-kind", load_adapter(transformer_blocks__0__attn__to_q__hada_w1_a=torch.ones(2, 2)), ValueError,
        "a tensor `transformer_blocks.0.attn.to_q.hada_w1_a`", "take LoRA adapters", "a file that was trained with"),
    Row("lora-dora", add(lambda: adapter(use_dora=True)), ValueError,
        "use_dora", "reads a dense weight", "Use plain LoRA"),
    Row("lora-merge", merge, ValueError,
        Fixed("A ternary weight"), "the sum is no longer ternary", "fuse it into a dense copy"),
    Row("lora-fuse", lambda w: with_adapter(w).fuse_lora(), ValueError,
        Fixed("A ternary weight"), "the sum is no longer ternary", "fuse it into a dense copy"),
    Row("lora-prefix", of_the_unet, ValueError, "'unet'", "There is no LoRA in", "Try `prefix=None`."),
    Row("lora-file", no_safetensors, OSError, "TMP", "no readable safetensors file", "Download or save it again."),
    Row("lora-layer", load_adapter(**{LORA.format("A").replace("_0_", "_9_"): torch.ones(2, 16)}), ValueError,
        "transformer_blocks.9.attn.to_q", "for a layer that", "Load it into the model that it was trained on."),
    Row("lora-half", load_adapter(**{LORA.format("B"): None}), ValueError,
        "to_q.lora_A.weight", "but no `transformer_blocks.0.attn.to_q.lora_B.weight`", "Save it again."),
    Row("lora-size", load_adapter(**{LORA.format("A"): torch.ones(2, 24)}), ValueError,
        "[2, 24]", "the layer's `in_features` is 16", "Load it into the model that it was trained on."),
]
