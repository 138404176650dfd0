"""What `benchmark.py gpu` measures on a CUDA device: layers, whole steps, and what fits on small cards.

The results go to gpu.json as they come, and `page` writes gpu.md from that alone. A run that was stopped goes on when
it is started again. `--device cpu` runs the same code without CUDA graphs and memory limits, to try it out; such
figures are no measurement.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, pack_ternary
from diffusers_terdit import layers as package_layers
from diffusers_terdit.models.transformer_terdit import SIZES
from diffusers_terdit.ops import dequantize, integer_linear, ternary_linear
from diffusers_terdit.ops.gpu import choose, decode
from diffusers_terdit.pipelines.schedulers import default_scheduler
from kernel_benchmark import SCALE, SHAPES, guided_input, new_input, relative_error, rounded, shape, unpack_every_call
from kernel_page import table


PARTS = ("layers", "steps", "cards")
DENSE, REFERENCE = "dense", "unpack in every call"
CACHE_BYTES = 2**28  # written between calls, so that no weight stays in the GPU's cache, as in a whole model
PLACEMENTS = ("resident", "model offload", "group offload")
PACKAGES = ("triton", "gemlite", "humming-kernels", "sdnq", "torchao")
Layer = Callable[[Tensor], Tensor]


def add_arguments(commands) -> None:
    sub = commands.add_parser(
        "gpu", help="layers, steps and small cards on a CUDA device, beside dense ones and peers"
    )
    sub.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    sub.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    sub.add_argument("--dtypes", choices=["bfloat16", "float16"], nargs="+", default=["bfloat16", "float16"])
    sub.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="OUTPUTSxINPUTS")
    sub.add_argument("--rows", type=int, nargs="+", default=[2, 512, 4096], help="of a layer's input")
    sub.add_argument("--presets", choices=SIZES, nargs="+", default=["terdit-600m-256", "terdit-4.2b-256"])
    sub.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images of a step, guided")
    sub.add_argument("--limits", type=float, nargs="+", default=[2, 4, 8], help="GB of memory of the small cards")
    sub.add_argument(
        "--placements", choices=PLACEMENTS, nargs="+", default=list(PLACEMENTS), help="of the small cards"
    )
    sub.add_argument("--weights", choices=["all", "packed"], default="all", help="of the small cards")
    sub.add_argument("--turns", type=int, default=20, help="calls of each mode, after those that warm up")
    sub.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    sub.add_argument("--fresh", action="store_true", help="measure again what the JSON already holds")
    sub.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")
    sub.add_argument("--measure", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, machine: str, command: str) -> None:
    """Measure into gpu.json part by part, then write gpu.md."""
    if args.measure:
        print(json.dumps(measure_card(**json.loads(args.measure))))
        return
    path = args.output_dir / "gpu.json"
    data = loaded(path, args.render)
    if min(args.turns, *args.rows, *args.batch_sizes) < 1:
        least = min(args.turns, *args.rows, *args.batch_sizes)
        raise SystemExit(f"--turns, --rows and --batch_sizes must be 1 or more, got {least}.")
    if not args.render:
        for part in args.parts:
            data[part] = resumed({} if args.fresh else data.get(part, {}), place(args.device, machine), command)
            measured = {"layers": layers, "steps": steps, "cards": cards}[part]
            for records in measured(args, data[part]["left_out"], data[part]["records"]):
                data[part]["records"] += records
                save(path, data, page(data))
    save(path, data, page(data))
    print(f"Written to {path.with_suffix('.md')}")


def loaded(path: Path, render: bool) -> dict:
    """What the JSON holds so far; to render, it must be there."""
    if render and not path.exists():
        raise SystemExit(f"{path} does not exist; measure first, without --render.")
    return json.loads(path.read_text()) if path.exists() else {}


def resumed(part: dict, place: str, command: str) -> dict:
    """The part as a stopped run left it if that ran at this place, else an empty one. The command names no folder."""
    kept = part if part.get("place") == place else {"left_out": [], "records": []}
    return kept | {"place": place, "command": re.sub(r" --output_dir \S+", "", command)}


def script_command() -> str:
    """How a script of examples/benchmarks was called."""
    return f"PYTHONPATH=src:examples python examples/benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"


def is_held(records: list[dict], **case: object) -> bool:
    return any(record.items() >= case.items() for record in records)


def save(path: Path, data: object, page: str) -> None:
    """Write the JSON, whole whenever this is stopped, and its page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(data, indent=1) + "\n")
    partial_file.replace(path)
    path.with_suffix(".md").write_text(page, "utf-8")


def place(device: str, machine: str) -> str:
    """Device, versions, and whether the package's own kernel runs."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This torch sees no GPU. --device cpu tries the code, but what it prints is no measurement.")
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(ImportError):
            versions.append(f"{package} {version(package)}")
    if device == "cpu":
        return f"no GPU: a trial of the code on {machine}; {', '.join(versions)}"
    properties = torch.cuda.get_device_properties(0)
    decoder = "PyTorch" if choose.decoder(torch.device("cuda", 0)) is decode.unpack else "Triton"
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}; {machine};"
        f" {', '.join(versions)}; weights decoded by {decoder}"
    )


# Time


def captured(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The function's kernels as a CUDA graph: no launch from the host is timed."""
    if device == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def in_turns(functions: dict, turns: int, device: str) -> dict:
    """Seconds of every call, {key: [...]}: one call of each per turn, the order reversed from turn to turn."""
    times: dict = {key: [] for key in functions}
    if device == "cpu":
        for turn in range(turns + 1):
            for key in list(functions)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                functions[key]()
                times[key].append(time.perf_counter() - start)
        return {key: seconds[1:] for key, seconds in times.items()}
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    for turn in range(turns + 2):
        for key in list(functions)[:: 1 if turn % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()  # also keeps the GPU busy while the host queues what follows
            start.record()
            functions[key]()
            end.record()
            times[key].append((start, end))
    torch.cuda.synchronize()
    return {key: [a.elapsed_time(b) / 1e3 for a, b in events[2:]] for key, events in times.items()}


def ratio(own: list[float], base: list[float]) -> list[float]:
    """Time over that of the other of each pair: [median, lowest, highest]."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return [float(f"{value:.4g}") for value in (statistics.median(ratios), min(ratios), max(ratios))]


# Layers


def layers(args: argparse.Namespace, left_out: list[str], held: list[dict]) -> Iterator[list[dict]]:
    """Records of every shape, number of rows and dtype that are not held."""
    cases = list(itertools.product(args.shapes, args.rows, args.dtypes))
    for (out_features, in_features), rows, dtype in tqdm(cases, unit="layer"):
        if not is_held(held, shape=[out_features, in_features], rows=rows, dtype=dtype):
            yield measure_layer(out_features, in_features, rows, dtype, args, left_out)


def measure_layer(
    out_features: int, in_features: int, rows: int, dtype: str, args: argparse.Namespace, left_out: list[str]
) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, generator=generator)
    packed, scale = pack_ternary(codes).to(args.device), torch.tensor([SCALE], device=args.device)
    weight = dequantize(codes, torch.tensor([SCALE])).to(args.device)  # bfloat16 and float16 hold it exactly
    x = new_input("gaussian", rows, in_features, generator).to(args.device)
    half = x.to(getattr(torch, dtype))
    dense = weight.to(half.dtype)
    modes: dict[str, tuple[Layer, Tensor]] = {
        DENSE: (lambda x: nn.functional.linear(x, dense), half),
        REFERENCE: (lambda x: with_tf32(lambda: unpack_every_call(x, packed, scale, None)), x),
        "exact": (lambda x: ternary_linear(x, packed, scale), half),
        "decode alone": (lambda x: choose.decoder(x.device)(packed, x.dtype), half),
        "int16": (lambda x: integer_linear(x, packed, scale, bits=16), half),
        "int8": (lambda x: integer_linear(x, packed, scale, bits=8), half),
    }
    # as in a compiled model, where the scale and the rounding of activations fuse with what surrounds the layer
    for name in ("exact", "int16", "int8"):
        modes[f"{name}, compiled"] = (torch.compile(modes[name][0], fullgraph=True), half)
    if args.device == "cuda":
        for name, make in PEERS.items():
            try:
                modes[name] = (make(codes, SCALE, half.dtype), half)
            except Exception as error:  # a library that is not there, or not for this GPU: whatever it raises
                say_once(left_out, f"{name}: {first_line(error)}")
    functions, errors = {}, {}
    expected = x.double() @ weight.double().T
    torch._dynamo.reset()
    with torch.inference_mode():
        for name, (function, input) in modes.items():
            try:
                output = function(input)
                if name != "decode alone":
                    errors[name] = rounded(relative_error(output, expected))
                functions[name] = captured(partial(function, input), args.device)
            except Exception as error:
                say_once(left_out, f"{name}, {dtype}: {first_line(error)}")
        times = in_turns(functions, args.turns, args.device)
    return [
        {
            "shape": [out_features, in_features],
            "rows": rows,
            "dtype": dtype,
            "mode": name,
            "microseconds": rounded(1e6 * statistics.median(times[name])),
            "over_dense": ratio(times[name], times[DENSE]),
            "error": errors.get(name),
        }
        for name in functions
    ]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def say_once(left_out: list[str], reason: str) -> None:
    if reason not in left_out:
        left_out.append(reason)
        tqdm.write(f"left out: {reason}", file=sys.stderr)


# Other libraries, by their public interfaces; each takes codes (N, K) int8 and a scale, and gives a layer


def gemlite(codes: Tensor, scale: float, dtype: torch.dtype, name: str) -> Layer:
    helper = import_module("gemlite.helper")
    layer = getattr(helper, name)(device="cuda:0", dtype=dtype)
    return layer.from_weights(codes.to(dtype), torch.tensor(scale))


def humming(codes: Tensor, scale: float, dtype: torch.dtype, activations: str | None = None) -> Layer:
    module = import_module("humming.layer")
    layer = module.HummingLayer(
        shape_n=codes.shape[0],
        shape_k=codes.shape[1],
        weight_config={"quant_method": "bitnet"},
        input_config={"dtype": activations} if activations else None,
        torch_dtype=dtype,
    ).cuda()
    quarters = (codes + 1).to(torch.uint8).chunk(4)  # the first rows in the lowest bits
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    layer.load_from_tensors({"weight": packed, "weight_scale": torch.tensor([1 / scale], dtype=dtype)})
    layer.transform()
    return layer


def dense_layer(codes: Tensor, scale: float, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(codes.shape[1], codes.shape[0], bias=False, dtype=dtype, device="cuda")
    with torch.no_grad():
        layer.weight.copy_(codes * scale)
    return layer


def sdnq(codes: Tensor, scale: float, dtype: torch.dtype) -> Layer:
    module = import_module("sdnq")
    config = module.SDNQConfig(weights_dtype="int2", use_quantized_matmul=True)
    layer = nn.Sequential(dense_layer(codes, scale, dtype))
    layer, _ = import_module("sdnq.quantizer").apply_sdnq_to_module(layer, config, torch_dtype=dtype)
    return layer


def torchao(codes: Tensor, scale: float, dtype: torch.dtype) -> Layer:
    quantization = import_module("torchao.quantization")
    layer = dense_layer(codes, scale, dtype)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    return torch.compile(layer, fullgraph=True)


PEERS: dict[str, Callable[[Tensor, float, torch.dtype], Layer]] = {
    "gemlite A16W158": partial(gemlite, name="A16W158_INT"),
    "gemlite A8W158": partial(gemlite, name="A8W158_INT_dynamic"),
    "humming": humming,
    "humming int8": partial(humming, activations="int8"),
    "SDNQ int2, int8": sdnq,
    "torchao int8 weights and activations": torchao,
}


# Whole steps


def steps(args: argparse.Namespace, left_out: list[str], held: list[dict]) -> Iterator[list[dict]]:
    """Records of every preset, batch size and dtype that are not held."""
    for preset, dtype in itertools.product(args.presets, args.dtypes):
        batches = [b for b in args.batch_sizes if not is_held(held, preset=preset, batch=b, dtype=dtype)]
        if not batches:
            continue
        models = step_models(preset, getattr(torch, dtype), args.device)
        for batch in batches:
            torch._dynamo.reset()  # it keeps 8 graphs per function, whatever the model; the ninth would raise
            yield measure_step(models, preset, batch, dtype, args, left_out)
        del models
        if args.device == "cuda":
            torch.cuda.empty_cache()


def random_model(preset: str, device: str) -> TerDiTTransformer2DModel:
    """A packed model of random codes, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = TerDiTTransformer2DModel.from_preset(preset, weight_format="packed").eval()
    for layer in model.ternary_layers().values():
        codes = torch.randint(-1, 2, (layer.out_features, layer.in_features), dtype=torch.int8, device=device)
        layer.weight_packed.data.copy_(pack_ternary(codes))
        layer.weight_scale.data.fill_(2.0 ** round(-0.5 * math.log2(layer.in_features)))
    nn.init.normal_(model.proj_out.weight, std=0.02)  # a new model's is zero, and so would be every output
    return model


def step_models(preset: str, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The same weights in every mode."""
    packed = random_model(preset, device)
    models: dict[str, nn.Module] = {REFERENCE: packed}  # float32, as the authors run it
    half = copy.deepcopy(packed).to(dtype)
    models[f"{DENSE}, eager"] = packed.dequantize().to(dtype)
    models["exact, eager"] = half
    for name, bits in (("exact", None), ("int16", 16), ("int8", 8)):
        models[name] = copy.deepcopy(half)
        models[name].set_activation_bits(bits)
    models[DENSE] = copy.deepcopy(models[f"{DENSE}, eager"])
    for name in (DENSE, "exact", "int16", "int8"):
        models[name].compile_repeated_blocks(fullgraph=True, dynamic=False)  # else the second batch size is dynamic
    return models


def measure_step(
    models: dict[str, nn.Module], preset: str, batch: int, dtype: str, args: argparse.Namespace, left_out: list[str]
) -> list[dict]:
    """One forward pass of guided images: compiled blocks in a CUDA graph, but for "eager" and the authors' scheme."""
    functions, outputs = {}, {}
    with torch.inference_mode():
        for name, model in models.items():
            sample, timestep, labels = guided_input(model, model.dtype)
            inputs = [
                tensor.to(args.device) for tensor in (sample.repeat(batch, 1, 1, 1), timestep, labels.repeat(batch))
            ]
            ahead = {}
            if name != REFERENCE:  # the pipeline computes adaLN ahead, for many steps at once
                rows = inputs[1].expand(len(inputs[2])), inputs[2]
                ahead["modulation"] = model.modulations(*rows).contiguous()
            call = partial(model, *inputs, return_dict=False, **ahead)
            if name == REFERENCE:
                call = partial(as_the_authors, call)
            try:
                outputs[name] = call()[0].float()
                plain = name == REFERENCE or name.endswith("eager")
                functions[name] = call if plain else captured(call, args.device)
            except Exception as error:
                say_once(left_out, f"{preset}, {name}, {dtype}, batch {batch}: {first_line(error)}")
        times = in_turns(functions, args.turns, args.device)
    return [
        {
            "preset": preset,
            "batch": batch,
            "dtype": dtype,
            "mode": name,
            "milliseconds": rounded(1e3 * statistics.median(times[name])),
            "over_dense": ratio(times[name], times.get(DENSE, times[name])),
            "weights_bytes": sum(p.numel() * p.element_size() for p in models[name].parameters()),
            "error": rounded(relative_error(outputs[name], outputs.get(REFERENCE, outputs[name]).double())),
        }
        for name in functions
    ]


def with_tf32(call: Callable[[], object]) -> object:
    """Call with TF32 matmuls, as the authors' code does."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return call()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def as_the_authors(call: Callable[[], object]) -> object:
    """Run a packed float32 model as the authors' code does: TF32, and a new float32 weight in every call."""
    original = package_layers.linear
    package_layers.linear = lambda *arguments: unpack_every_call(*arguments[:4])
    try:
        return with_tf32(call)
    finally:
        package_layers.linear = original


# Small cards


def cards(args: argparse.Namespace, left_out: list[str], held: list[dict]) -> Iterator[list[dict]]:
    """One picture of the last preset with a VAE per memory limit and placement not held, each in its own process."""
    cases = itertools.product([None, *args.limits], (True, False), args.placements)
    cases = [case for case in cases if case[1] or args.weights == "all"]
    for limit, packed, placement in tqdm(cases, unit="card"):
        settings = {"preset": args.presets[-1], "limit": limit, "packed": packed, "placement": placement}
        settings |= {"dtype": args.dtypes[0], "device": args.device}
        if is_held(held, **settings):
            continue
        command = [
            sys.executable,
            str(Path(__file__).with_name("benchmark.py")),
            "gpu",
            "--measure",
            json.dumps(settings),
        ]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if result.returncode:
            say_once(left_out, f"{settings}: {result.stderr.strip().splitlines()[-1][:200]}")
            continue
        yield [settings | json.loads(result.stdout.strip().splitlines()[-1])]


def new_vae(device: str) -> AutoencoderKL:
    """A VAE of Stable Diffusion's size with random weights, 84 million; without a GPU a tiny one."""
    cuda = device == "cuda"
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if cuda else (8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 if cuda else 4,
        sample_size=256,
    ).eval()


def measure_card(
    preset: str, limit: float | None, packed: bool, placement: str, dtype: str, device: str, steps: int = 10
) -> dict:
    """Peak memory and seconds per step of a pipeline, or that it does not fit. Weights are of no picture."""
    cuda = device == "cuda"
    if cuda and limit:
        torch.cuda.set_per_process_memory_fraction(limit * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    half = getattr(torch, dtype)
    with torch.device("meta"):
        kind = {"weight_format": "packed"} if packed else {"ternary": False}
        transformer = TerDiTTransformer2DModel.from_preset(preset, **kind).to(half)
    transformer = transformer.to_empty(device="cpu").eval()
    for name, parameter in transformer.named_parameters():
        parameter.data.fill_(0b01011001 if name.endswith("weight_packed") else 0.01)
    torch.manual_seed(0)
    vae = new_vae(device).to(half)
    pipe = TerDiTPipeline(transformer=transformer, scheduler=default_scheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    try:
        if placement == "resident":
            pipe.to(device)
        elif placement == "model offload":
            pipe.enable_model_cpu_offload(device=device)
        else:
            options = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": cuda}
            transformer.enable_group_offload(torch.device(device), torch.device("cpu"), **options)
            vae.to(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            pipe(0, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {"fits": False}
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    reserved = torch.cuda.max_memory_reserved() if cuda else 0
    return {"fits": True, "seconds": rounded(seconds[-1]), "steps": steps, "peak_bytes": peak, "reserved": reserved}


# The page

INTRODUCTION = """\
# Ternary layers and models on a GPU

Rendered from [gpu.json](gpu.json) (`python examples/benchmark.py gpu --render`); each part names its command.
Dense layers and models hold the same ternary values: what a GPU draws, and so its clock, depends on them.
Every figure "over dense" is a time over the dense one of the same turn, the median with the lowest and highest pair in
brackets: below 1 is faster than dense. Modes: **exact** `set_activation_bits(None)`, **int16** and **int8**
`set_activation_bits(16)`, `(8)`; **unpack in every call**: the authors' scheme in float32 with TF32.
"""


def page(data: dict) -> str:
    parts = [INTRODUCTION]
    for part, write in (("layers", layers_section), ("steps", steps_section), ("cards", cards_section)):
        if part in data:
            parts.append(f"{write(data[part]['records'])}\n{data[part]['place']}\n")
            parts.append(f"```bash\n{data[part]['command']}\n```\n")
            if data[part]["left_out"]:
                parts.append("Left out:\n\n" + "".join(f"- {reason}\n" for reason in data[part]["left_out"]))
    return "\n".join(parts)


def spread(values: list[float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def grouped(records: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def layers_section(records: list[dict]) -> str:
    parts = [
        "## Layers\n\nEach call is a CUDA graph, with the GPU's cache cleared before it. Error: Frobenius norm of the"
        " difference from float64 over that of the result, normal inputs.\n"
    ]
    for (dtype, rows), found in grouped(records, "dtype", "rows").items():
        modes = list(dict.fromkeys(record["mode"] for record in found))
        lines = []
        for (size,), layer in grouped([{**r, "size": tuple(r["shape"])} for r in found], "size").items():
            own = {record["mode"]: record for record in layer}
            cells = [spread(own[mode]["over_dense"]) if mode in own else "-" for mode in modes if mode != DENSE]
            lines.append([f"{size[0]} x {size[1]}", f"{own[DENSE]['microseconds']:g}", *cells])
        header = ["outputs x inputs", "dense, us", *(mode for mode in modes if mode != DENSE)]
        parts.append(f"### {rows} rows, {dtype}: time over dense\n\n{table(header, lines)}")
    errors: dict[tuple, float] = {}
    for record in records:
        if record["error"] is not None:
            key = record["mode"], record["dtype"]
            errors[key] = max(errors.get(key, 0.0), record["error"])
    parts.append(
        "### Largest error\n\n"
        + table(["mode", "dtype", "error"], [[*key, f"{error:.1e}"] for key, error in errors.items()])
    )
    return "\n".join(parts)


def steps_section(records: list[dict]) -> str:
    parts = [
        "## Steps\n\nA forward pass of whole models for guided images (two rows each): compiled blocks in one CUDA"
        " graph; without either where it says eager, and for the authors' scheme. Error: of the output, against"
        " float32.\n"
    ]
    for (preset, dtype), found in grouped(records, "preset", "dtype").items():
        lines = [
            [
                str(record["batch"]),
                record["mode"],
                f"{record['milliseconds']:g}",
                spread(record["over_dense"]),
                f"{record['weights_bytes'] / 1e9:.2f}",
                f"{record['error']:.1e}",
            ]
            for record in found
        ]
        header = ["images", "mode", "step, ms", "time over dense", "weights, GB", "error"]
        parts.append(f"### {preset}, {dtype}\n\n{table(header, lines)}")
    return "\n".join(parts)


def cards_section(records: list[dict]) -> str:
    lines = []
    for record in records:
        limit = f"{record['limit']:g} GB" if record["limit"] else "none"
        kind = "packed" if record["packed"] else "dense"
        if record["fits"]:
            step = f"{1e3 * record['seconds'] / record['steps']:.1f}"
            lines.append([limit, kind, record["placement"], f"{record['peak_bytes'] / 1e9:.2f}", step])
        else:
            lines.append([limit, kind, record["placement"], "does not fit", "-"])
    model = f"{records[0]['preset']}, {records[0]['dtype']}" if records else ""
    words = (
        f"## Small cards\n\nOne guided picture ({model}, not compiled) with a VAE of 84 million weights, in a process"
        " whose CUDA memory is limited (`set_per_process_memory_fraction`). Peak: of allocated memory, VAE included."
        " Group offload streams one block at a time from the CPU; the VAE stays.\n"
    )
    return f"{words}\n{table(['limit', 'weights', 'placement', 'peak, GB', 'per step, ms'], lines)}"
