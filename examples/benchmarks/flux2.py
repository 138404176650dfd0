"""`flux2`: a transformer of FLUX.2-klein's shape with ternary weights, packed and dense: folder, memory and time.

The weights are random: ternary ones are codes times a scale for 128 inputs, as bfloat16 holds it. They are written as
a published model would be, as dense tensors, and imported.
"""

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn

import peers
import shared
from diffusers_terdit import TernaryConfig, TernaryLinear
from diffusers_terdit.conversion import convert_ternary_checkpoint
from diffusers_terdit.ops import has_integer_kernel
from diffusers_terdit.quantization import select_layers
from shared import DTYPES, Results, relative_error


GROUP = 128  # inputs that share a scale
# transformer/config.json of the published FLUX.2-klein-base-4B
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "axes_dims_rope": (32, 32, 32, 32),
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "guidance_embeds": False,
}
TOY = KLEIN_4B | {
    **{"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64},
    **{"in_channels": 16, "joint_attention_dim": 48, "axes_dims_rope": (16, 16, 16, 16)},
    "timestep_guidance_channels": 32,
}
# Config, side of the image in tokens (512 pixels are 32 x 32), tokens of text, size of a shard
PRESETS = {"klein-4b": (KLEIN_4B, 32, 512, "1GB"), "toy": (TOY, 4, 6, "200KB")}
MODES = ["packed, bfloat16", "dense, bfloat16"]  # of a whole forward pass
INTEGERS = "packed with 8-bit inputs"
BLOCK_MODES = [f"{kind}, {dtype}" for dtype in DTYPES for kind in ("dense", "best dense", "packed", INTEGERS)]


def add_arguments(commands) -> None:
    parser = commands.add_parser("flux2", help="a 4B FLUX.2-klein with ternary weights, packed and dense")
    parser.add_argument("--preset", choices=PRESETS, default="klein-4b")
    parser.add_argument("--turns", type=shared.positive, default=3, help="calls of each block, after one to warm up")
    parser.add_argument("--folder", help="where to write 9 GB of checkpoints for a while; default the system's")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure what the JSON does not hold for this machine, part by part."""
    results = Results(args, "flux2", page)
    if not args.render:
        results.resume(args.fresh, machine=shared.machine(), preset=args.preset)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure_all(results, args, Path(folder))
    results.finish()


def measure_all(results: Results, args: argparse.Namespace, folder: Path) -> None:
    data = results.data
    if "blocks" not in data:
        data["blocks"] = time_blocks(args.preset, args.turns)
        results.save(with_page=False)
    missing = [mode for mode in MODES if mode not in data.get("forward", {})]
    if not missing:
        return
    dense, packed = folder / "dense", folder / "packed"
    data["sizes"] = write_dense(args.preset, dense)
    data["import"] = shared.in_a_process(__file__, what="import", folder=str(dense), output=str(packed))
    data["sizes"] |= {"packed_bytes": folder_bytes(packed), "dense_bytes": folder_bytes(dense)}
    for mode in missing:
        print(mode, file=sys.stderr, flush=True)
        kind, dtype = mode.split(", ")
        settings = {"folder": str(folder / kind), "dtype": dtype, "preset": args.preset}
        found = shared.in_a_process(__file__, what="forward", **settings)
        data.setdefault("forward", {})[mode] = found
        results.save(with_page=False)


# Checkpoints


def meta_model(config: dict) -> Flux2Transformer2DModel:
    with torch.device("meta"):
        return Flux2Transformer2DModel(**config)


def ternary_names(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name in select_layers(model, TernaryConfig(scale_granularity=GROUP))]


def random_ternary(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return (N, K) bfloat16, `scale * {-1, 0, +1}` with a scale for every `GROUP` inputs."""
    ternary = torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], shape[1] // GROUP, 1, generator=generator) + 0.5
    scale = (scale / math.sqrt(0.7 * shape[1])).bfloat16()
    return (ternary.unflatten(1, (-1, GROUP)) * scale).flatten(1)


def random_weights(model: nn.Module):
    """Yield (name, tensor) of every parameter of a meta model in bfloat16, one at a time."""
    generator = torch.Generator().manual_seed(0)
    ternary = set(ternary_names(model))
    for name, parameter in model.named_parameters():
        if name in ternary:
            yield name, random_ternary(parameter.shape, generator)
        elif parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(parameter.shape, generator=generator) * 0.02).bfloat16()


def write_dense(preset: str, folder: Path) -> dict[str, int]:
    """Write a folder of dense bfloat16 shards, as such models are published; return counts of its parameters."""
    config, _, _, shard = PRESETS[preset]
    model = meta_model(config)
    names = ternary_names(model)
    weights = sum(model.get_parameter(name).numel() for name in names)
    others = sum(parameter.numel() for parameter in model.parameters()) - weights
    shared.save_mapped(model, random_weights(model), folder, shard)
    counts = {"ternary_layers": len(names), "ternary_weights": weights, "groups": weights // GROUP}
    return counts | {"other_parameters": others}


def bound(sizes: dict[str, int]) -> float:
    """Return the bytes that a packed folder may have."""
    return 1.03 * (sizes["ternary_weights"] / 4 + 2 * sizes["groups"] + 2 * sizes["other_parameters"])


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# Measures


def measure(what: str, **settings) -> dict:
    return {"import": measure_import, "forward": measure_forward}[what](**settings)


def measure_import(folder: str, output: str) -> dict:
    imports = shared.peak_memory()
    times = shared.both_clocks(partial(convert_ternary_checkpoint, folder, output, scale_granularity=GROUP))
    return {"imports_gib": imports, "peak_gib": shared.peak_memory(), **times}


@torch.inference_mode()
def measure_forward(folder: str, dtype: str, preset: str) -> dict:
    """Load, and run one forward pass without the VAE and the text encoder."""
    imports, found = shared.peak_memory(), []
    load = partial(Flux2Transformer2DModel.from_pretrained, folder, dtype=getattr(torch, dtype))
    loading = shared.both_clocks(lambda: found.append(load().eval()))["seconds"]
    loaded, model = shared.peak_memory(), found[0]
    values = inputs(preset, model.dtype)
    times = shared.both_clocks(lambda: found.append(model(**values, return_dict=False)[0]))
    if not found[1].isfinite().all():
        raise RuntimeError(f"The forward pass in {dtype} gave numbers that are not finite. Try float32.")
    peaks = {"imports_gib": imports, "loaded_gib": loaded, "peak_gib": shared.peak_memory()}
    return {**peaks, "loading_seconds": loading, **times}


def inputs(preset: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the inputs for one image and one prompt."""
    config, side, text_tokens, _ = PRESETS[preset]
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.zeros(text_tokens, 4, dtype=torch.long)
    text_ids[:, 3] = torch.arange(text_tokens)
    text = torch.randn(1, text_tokens, config["joint_attention_dim"], generator=generator)
    return {
        "hidden_states": torch.randn(1, side * side, config["in_channels"], generator=generator).to(dtype),
        "encoder_hidden_states": text.to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.cartesian_prod(*[torch.arange(n) for n in (1, side, side, 1)]),
        "txt_ids": text_ids,
    }


def block_models(config: dict, dtypes: Sequence[str]) -> dict[str, Flux2Transformer2DModel]:
    """Return one double and one single block of the model with the same weights in every mode."""
    models = {}
    for dtype in dtypes:
        dense = meta_model({**config, "num_layers": 1, "num_single_layers": 1})
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in random_weights(dense)}
        dense.load_state_dict(weights, assign=True)
        packed = meta_model(dense.config)
        packed.load_state_dict(weights, assign=True)
        TernaryConfig(scale_granularity=GROUP, lossless=True).quantize(packed.eval())
        models[f"dense, {dtype}"] = dense.eval()
        models[f"best dense, {dtype}"] = peers.swap(copy.deepcopy(dense), peers.BestDense)
        models[f"packed, {dtype}"] = packed
        if has_integer_kernel("cpu"):
            models[f"{INTEGERS}, {dtype}"] = integers = copy.deepcopy(packed)
            for layer in ternary_layers(integers):
                layer.set_activation_bits(8)
    return models


def ternary_layers(model: nn.Module) -> list[TernaryLinear]:
    return [module for module in model.modules() if isinstance(module, TernaryLinear)]


@torch.inference_mode()
def time_blocks(preset: str, turns: int, dtypes: Sequence[str] = DTYPES) -> dict:
    """Return processor seconds of both kinds of blocks, the modes in turns, and the error of each mode's output."""
    config, side, text_tokens, _ = PRESETS[preset]
    models, outputs, busy = block_models(config, dtypes), {}, {}
    for model in models.values():
        for kind, (block,) in {"double": model.transformer_blocks, "single": model.single_transformer_blocks}.items():
            block.register_forward_pre_hook(lambda *_, kind=kind: busy.update({kind: -time.process_time()}))
            block.register_forward_hook(lambda *_, kind=kind: busy.update({kind: busy[kind] + time.process_time()}))

    def call(mode: str) -> dict[str, float]:
        values = inputs(preset, getattr(torch, mode.split(", ")[1]))
        outputs[mode] = models[mode](**values, return_dict=False)[0]
        return dict(busy)

    times = shared.by_clock(shared.in_turns({mode: mode for mode in models}, turns, clock=call))
    exact = outputs["dense, float32"]
    return {
        "cpu_seconds": times,
        "relative_error": {mode: relative_error(outputs[mode], exact) for mode in models},
        "ternary_layers": len(ternary_layers(models["packed, float32"])),
        "tokens": [side * side, text_tokens],
    }


# Page


def rows_of(config: dict, blocks: dict) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of the table of blocks and of that of steps."""
    medians = {
        mode: {kind: statistics.median(times[mode]) for kind, times in blocks["cpu_seconds"].items()}
        for mode in BLOCK_MODES
        if mode in blocks["relative_error"]
    }
    steps = {
        mode: config["num_layers"] * times["double"] + config["num_single_layers"] * times["single"]
        for mode, times in medians.items()
    }
    fastest = {
        dtype: min(steps[mode] for mode in steps if "dense" in mode and mode.endswith(dtype))
        for dtype in {mode.split(", ")[1] for mode in steps}
    }
    block_rows, step_rows = [], []
    for mode, times in medians.items():
        dtype = mode.split(", ")[1]
        base = f"dense, {dtype}"
        cells = [f"{times[kind]:.2f} ({times[kind] / medians[base][kind]:.2f})" for kind in times]
        name = mode.replace("dense", "dense, as torch computes it") if mode == base else mode
        block_rows.append([name, *cells, f"{blocks['relative_error'][mode]:.1g}"])
        over = [f"{steps[mode] / seconds:.2f}" for seconds in (steps[base], fastest[dtype])]
        step_rows.append([name, f"{steps[mode]:.0f}", *over])
    return block_rows, step_rows


def page(data: dict) -> str:
    sizes, blocks = data["sizes"], data["blocks"]
    config = PRESETS[data.get("preset", "klein-4b")][0]
    places = [{"machine": data["machine"], "blocks": blocks}, *data.get("others", [])]
    rows = [(place["machine"], place.get("remark", ""), *rows_of(config, place["blocks"])) for place in places]
    forward_rows = []
    for mode, found in data["forward"].items():
        peaks = [f"{found[key] * shared.GIB:.2f}" for key in ("imports_gib", "loaded_gib", "peak_gib")]
        forward_rows.append([mode, *peaks, f"{found['cpu_seconds']:.0f}"])
    return shared.render(
        "flux2", config=config, sizes=sizes, bound=bound(sizes), blocks=blocks, group=GROUP, imported=data["import"],
        **{key: data[key] for key in ("machine", "command")},
        turns=len(blocks["cpu_seconds"]["double"]["dense, float32"]),
        rows=rows, forward_rows=forward_rows,
    )  # fmt: skip


if __name__ == "__main__":
    shared.answer(measure)
