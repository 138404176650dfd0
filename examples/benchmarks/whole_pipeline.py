"""`pipeline`: one picture from a pipeline of FLUX.2-klein's shape, text encoder and VAE included: memory and seconds.

The weights are random, of the real sizes. Each mode runs in a separate process, which loads from disk, encodes a
prompt of 512 tokens, denoises in 4 steps and decodes 512 x 512 pixels.
"""

import argparse
import gc
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import flux2
import shared
from diffusers_terdit.conversion import convert_ternary_checkpoint
from shared import Results


STEPS = 4
CLEAR = Path("/proc/self/clear_refs")  # of Linux
# Qwen3-4B, the text encoder of FLUX.2-klein
QWEN3_4B = {
    **{"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
}
TOY_ENCODER = QWEN3_4B | {
    **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}
TOY_VAE = {
    "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
}  # fmt: skip
# By preset: config of the encoder, its layers that are taken, config of the VAE
PARTS = {"klein-4b": (QWEN3_4B, (9, 18, 27), {}), "toy": (TOY_ENCODER, (1, 2, 3), TOY_VAE)}
# (transformer, its arithmetic, dtype, what happens to the text encoder)
MODES = {
    "dense, bfloat16": ("dense", None, "bfloat16", "stays"),
    "dense, bfloat16, encoder evicted": ("dense", None, "bfloat16", "evicted"),
    "packed, bfloat16, encoder evicted": ("packed", None, "bfloat16", "evicted"),
    "packed, int8, encoder evicted": ("packed", 8, "bfloat16", "evicted"),
    "packed, int8, int8 encoder evicted": ("packed", 8, "bfloat16", "quantized, evicted"),
    "dense, float32, encoder evicted": ("dense", None, "float32", "evicted"),
    "packed, float32, encoder evicted": ("packed", None, "float32", "evicted"),
}
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def add_arguments(commands) -> None:
    parser = commands.add_parser("pipeline", help="a picture from a 4B FLUX.2-klein with its text encoder and VAE")
    parser.add_argument("--preset", choices=PARTS, default="klein-4b")
    parser.add_argument("--folder", help="where to write 18 GB of checkpoints for a while; default the system's")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure the modes that the JSON does not hold for this machine."""
    results = Results(args, "pipeline", page)
    if not args.render:
        results.resume(args.fresh, machine=shared.machine(), preset=args.preset)
        missing = results.missing({"mode": mode} for mode in MODES)
        if not has_torchao():
            missing = [case for case in missing if "quantized" not in MODES[case["mode"]][3]]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            if missing:
                results.data["bytes"] = write(args.preset, Path(folder))
            for case in missing:
                found = shared.in_a_process(__file__, folder=folder, preset=args.preset, **case)
                results.collect([case | found])
    results.finish()


# Checkpoints


def write(preset: str, folder: Path) -> dict[str, int]:
    """Write the parts, the transformer dense and packed; return their bytes."""
    encoder, _, vae = PARTS[preset]
    flux2.write_dense(preset, folder / "dense")
    convert_ternary_checkpoint(folder / "dense", folder / "packed", scale_granularity=flux2.GROUP)
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**encoder))  # its head is tied, and made when it is loaded
    shared.save_mapped(model, random_weights(model), folder / "text_encoder", "1GB")
    torch.manual_seed(0)
    AutoencoderKLFlux2(**vae).bfloat16().save_pretrained(folder / "vae")
    new_tokenizer(folder).save_pretrained(folder / "tokenizer")
    if has_torchao():
        quantize_encoder(folder)
    names = ("dense", "packed", "text_encoder", "text_encoder_int8", "vae")
    return {name: flux2.folder_bytes(folder / name) for name in names if (folder / name).is_dir()}


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def quantize_encoder(folder: Path) -> None:
    """Save the text encoder with torchao's int8 weights, once, as its user would."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder / "text_encoder_int8")


def random_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield bfloat16 weights of the variance that keeps a signal's, one at a time."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            weight = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16)
            yield name, weight / math.sqrt(parameter.shape[1])


def new_tokenizer(folder: Path) -> Qwen2TokenizerFast:
    """A tokenizer without merges: the encoder's time depends on the 512 tokens that a prompt is padded to."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(
        f"{folder}/vocab.json", f"{folder}/merges.txt", pad_token="<|endoftext|>", chat_template=CHAT
    )
    return tokenizer


# Measures


@torch.inference_mode()
def measure(mode: str, folder: str, preset: str) -> dict:
    """Draw one picture; return the seconds of its parts, and the peak of memory in each."""
    kind, bits, dtype_name, encoder = MODES[mode]
    dtype, parts, last = getattr(torch, dtype_name), {}, [time.perf_counter(), 0.0]

    def mark(name: str) -> None:
        now = [time.perf_counter(), time.process_time()]
        seconds, busy = (clock - before for clock, before in zip(now, last, strict=True))
        parts[name] = {"seconds": seconds, "cpu_seconds": busy, "peak_gib": shared.peak_memory()}
        last[:] = now
        if CLEAR.exists():
            CLEAR.write_text("5")  # the next peak is that of the next part

    mark("imports")
    pipe = new_pipeline(folder, "quantized" in encoder)
    mark("load the encoder")
    settings = {"text_encoder_out_layers": PARTS[preset][1], "max_sequence_length": flux2.PRESETS[preset][2]}
    embeds, _ = pipe.encode_prompt("a cat in the snow", **settings)
    if "evicted" in encoder:
        pipe.text_encoder = None
        gc.collect()
    mark("encode")
    transformer = Flux2Transformer2DModel.from_pretrained(f"{folder}/{kind}", dtype=dtype).eval()
    for layer in flux2.ternary_layers(transformer) if bits else ():
        layer.set_activation_bits(bits)
    vae = AutoencoderKLFlux2.from_pretrained(f"{folder}/vae", dtype=dtype).eval()
    pipe.register_modules(transformer=transformer, vae=vae)
    mark("load the rest")
    side = flux2.PRESETS[preset][1] * pipe.vae_scale_factor * 2
    image = pipe(
        prompt_embeds=embeds.to(dtype), height=side, width=side, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0), output_type="pt",
        callback_on_step_end=lambda pipe, step, t, values: mark(f"step {step + 1}") or values,
    ).images[0]  # fmt: skip
    mark("decode")
    if not image.isfinite().all():
        raise RuntimeError(f"The picture of {mode!r} has numbers that are not finite. Try another dtype.")
    return {"parts": parts, "pixels": list(image.shape[-2:])}


def new_pipeline(folder: str, quantized: bool) -> Flux2KleinPipeline:
    """The pipeline with its text encoder alone, in bfloat16 or in torchao's int8."""
    path = f"{folder}/text_encoder{'_int8' if quantized else ''}"
    text_encoder = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=text_encoder,
        tokenizer=Qwen2TokenizerFast.from_pretrained(f"{folder}/tokenizer"), transformer=None, is_distilled=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def page(data: dict) -> str:
    rows = []
    for record in data["records"]:
        parts = record["parts"]
        steps = [part for name, part in parts.items() if name.startswith("step")]
        load = [parts[name] for name in ("load the encoder", "load the rest")]
        groups = [[parts["encode"]], steps, [parts["decode"]], load]
        encoding = max(parts[name]["peak_gib"] for name in ("load the encoder", "encode")) * shared.GIB
        rest = max(part["peak_gib"] for part in (load[1], *steps, parts["decode"])) * shared.GIB
        busy = [sum(part["cpu_seconds"] for part in group) for group in groups]
        seconds = sum(part["seconds"] for group in groups for part in group)
        figures = [f"{encoding:.1f}", f"{rest:.1f}", *(f"{value:.0f}" for value in (*busy, sum(busy), seconds))]
        rows.append([record["mode"], *figures])
    given = {key: data[key] for key in ("bytes", "machine", "command")}
    return shared.render("pipeline", rows=rows, steps=STEPS, pixels=data["records"][0]["pixels"], **given)


if __name__ == "__main__":
    shared.answer(measure)
