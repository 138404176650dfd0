"""What `benchmark.py kernels` and `benchmark.py step` measure: layers and blocks, side by side in one process.

The results go to JSON first; kernel_page.py writes page and plot from that alone.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

import kernel_page
from diffusers_terdit import TerDiTTransformer2DModel, pack_ternary
from diffusers_terdit.models.transformer_terdit import SIZES
from diffusers_terdit.ops import dequantize, integer_linear, reference, ternary_linear, unpack_ternary
from diffusers_terdit.ops.cpu import choose, decode


SHAPES = [  # (outputs, inputs): attention, feed-forward in and out, adaLN, of 600M and of 4.2B
    *[(1536, 1536), (4096, 1536), (1536, 4096), (9216, 1024)],
    *[(3072, 3072), (8192, 3072), (3072, 8192), (18432, 1024)],
]
SCALE = 2.0**-5  # a power of two, so that bfloat16 holds scale * T, too
INSTRUCTION_SETS = ("avx512_vnni_lookup", "avx512_vnni", "avx_vnni", "avx2")
FEW_ROWS, MORE_TURNS = 64, 5  # calls of less than this many rows are quick: so many times the turns
ERROR_ROWS = 64

CHECKED_SHAPES = [  # (rows, outputs, inputs) of a kernel that somebody brings; outputs are a multiple of 4 when packed
    *[(1, 4, 1), (1, 64, 48), (2, 128, 129), (3, 36, 65), (5, 100, 31), (7, 60, 100), (8, 256, 256), (33, 132, 1023)],
    *[(64, 1536, 512), (257, 520, 385), (512, 768, 1152), (1000, 12, 77), (2048, 96, 130)],
]

Linear = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Mode(NamedTuple):
    name: str
    dtype: str


DENSE = {dtype: Mode(kernel_page.DENSE, dtype) for dtype in ("float32", "bfloat16")}


def add_arguments(commands) -> None:
    """The options of both commands."""
    layers = commands.add_parser("kernels", help="packed layers of every mode beside dense ones")
    layers.add_argument("--rows", type=int, nargs="+", default=[512, 2048, 8, 2], help="of the input")
    layers.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="OUTPUTSxINPUTS")
    layers.add_argument(
        "--kernel",
        type=kernel_source,
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a function (input, weight_packed, weight_scale, bias) -> output to check and to time; may be repeated",
    )
    layers.add_argument("--kernel_dtype", choices=["float32", "bfloat16"], default="float32", help="of its input")
    layers.add_argument("--tolerance", type=float, default=1e-2, help="relative error that --kernel may have")
    step = commands.add_parser("step", help="whole blocks of every mode beside dense ones, and what a step costs")
    step.add_argument("--presets", choices=SIZES, nargs="+", default=["terdit-600m-256", "terdit-4.2b-256"])
    for sub, turns in ((layers, 7), (step, 7)):
        sub.add_argument("--isa", choices=INSTRUCTION_SETS, help="of the integer kernels; default the best there is")
        sub.add_argument("--turns", type=int, default=turns, help="calls of each mode, after one that warms up")
        sub.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
        sub.add_argument("--render", action="store_true", help="measure nothing, write page and plot from the JSON")


def shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or int(found[1]) % 4 or not int(found[1]) or not int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no OUTPUTSxINPUTS with outputs a multiple of 4, as 1536x1024")
    return int(found[1]), int(found[2])


def kernel_source(text: str) -> tuple[str, Linear]:
    """ "module:function", the module importable or in the present folder: (text, function)."""
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise argparse.ArgumentTypeError(f"{text!r} is no module:function, as my_kernels:linear")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise argparse.ArgumentTypeError(
            f"module {module!r} of {text!r} cannot be imported: {type(error).__name__}: {error}. Put it here, or"
            " install it."
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise argparse.ArgumentTypeError(f"module {module!r} has no function {name!r}; define it there")
    return text, found


def run(args: argparse.Namespace, machine: str, command: str) -> None:
    """`kernels` or `step`: measure into the JSON, then write page and plot from it."""
    path = args.output_dir / f"{args.command}.json"
    if args.render and not path.exists():
        raise SystemExit(f"{path} does not exist; measure first, without --render.")
    if args.turns < 1:
        raise SystemExit(f"--turns must be 1 or more, got {args.turns}.")
    data = json.loads(path.read_text()) if path.exists() else {"places": []}
    if not args.render:
        sets = instruction_sets()
        if args.isa and args.isa not in sets:
            raise SystemExit(
                f"--isa {args.isa}: the integer kernels can run here in {', '.join(sets)}."
                if sets
                else f"--isa {args.isa}: the integer kernels cannot run here; they need numba and AVX2."
            )
        isa = args.isa or (sets[0] if sets else None)
        present = place_of(machine, isa, forced=isa is not None and isa != sets[0])
        present["left_out"] = left_out(isa)
        measure = measure_layers if args.command == "kernels" else measure_blocks
        with torch.inference_mode(), only(isa):
            for records in measure(args, present["left_out"]):
                put(data, present, command, records)
                save(data, path)
    kernel_page.write(args.command, data, args.output_dir)


def instruction_sets() -> tuple[str, ...]:
    """In which the integer kernels can run here, best first."""
    return tuple(choose.integer_kernels())


@contextlib.contextmanager
def only(isa: str | None) -> Iterator[None]:
    """The integer kernels run in this instruction set and no other."""
    if isa is None:
        yield
        return
    kernel = choose.integer_kernels()[isa]
    with patch.object(choose, "integer_kernels", lambda: {isa: kernel}):
        yield


def place_of(machine: str, isa: str | None, forced: bool) -> dict:
    """What tells one table from another."""
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "isa": isa,
        "forced": forced,
        "numba": version("numba") if isa else None,
        "limits": {name: os.environ[name] for name in kernel_page.LIMITS if name in os.environ},
    }


def put(data: dict, place: dict, command: str, records: list[dict]) -> None:
    """Add records to those of their place; what is there of the same layer and rows, or preset, is replaced."""
    key = ("machine", "threads", "isa", "numba", "limits")
    for known in data["places"]:
        if all(known[name] == place[name] for name in key):
            break
    else:
        known = {**place, "commands": [], "records": []}
        data["places"].append(known)
    known |= place
    # all modes of a layer or block: ratios to a dense layer of another run would stand beside each other
    measured = {kernel_page.measured(record) for record in records}
    kept = [record for record in known["records"] if kernel_page.measured(record) not in measured]
    known["records"] = [*kept, *({**record, "command": command} for record in records)]
    known["commands"] = list(dict.fromkeys(record["command"] for record in known["records"]))


def save(data: dict, path: Path) -> None:
    """JSON with a record on a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    places = []
    for place in data["places"]:
        head = json.dumps({key: value for key, value in place.items() if key != "records"})
        records = ",\n".join(json.dumps(record) for record in place["records"])
        places.append(f'{head[:-1]}, "records": [\n{records}\n]}}')
    partial_file = path.with_suffix(".partial")
    partial_file.write_text('{"places": [\n' + ",\n".join(places) + "\n]}\n")
    partial_file.replace(path)


def left_out(isa: str | None) -> list[str]:
    """Modes, with their dtypes, that cannot or need not be measured here."""
    reasons = [] if isa else ["int16 float32", "int16 bfloat16", "int8 float32", "int8 bfloat16"]
    if not has_fast_bfloat16():
        reasons.append("dense bfloat16")
        if decode.matmul_dtype(torch.bfloat16) == torch.bfloat16:  # the processor could, the libraries may not
            reasons.append("exact bfloat16")
    return reasons


def has_fast_bfloat16() -> bool:
    """Whether a matmul in bfloat16 beats float32 here: whatever processor and libraries say, it is tried out."""
    functions = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(256, 512).to(dtype), torch.randn(512, 512).to(dtype)
        functions[str(dtype)] = partial(nn.functional.linear, x, weight)
    times = in_turns(functions, 5)["cpu_seconds"]
    return statistics.median(times["torch.bfloat16"]) < statistics.median(times["torch.float32"])


def in_turns(functions: dict, turns: int, progress: Callable[[], object] | None = None) -> dict[str, dict]:
    """Seconds and processor seconds of every call: {"seconds": {key: [...]}, "cpu_seconds": {key: [...]}}."""
    times: dict[str, dict] = {clock: {key: [] for key in functions} for clock in ("seconds", "cpu_seconds")}
    for turn in range(turns + 1):
        # there and back, so that a drift of the machine's speed falls on each side of a pair
        for key in list(functions)[:: 1 if turn % 2 else -1]:
            start, busy = time.perf_counter(), time.process_time()
            functions[key]()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
            if turn:  # the first one warms up
                times["seconds"][key].append(seconds)
                times["cpu_seconds"][key].append(cpu_seconds)
        if progress:
            progress()
    return times


def speed(base: list[float], own: list[float]) -> list[float]:
    """How many times as fast as the other of each pair: [median, lowest, highest]."""
    ratios = [a / b for a, b in zip(base, own, strict=True)]
    return [float(f"{value:.4g}") for value in (statistics.median(ratios), min(ratios), max(ratios))]


def speeds(times: dict[str, dict], key: Callable[[Mode], object], mode: Mode) -> dict[str, list[float]]:
    """Speed over dense of both dtypes, as far as it was measured, by either clock."""
    found = {}
    for clock, prefix in (("seconds", ""), ("cpu_seconds", "cpu_")):
        for dtype, dense in DENSE.items():
            if key(dense) in times[clock]:
                found[f"{prefix}over_{dtype}"] = speed(times[clock][key(dense)], times[clock][key(mode)])
    return found


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the float64 result."""
    return float((output.double() - expected).norm() / expected.norm())


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


# Layers


def new_input(kind: str, rows: int, features: int, generator: torch.Generator) -> Tensor:
    """(rows, features) float32: "gaussian", "gated" as down_proj sees it, or "outliers": 0.1 % of it 20 times."""
    x = torch.randn(rows, features, generator=generator)
    if kind == "gated":
        return nn.functional.silu(x) * torch.randn(rows, features, generator=generator)
    if kind == "outliers":
        return torch.where(torch.rand(rows, features, generator=generator) < 1e-3, 20 * x, x)
    return x


def unpack_every_call(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """How the authors' code runs a packed layer: a new float32 weight in every call."""
    return nn.functional.linear(input, dequantize(unpack_ternary(weight_packed), weight_scale), bias)


def layer_modes(weight: Tensor, skipped: list[str], args: argparse.Namespace) -> dict[Mode, Linear]:
    """What to time for a layer whose dense weight is given: (N, K) float32."""
    modes: dict[Mode, Linear] = {}
    for dtype, mode in DENSE.items():
        dense = weight.to(getattr(torch, dtype))
        modes[mode] = lambda x, packed, scale, bias, dense=dense: nn.functional.linear(x, dense, bias)
    modes[Mode(kernel_page.REFERENCE, "float32")] = unpack_every_call
    for dtype in DENSE:
        modes[Mode("exact", dtype)] = ternary_linear
    for bits, dtype in itertools.product((16, 8), DENSE):
        modes[Mode(f"int{bits}", dtype)] = partial(integer_linear, bits=bits)
    for name, function in args.kernel:
        modes[Mode(name, args.kernel_dtype)] = function
    return {mode: modes[mode] for mode in modes if " ".join(mode) not in skipped}


def measure_layers(args: argparse.Namespace, skipped: list[str]) -> Iterator[list[dict]]:
    """The records of every shape and number of rows."""
    if min(args.rows) < 1:
        raise SystemExit(f"--rows must be 1 or more, got {min(args.rows)}.")
    for name, function in args.kernel:
        check_kernel(name, function, getattr(torch, args.kernel_dtype), args.tolerance)
    cases = list(itertools.product(args.shapes, args.rows))
    turns = [args.turns * (MORE_TURNS if rows < FEW_ROWS else 1) for _, rows in cases]
    with tqdm(total=sum(turns) + len(turns), unit="turn", smoothing=0) as bar:
        for ((out_features, in_features), rows), count in zip(cases, turns, strict=True):
            bar.set_description(f"{out_features} x {in_features}, {rows} rows")
            yield measure_layer(out_features, in_features, rows, count, skipped, args, bar.update)


def measure_layer(
    out_features: int, in_features: int, rows: int, turns: int, skipped: list[str], args: argparse.Namespace, progress
) -> list[dict]:
    """Records of one layer, one for each mode."""
    generator = torch.Generator().manual_seed(0)
    ternary = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, generator=generator)
    packed, scale = pack_ternary(ternary), torch.tensor([SCALE])
    weight = dequantize(ternary, scale)
    modes = layer_modes(weight, skipped, args)
    x = new_input("gaussian", rows, in_features, generator)
    inputs = {dtype: x.to(getattr(torch, dtype)) for dtype in DENSE}
    times = in_turns(
        {mode: partial(function, inputs[mode.dtype], packed, scale, None) for mode, function in modes.items()},
        turns,
        progress,
    )
    errors: dict[Mode, dict[str, float]] = {mode: {} for mode in modes}
    exact = weight.double()
    for kind in kernel_page.INPUTS:
        x = new_input(kind, min(rows, ERROR_ROWS), in_features, generator)
        expected = nn.functional.linear(x.double(), exact)
        for mode, function in modes.items():
            output = function(x.to(getattr(torch, mode.dtype)), packed, scale, None)
            errors[mode][kind] = rounded(relative_error(output, expected))
    return [
        {
            "shape": [out_features, in_features],
            "rows": rows,
            "mode": mode.name,
            "dtype": mode.dtype,
            "turns": turns,
            "seconds": rounded(statistics.median(times["seconds"][mode])),
            "cpu_seconds": rounded(statistics.median(times["cpu_seconds"][mode])),
            **speeds(times, lambda mode: mode, mode),
            "error": errors[mode],
        }
        for mode in modes
    ]


def check_kernel(name: str, function: Linear, dtype: torch.dtype, tolerance: float) -> None:
    """Compare with the reference in float64 over `CHECKED_SHAPES`; a `SystemExit` says where it is wrong.

    The relative error is the Frobenius norm's. One wrong value could hide in that, so no difference may be above ten
    times the tolerance, times the root mean square of the outputs. New memory holds NaN meanwhile.
    """
    for (rows, out_features, in_features), granularity, with_bias in itertools.product(
        CHECKED_SHAPES, ("tensor", "row"), (False, True)
    ):
        generator = torch.Generator().manual_seed(rows * out_features + in_features)
        packed = pack_ternary(torch.randint(-1, 2, (out_features, in_features), generator=generator))
        shape = reference.scale_shape(out_features, in_features, granularity)
        scale = 0.02 + 0.01 * torch.rand(shape, generator=generator)
        bias = torch.randn(out_features, generator=generator) if with_bias else None
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        case = (
            f"{rows} rows, {out_features} x {in_features}, scale of a {granularity}, {'a' if with_bias else 'no'} bias"
        )
        expected = reference.ternary_linear(x.double(), packed, scale, bias)
        given = [None if tensor is None else tensor.clone() for tensor in (x, packed, scale, bias)]
        try:
            with garbage_in_new_memory():
                output = function(*given)
        except Exception as error:
            raise SystemExit(
                f"{name} fails at {case}: {type(error).__name__}: {error}. It must take (input, weight_packed,"
                " weight_scale, bias)."
            ) from error
        if not isinstance(output, Tensor) or output.shape != expected.shape or output.dtype != dtype:
            got = (tuple(output.shape), output.dtype) if isinstance(output, Tensor) else type(output).__name__
            raise SystemExit(f"{name} must return {tuple(expected.shape)}, {dtype} at {case}; it returned {got}.")
        for tensor, before in zip(given, (x, packed, scale, bias), strict=True):
            if before is not None and not torch.equal(tensor, before):
                raise SystemExit(f"{name} changes what it is given, at {case}. Write to a new tensor.")
        if not output.isfinite().all():
            raise SystemExit(f"{name} gives NaN or infinity at {case}; does it write every output?")
        difference = (output.double() - expected).abs().max().item()
        error = relative_error(output, expected) if expected.any() else difference
        limit = 10 * tolerance * expected.square().mean().sqrt().item()
        if error > tolerance or difference > limit:
            raise SystemExit(
                f"{name} is wrong at {case}: relative error {error:.2g} (tolerance {tolerance:g}), largest difference"
                f" {difference:.2g} (at most {limit:.2g}). --tolerance allows more."
            )


@contextlib.contextmanager
def garbage_in_new_memory() -> Iterator[None]:
    """`torch.empty` gives NaN and the largest integers, so that an output that nobody wrote shows."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


# Blocks


def random_model(preset: str) -> TerDiTTransformer2DModel:
    """The preset with one block, packed; random codes, scales that bfloat16 holds, and gates of the order of one."""
    torch.manual_seed(0)
    model = TerDiTTransformer2DModel.from_preset(preset, num_layers=1, weight_format="packed").eval()
    for layer in model.ternary_layers().values():
        shape = (layer.out_features, layer.in_features)
        layer.weight_packed.copy_(pack_ternary(torch.randint(-1, 2, shape, dtype=torch.int8)))
        layer.weight_scale.fill_(2.0 ** round(math.log2(1 / math.sqrt(layer.in_features))))
    nn.init.ones_(model.transformer_blocks[0].adaln.norm.weight)
    return model


def model_modes(model: TerDiTTransformer2DModel, skipped: list[str]) -> dict[Mode, TerDiTTransformer2DModel]:
    """The model in every mode, each with weights of its own."""
    twin = model.dequantize()
    modes = {DENSE["float32"]: twin, DENSE["bfloat16"]: copy.deepcopy(twin).bfloat16()}
    for (name, bits), dtype in itertools.product({"exact": None, "int16": 16, "int8": 8}.items(), DENSE):
        if f"{name} {dtype}" not in skipped:
            own = copy.deepcopy(model)
            modes[Mode(name, dtype)] = own.bfloat16() if dtype == "bfloat16" else own
            own.set_activation_bits(bits)
    return {mode: modes[mode] for mode in modes if " ".join(mode) not in skipped}


def guided_input(model: TerDiTTransformer2DModel, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and labels of one image: the label's row and the null label's."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    labels = torch.tensor([min(207, config.num_classes - 1), config.num_classes])
    return latents.repeat(2, 1, 1, 1).to(dtype), torch.tensor(500), labels


def block_input(model: TerDiTTransformer2DModel) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What the first block of a float32 model gets: tokens, condition, rotary embedding."""
    caught: list = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda block, inputs: caught.append(inputs[:3]))
    model(*guided_input(model, torch.float32))
    hook.remove()
    return caught[0]


def measure_blocks(args: argparse.Namespace, skipped: list[str]) -> Iterator[list[dict]]:
    """The records of every preset."""
    with tqdm(total=len(args.presets) * (args.turns + 1), unit="turn", smoothing=0) as bar:
        for preset in args.presets:
            bar.set_description(preset)
            yield measure_block(preset, args.turns, skipped, bar.update)


def measure_block(preset: str, turns: int, skipped: list[str], progress) -> list[dict]:
    """Records of one preset, one for each mode."""
    modes = model_modes(random_model(preset), skipped)
    layers = SIZES[preset]["num_layers"]
    tokens, condition, rotary = block_input(modes[DENSE["float32"]])
    exact = copy.deepcopy(modes[DENSE["float32"]].transformer_blocks[0]).double()
    expected = exact(tokens.double(), condition.double(), rotary)
    del exact
    functions: dict = {}
    errors = {}
    for mode, model in modes.items():
        dtype = getattr(torch, mode.dtype)
        block = model.transformer_blocks[0]
        inputs = tokens.to(dtype), condition.to(dtype), rotary
        errors[mode] = rounded(relative_error(block(*inputs), expected))
        model.transformer_blocks = nn.ModuleList()  # what is left is the rest of the model
        functions["block", mode] = partial(block, *inputs)
        functions["rest", mode] = partial(model, *guided_input(model, dtype))
    times = in_turns(functions, turns, progress)
    for clock in times.values():
        for mode in modes:
            parts = zip(clock["rest", mode], clock["block", mode], strict=True)
            clock["step", mode] = [rest + layers * block for rest, block in parts]
    records = []
    for mode in modes:
        record = {"preset": preset, "layers": layers, "tokens": list(tokens.shape[:2]), "turns": turns}
        record |= {"mode": mode.name, "dtype": mode.dtype}
        for part in ("block", "rest", "step"):
            key = partial(lambda part, mode: (part, mode), part)
            medians = {clock: rounded(statistics.median(times[clock][key(mode)])) for clock in times}
            record[part] = medians | ({} if part == "rest" else speeds(times, key, mode))
        records.append({**record, "error": errors[mode]})
    return records
