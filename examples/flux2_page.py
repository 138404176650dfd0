"""What `benchmark.py flux2` measures: a transformer of FLUX.2-klein's shape with ternary weights, beside dense ones.

The weights are random: ternary ones are codes times a scale for 128 inputs, as bfloat16 holds it. They are written as
a published model would be, as dense tensors, and imported. The results go to JSON; the page is rendered from that.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file
from torch import nn

from diffusers_terdit import TernaryConfig, TernaryLinear
from diffusers_terdit.conversion import convert_dense_checkpoint
from diffusers_terdit.quantization import select_layers


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
SIDE, TEXT_TOKENS = 32, 512  # 512 pixels are 32 x 32 tokens
MODES = ["packed, bfloat16", "dense, bfloat16"]  # of a whole forward pass
BLOCK_MODES = ["dense, float32", "packed, float32", "dense, bfloat16", "packed, bfloat16"]
SHARD_BYTES = 10**9


def add_arguments(commands) -> None:
    sub = commands.add_parser("flux2", help="a 4B FLUX.2-klein with ternary weights beside dense ones")
    sub.add_argument("--turns", type=int, default=3, help="calls of each block, after one that warms up")
    sub.add_argument("--folder", help="where to write 9 GB of checkpoints for a while; default the system's")
    sub.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    sub.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")
    sub.add_argument("--measure", nargs=3, metavar=("WHAT", "FOLDER", "HOW"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace, machine: str, command: str, peak_memory: Callable[[], float]) -> None:
    """Measure what the JSON does not hold for this machine, part by part, then write the page."""
    if args.measure:
        what, folder, how = args.measure
        print(json.dumps(MEASURES[what](Path(folder), how, peak_memory)))
        return
    path = args.output_dir / "flux2.json"
    if args.render and not path.exists():
        raise SystemExit(f"{path} does not exist; measure first, without --render.")
    data = json.loads(path.read_text()) if path.exists() else {}
    if not args.render:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if data.get("machine") != machine:
            places = r" --(folder|output_dir) \S+"  # which change nothing that is measured
            data = {"machine": machine, "command": re.sub(places, "", command)}
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure(data, Path(folder), args.turns, lambda: path.write_text(json.dumps(data, indent=1) + "\n"))
    (args.output_dir / "flux2.md").write_text(page(data), "utf-8")


def measure(data: dict, folder: Path, turns: int, save: Callable[[], object]) -> None:
    if "blocks" not in data:
        data["blocks"] = time_blocks(KLEIN_4B, turns, SIDE, TEXT_TOKENS)
        save()
    missing = [mode for mode in MODES if mode not in data.get("forward", {})]
    if not missing:
        return
    dense, packed = folder / "dense", folder / "packed"
    data["sizes"] = write_dense(KLEIN_4B, dense)
    data["import"] = in_a_process("import", dense, str(packed))
    data["sizes"] |= {"packed_bytes": folder_bytes(packed), "dense_bytes": folder_bytes(dense)}
    save()
    for mode in missing:
        kind, dtype = mode.split(", ")
        data.setdefault("forward", {})[mode] = in_a_process("forward", folder / kind, dtype)
        save()


def in_a_process(what: str, folder: Path, how: str) -> dict:
    script = [sys.executable, str(Path(__file__).with_name("benchmark.py"))]
    command = [*script, "flux2", "--measure", what, str(folder), how]
    print(f"{what} {folder.name} {Path(how).name}", file=sys.stderr, flush=True)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


# --- checkpoints ---


def meta_model(config: dict) -> Flux2Transformer2DModel:
    with torch.device("meta"):
        return Flux2Transformer2DModel(**config)


def random_ternary(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """(N, K) bfloat16, `scale * {-1, 0, +1}` with a scale for every `GROUP` inputs."""
    ternary = torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], shape[1] // GROUP, 1, generator=generator) + 0.5
    scale = (scale / math.sqrt(0.7 * shape[1])).bfloat16()
    return (ternary.unflatten(1, (-1, GROUP)) * scale).flatten(1)


def random_weights(model: nn.Module, seed: int = 0):
    """(name, tensor) of every parameter of a meta model in bfloat16, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    ternary = {f"{name}.weight" for name in select_layers(model, TernaryConfig(scale_granularity=GROUP))}
    for name, parameter in model.named_parameters():
        if name in ternary:
            yield name, random_ternary(parameter.shape, generator)
        elif parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(parameter.shape, generator=generator) * 0.02).bfloat16()


def write_dense(config: dict, folder: Path) -> dict[str, int]:
    """A folder of dense bfloat16 shards, as such models are published; the counts of its parameters."""
    model = meta_model(config)
    layers = select_layers(model, TernaryConfig(scale_granularity=GROUP))
    ternary_weights = sum(linear.weight.numel() for linear in layers.values())
    folder.mkdir()
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        file = f"diffusion_pytorch_model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in random_weights(model):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model.save_config(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "ternary_layers": len(layers),
        "ternary_weights": ternary_weights,
        "groups": ternary_weights // GROUP,
        "other_parameters": parameters - ternary_weights,
    }


def bound(sizes: dict[str, int]) -> float:
    """Bytes that a packed folder may have."""
    return 1.03 * (sizes["ternary_weights"] / 4 + 2 * sizes["groups"] + 2 * sizes["other_parameters"])


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# --- measures ---


def measure_import(folder: Path, how: str, peak_memory: Callable[[], float]) -> dict:
    imports, started, busy = peak_memory(), time.perf_counter(), time.process_time()
    convert_dense_checkpoint(folder, how, scale_granularity=GROUP)
    return {
        "imports_gib": imports,
        "peak_gib": peak_memory(),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }


def inputs(config: dict, dtype: torch.dtype, side: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Of one image and one prompt."""
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.zeros(text_tokens, 4, dtype=torch.long)
    text_ids[:, 3] = torch.arange(text_tokens)
    return {
        "hidden_states": torch.randn(1, side * side, config["in_channels"], generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, text_tokens, config["joint_attention_dim"], generator=generator).to(
            dtype
        ),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.cartesian_prod(*[torch.arange(n) for n in (1, side, side, 1)]),
        "txt_ids": text_ids,
    }


def measure_forward(folder: Path, how: str, peak_memory: Callable[[], float]) -> dict:
    """Load, one forward pass of 512 px, without the VAE and the text encoder."""
    imports, dtype, started = peak_memory(), getattr(torch, how), time.perf_counter()
    model = Flux2Transformer2DModel.from_pretrained(folder, dtype=dtype).eval()
    loading, loaded = time.perf_counter() - started, peak_memory()
    values = inputs(model.config, dtype, SIDE, TEXT_TOKENS)
    started, busy = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        output = model(**values, return_dict=False)[0]
    if not output.isfinite().all():
        raise RuntimeError(f"The forward pass in {how} gave numbers that are not finite. Try float32.")
    return {
        "imports_gib": imports,
        "loaded_gib": loaded,
        "peak_gib": peak_memory(),
        "loading_seconds": loading,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }


MEASURES = {"import": measure_import, "forward": measure_forward}


def block_models(config: dict) -> dict[str, Flux2Transformer2DModel]:
    """One double and one single block of the model with the same weights in every mode."""
    models = {}
    for dtype in ("float32", "bfloat16"):
        dense = meta_model({**config, "num_layers": 1, "num_single_layers": 1})
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in random_weights(dense)}
        dense.load_state_dict(weights, assign=True)
        packed = meta_model(dense.config)
        packed.load_state_dict(weights, assign=True)
        models[f"dense, {dtype}"] = dense.eval()
        models[f"packed, {dtype}"] = TernaryConfig(scale_granularity=GROUP, lossless=True).quantize(packed.eval())
    return models


@torch.inference_mode()
def time_blocks(config: dict, turns: int, side: int, text_tokens: int) -> dict:
    """Processor seconds of both kinds of blocks, the modes in turns, and the error of each packed mode's output."""
    models = block_models(config)
    times = {kind: {mode: [] for mode in BLOCK_MODES} for kind in ("double", "single")}
    outputs = {}

    def watch(block: nn.Module, kind: str, mode: str) -> None:
        block.register_forward_pre_hook(lambda *_: times[kind][mode].append(-time.process_time()))

        def stop(*_) -> None:
            times[kind][mode][-1] += time.process_time()

        block.register_forward_hook(stop)

    for mode, model in models.items():
        watch(model.transformer_blocks[0], "double", mode)
        watch(model.single_transformer_blocks[0], "single", mode)
    for turn in range(turns + 1):
        # there and back, so that a drift of the machine's speed falls on each side of a pair
        for mode in BLOCK_MODES[:: 1 if turn % 2 else -1]:
            dtype = getattr(torch, mode.split(", ")[1])
            outputs[mode] = models[mode](**inputs(config, dtype, side, text_tokens), return_dict=False)[0].float()
    exact = outputs["dense, float32"]
    errors = {mode: float((output - exact).norm() / exact.norm()) for mode, output in outputs.items()}
    layers = [module for module in models["packed, float32"].modules() if isinstance(module, TernaryLinear)]
    return {
        "cpu_seconds": {kind: {mode: t[1:] for mode, t in by_mode.items()} for kind, by_mode in times.items()},
        "relative_error": errors,
        "ternary_layers": len(layers),
        "tokens": [side * side, text_tokens],
    }


# --- page ---


PAGE = """# A 4B text-to-image transformer with ternary weights

What does a transformer of FLUX.2-klein's shape need on a CPU, packed by `TernaryConfig`, beside the same model in
dense tensors? The weights are random, which changes neither bytes nor time; the one public ternary model of this shape
was not at hand. Rendered from [flux2.json](flux2.json) (`python examples/benchmark.py flux2 --render`).

{machine}

```bash
{command}
```

`Flux2Transformer2DModel`: {num_layers} double and {num_single_layers} single blocks of width {width},
{parameters:.2f} billion parameters. {ternary_layers} linear layers of the blocks are ternary: {ternary_weights:.2f}
billion weights, one scale for {group} inputs. Embedders, modulation and norms, {other:.0f} million parameters, are
bfloat16.

## Bytes and memory

The packed folder has {packed:,.0f} MB. The bound is 1.03 x (weights / 4 + 2 bytes per scale + 2 bytes per other
parameter) = {bound:,.0f} MB. The dense folder, bfloat16, has {dense:,.0f} MB.

What `terdit convert` does, reading the dense folder tensor by tensor, finding codes and scales, and packing them:
{import_peak:.2f} GiB at the peak of its process, {import_cpu:.0f} processor seconds. The peak counts the mapped file
that is being read (shards of 1 GB here), whose pages the system may take back.

One forward pass for one image of 512 px: {image_tokens} image tokens and {text_tokens} text tokens, without VAE and
text encoder. Each row is a process of its own, its imports included.

{forward}

Loading maps the files. Packed codes are read once, to check them; dense weights count when the forward pass touches
them. The dense model is never held: a layer decodes some rows at a time into a buffer that all layers share.

## Time of a block

Processor seconds of one block with {tokens} tokens, median of {turns} calls of one thread, the modes in turns in one
process:

{blocks}

A step of {num_layers} double and {num_single_layers} single blocks, computed from that:

{steps}

*error*: of the output of a model of one double and one single block, against dense float32 with the same weights.
Scales for {group} inputs take the exact path, which decodes the codes and multiplies as the dense layer does; the
[integer kernels](../speed.md) need one scale per matrix or row.

## What this does not show

- Pictures: random weights draw noise. The published model was not downloaded.
- Wall-clock time of an idle machine: other programs were running. Processor time is about what one thread takes alone.
- Float32 as a whole model: its blocks alone.
- More threads, a GPU, other sizes, the text encoder and the VAE.
"""


def page(data: dict) -> str:
    """The Markdown; every measured number in it comes from `data`."""
    sizes, blocks = data["sizes"], data["blocks"]
    dense = {dtype: median_times(blocks, f"dense, {dtype}") for dtype in ("float32", "bfloat16")}
    block_rows, step_rows = [], []
    for mode in BLOCK_MODES:
        times, beside = median_times(blocks, mode), dense[mode.split(", ")[1]]
        cells = [f"{times[kind]:.2f} ({times[kind] / beside[kind]:.2f})" for kind in times]
        block_rows.append([mode, *cells, f"{blocks['relative_error'][mode]:.1g}"])
        step_rows.append([mode, f"{whole_step(times):.0f}", f"{whole_step(times) / whole_step(beside):.2f}"])
    forward_rows = [
        [
            mode,
            *(f"{found[key]:.2f}" for key in ("imports_gib", "loaded_gib", "peak_gib")),
            f"{found['cpu_seconds']:.0f}",
        ]
        for mode, found in data["forward"].items()
    ]
    weights, other = sizes["ternary_weights"], sizes["other_parameters"]
    return PAGE.format(
        **{key: KLEIN_4B[key] for key in ("num_layers", "num_single_layers")},
        machine=data["machine"],
        command=data["command"],
        width=KLEIN_4B["num_attention_heads"] * KLEIN_4B["attention_head_dim"],
        parameters=(weights + other) / 1e9,
        ternary_layers=sizes["ternary_layers"],
        ternary_weights=weights / 1e9,
        other=other / 1e6,
        group=GROUP,
        packed=sizes["packed_bytes"] / 1e6,
        dense=sizes["dense_bytes"] / 1e6,
        bound=bound(sizes) / 1e6,
        import_peak=data["import"]["peak_gib"],
        import_cpu=data["import"]["cpu_seconds"],
        image_tokens=f"{SIDE * SIDE:,}",
        text_tokens=TEXT_TOKENS,
        forward=table(["", "imports, GiB", "loaded, GiB", "peak, GiB", "processor seconds"], forward_rows),
        tokens=f"{sum(blocks['tokens']):,}",
        turns=len(blocks["cpu_seconds"]["double"]["dense, float32"]),
        blocks=table(["", "double (over dense)", "single (over dense)", "error"], block_rows),
        steps=table(["", "processor seconds", "over dense"], step_rows),
    )


def median_times(blocks: dict, mode: str) -> dict[str, float]:
    return {kind: statistics.median(times[mode]) for kind, times in blocks["cpu_seconds"].items()}


def whole_step(times: dict[str, float]) -> float:
    return KLEIN_4B["num_layers"] * times["double"] + KLEIN_4B["num_single_layers"] * times["single"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
