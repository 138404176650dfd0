"""`kernels` and `step`: packed layers, and whole blocks, next to dense ones that hold the same values, on a CPU.

Dense is measured as torch computes it, and as it is computed fastest here; `peers.py` says how, and what else is
measured where it is installed. All modes run in turns in one process. Before anything is timed, the tests of the
CPU's kernels have to pass.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

import peers
import shared
from diffusers_terdit import TerDiTTransformer2DModel, pack_ternary
from diffusers_terdit.evaluation.measured import now, sentence
from diffusers_terdit.ops import dequantize, integer_linear, reference, ternary_linear
from diffusers_terdit.ops.cpu import choose, decode
from shared import DTYPES, INPUTS, Results, by_clock, in_turns, new_input, ratios, relative_error, rounded


TESTS = ["tests/ops/cpu", "--ignore=tests/ops/cpu/test_instructions.py"]  # that file: caches of compiled code
SCALE = 2.0**-5  # a power of two, so that bfloat16 holds scale * T, too
# With less than FEW_ROWS rows a turn runs through layers whose dense weights are so many bytes in float32, and with a
# small model through several blocks: as in a model, the code is warm, and the weights come from memory.
FEW_ROWS, BYTES = 64, 2**28
ERROR_ROWS = 64
# (rows, outputs, inputs) at which somebody's kernel is compared with the reference
CHECKED_SHAPES = [(1, 4, 1), (2, 128, 129), (5, 100, 31), (257, 520, 385), (512, 768, 1152), (2048, 96, 130)]
STEPS = (250, 20)  # of a picture: the paper's, and a fast sampler's
ISA_NAMES = {
    "amx_int8": "AMX",
    "avx512_vnni_lookup": "AVX-512 VNNI with lookups",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "neon_sdot": "NEON sdot",
    None: "no integer kernels",
}

Linear = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Mode(NamedTuple):
    name: str
    dtype: str


DENSE = {dtype: Mode("dense", dtype) for dtype in DTYPES}  # `F.linear`
BEST = {dtype: Mode("best dense", dtype) for dtype in (*DTYPES, "int8")}
BASES = {**DENSE, **{f"best_{dtype}": mode for dtype, mode in BEST.items()}}  # by key of a record: "over_best_int8"
REFERENCE = Mode("unpack in every call", "float32")
OTHERS = (REFERENCE.name, *(peer.name for peer in peers.PEERS))  # not ours, and not dense: blue bars
BITS = {"exact": None, "int16": 16, "int8": 8}
GROUP = 128  # inputs with a scale of their own, as in Bonsai
IN_GROUPS = {f"{name}, groups of {GROUP}": bits for name, bits in BITS.items()}

# what the page of layers begins with: a mode, and the dtype of the dense layers that it is compared with
SAYS = [
    (Mode("exact", "float32"), "float32"),
    (Mode("int8", "float32"), "float32"),
    (Mode("int16", "bfloat16"), "bfloat16"),
    (Mode("int8", "bfloat16"), "bfloat16"),
    (Mode("int8", "bfloat16"), "int8"),
]

EXACT_IN_BFLOAT16 = ("amx_int8", "avx512_vnni", "avx2")  # where it is the default, and int16 is computed exactly, too


def add_arguments(commands) -> None:
    layers = commands.add_parser("kernels", help="packed layers of every mode next to dense ones, on a CPU")
    layers.add_argument("--rows", type=shared.positive, nargs="+", default=[512, 2048, 8, 2], help="of the input")
    layers.add_argument(
        "--kernel",
        type=kernel_source,
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a function (input, weight_packed, weight_scale, bias) -> output to check and to time; may be repeated",
    )
    layers.add_argument("--kernel_dtype", choices=DTYPES, default="float32", help="of its input")
    layers.add_argument("--tolerance", type=float, default=1e-2, help="relative error that --kernel may have")
    step = commands.add_parser("step", help="whole blocks of every mode next to dense ones, and what a step costs")
    for parser in (layers, step):
        parser.add_argument("--presets", choices=shared.PRESETS, nargs="+", default=shared.PAPER_PRESETS)
        parser.add_argument("--isa", choices=[*ISA_NAMES][:-1], help="of the integer kernels; default the best one")
        parser.add_argument("--turns", type=shared.positive, default=7, help="calls, after one to warm up")
        parser.add_argument("--skip_tests", action="store_true", help="where the tests are not there")
        shared.add_output_arguments(parser, resumes=False)
        parser.set_defaults(run=run)


def kernel_source(text: str) -> tuple[str, Linear]:
    """Import "module:function", the module installed or in the present folder; return the text and the function."""
    sys.path.append(str(Path.cwd()))
    module, _, name = text.partition(":")
    try:
        return text, getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever importing somebody's module raises
        raise argparse.ArgumentTypeError(
            f"{text!r} is no module:function that can be imported here ({type(error).__name__}: {error})"
        ) from error


def run(args: argparse.Namespace) -> None:
    page, plot, measure = {
        "kernels": (layers_page, layers_plot, measure_layers),
        "step": (step_page, step_plot, measure_blocks),
    }[args.command]
    results = Results(args, args.command, page, tables_are_dated=True)
    if not args.render:
        sets = tuple(choose.integer_kernels())
        if args.isa and args.isa not in sets:
            raise SystemExit(
                f"--isa {args.isa}: the integer kernels can run here in {', '.join(sets) or 'no instruction set'};"
                " they need numba and AVX2."
            )
        isa = args.isa or next(iter(sets), None)
        shared.run_tests(args.skip_tests, *TESTS)
        here = place_of(isa)
        with torch.inference_mode(), only(isa):
            for records in measure(args, here["left_out"]):
                put(results.data, here, records)
                results.save()
    results.finish(plot)


@contextlib.contextmanager
def only(isa: str | None) -> Iterator[None]:
    """Have the integer kernels run in this instruction set and no other."""
    kernels = {name: kernel for name, kernel in choose.integer_kernels().items() if name == isa}
    with patch.object(choose, "integer_kernels", lambda: kernels):
        yield


def place_of(isa: str | None) -> dict:
    """Return what tells one table from another, and the modes that are left out there."""
    integers = [name for name, bits in {**BITS, **IN_GROUPS}.items() if bits]
    left_out = [] if isa else [f"{name} {dtype}" for name in integers for dtype in DTYPES]
    if not has_fast_bfloat16():
        left_out += ["dense bfloat16", "best dense bfloat16"]
        if decode.matmul_dtype(torch.bfloat16) == torch.bfloat16:  # the processor could, the libraries may not
            left_out.append("exact bfloat16")
    return {
        "machine": shared.machine(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "numba": version("numba") if isa else None,
        "limits": {name: os.environ[name] for name in shared.LIMITS if name in os.environ},
        "left_out": left_out,
    }


def has_fast_bfloat16() -> bool:
    """Whether a matmul in bfloat16 beats float32 here: whatever processor and libraries say, it is tried out."""
    x, weight = torch.randn(256, 512), torch.randn(512, 512)
    functions = {
        dtype: partial(nn.functional.linear, x.to(dtype), weight.to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    times = by_clock(in_turns(functions, 5))["cpu_seconds"]
    return statistics.median(times[torch.bfloat16]) < statistics.median(times[torch.float32])


def put(data: dict, here: dict, records: list[dict]) -> None:
    """Add the records of one layer or block, all modes; they replace those that were measured there in this place.

    A ratio to a dense layer of another run would not be comparable.
    """
    places = data.setdefault("places", [])
    keys = ("machine", "threads", "isa", "numba", "limits")
    found = next((place for place in places if all(place[key] == here[key] for key in keys)), None)
    if found is None:
        found = {"records": []}
        places.append(found)
    kept = [record for record in found["records"] if case_of(record) != case_of(records[0])]
    kept += [{**record, **now(), "command": shared.command_line()} for record in records]
    found |= {**here, "commands": list(dict.fromkeys(record["command"] for record in kept)), "records": kept}


def case_of(record: dict) -> tuple:
    """Return what a record's modes were measured on together: a preset's block, or a layer and its rows."""
    return (record["preset"],) if "preset" in record else (*record["shape"], record["rows"])


def speeds(times: dict[str, dict], key: Callable[[Mode], object], mode: Mode) -> dict[str, list[float]]:
    """Return how many times as fast as every dense one a mode is, by either clock."""
    found = {}
    for clock, prefix in (("seconds", ""), ("cpu_seconds", "cpu_")):
        for name, dense in BASES.items():
            if key(dense) in times[clock]:
                found[f"{prefix}over_{name}"] = ratios(times[clock][key(dense)], times[clock][key(mode)])
    return found


def installed_peers(left_out: list[str]) -> dict[Mode, peers.Peer]:
    """Return the other packages, without those in bfloat16 where that is slow."""
    slow = " ".join(BEST["bfloat16"]) in left_out
    return {Mode(p.name, p.dtype): p for p in peers.installed() if not (slow and p.dtype == "bfloat16")}


def medians(times: dict[str, dict], key: object) -> dict[str, float]:
    return {clock: rounded(statistics.median(times[clock][key])) for clock in times}


# Layers


def measure_layers(args: argparse.Namespace, left_out: list[str]) -> Iterator[list[dict]]:
    """Yield the records of every shape and number of rows."""
    for name, function in args.kernel:
        check_kernel(name, function, getattr(torch, args.kernel_dtype), args.tolerance)
    shapes = dict.fromkeys(shape for preset in args.presets for shape in shared.layer_shapes(preset))
    for shape, rows in itertools.product(shapes, args.rows):
        print(f"{shape[0]} x {shape[1]}, {rows} rows", file=sys.stderr, flush=True)
        yield measure_layer(*shape, rows, args, left_out)


def layer_modes(
    weight: Tensor, packed: Tensor, scale: Tensor, args: argparse.Namespace, left_out: list[str]
) -> dict[Mode, peers.Product]:
    """Return what to time for a layer, (N, K), of which `weight` is the dense form in float32."""
    layers: dict[Mode, Linear] = {REFERENCE: shared.unpack_every_call}
    for (name, bits), dtype in itertools.product(BITS.items(), DTYPES):
        layers[Mode(name, dtype)] = partial(integer_linear, bits=bits) if bits else ternary_linear
    layers |= {Mode(name, args.kernel_dtype): function for name, function in args.kernel}
    modes: dict[Mode, peers.Product] = {}
    for dtype, mode in DENSE.items():
        dense = weight.to(getattr(torch, dtype))
        modes |= {mode: partial(nn.functional.linear, weight=dense), BEST[dtype]: peers.BestDense(dense)}
    modes[BEST["int8"]] = peers.BestDense(peers.int8_codes(weight))
    for mode, linear in layers.items():
        modes[mode] = lambda x, linear=linear: linear(x, packed, scale, None)
    if weight.shape[1] % GROUP == 0:
        scales = scale.repeat(len(weight), weight.shape[1] // GROUP)
        for name, bits in IN_GROUPS.items():
            linear = partial(integer_linear, bits=bits) if bits else ternary_linear
            modes[Mode(name, "float32")] = lambda x, linear=linear: linear(x, packed, scales, None)
    modes = {mode: function for mode, function in modes.items() if " ".join(mode) not in left_out}
    return modes | {mode: peer.build(weight) for mode, peer in installed_peers(left_out).items()}


def as_input(x: Tensor, mode: Mode) -> Tensor:
    """Return (M, K) float32 in a mode's dtype; dense int8 is the product alone, of rows that are rounded before."""
    if mode.dtype == "int8":
        x, _ = reference.round_activations(x, 8)
    return x.to(getattr(torch, mode.dtype))


def measure_layer(
    out_features: int, in_features: int, rows: int, args: argparse.Namespace, left_out: list[str]
) -> list[dict]:
    """Return the records of one layer, one for each mode."""
    generator, scale, layers = torch.Generator().manual_seed(0), torch.tensor([SCALE]), []
    for _ in range(-(-BYTES // (4 * out_features * in_features)) if rows < FEW_ROWS else 1):
        ternary = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, generator=generator)
        weight = dequantize(ternary, scale)
        layers.append(layer_modes(weight, pack_ternary(ternary), scale, args, left_out))
    modes = layers[-1]
    x = new_input("gaussian", rows, in_features, generator)

    def one_after_the_other(mode: Mode, given: Tensor) -> None:
        for layer in layers:
            layer[mode](given)

    functions = {mode: partial(one_after_the_other, mode, as_input(x, mode)) for mode in modes}
    times = {
        clock: {mode: [call / len(layers) for call in calls] for mode, calls in by_mode.items()}
        for clock, by_mode in by_clock(in_turns(functions, args.turns)).items()
    }
    chosen = {mode: {"by": modes[mode].names[rows]} for mode in modes if mode in BEST.values()}
    errors: dict[Mode, dict[str, float]] = {mode: {} for mode in modes}
    for kind in INPUTS:
        x = new_input(kind, min(rows, ERROR_ROWS), in_features, generator)
        expected = nn.functional.linear(x.double(), weight.double())
        for mode, function in modes.items():
            if mode.dtype != "int8":
                errors[mode][kind] = rounded(relative_error(function(as_input(x, mode)), expected))
    case = {"shape": [out_features, in_features], "rows": rows, "turns": args.turns, "layers": len(layers)}
    return [
        {**case, "mode": mode.name, "dtype": mode.dtype}
        | chosen.get(mode, {})
        | medians(times, mode)
        | speeds(times, lambda mode: mode, mode)
        | {"error": errors[mode]}
        for mode in modes
    ]


def check_kernel(name: str, function: Linear, dtype: torch.dtype, tolerance: float) -> None:
    """Compare a function with the reference in float64; a `SystemExit` says where it is wrong.

    One wrong value could hide in the Frobenius norm, so no difference may be above ten times the tolerance, times the
    root mean square of the outputs. New memory holds NaN meanwhile, so that an output that nobody wrote shows.
    """
    for (rows, outputs, inputs), granularity, with_bias in itertools.product(
        CHECKED_SHAPES, ("tensor", "row"), (False, True)
    ):
        generator = torch.Generator().manual_seed(rows * outputs + inputs)
        packed = pack_ternary(torch.randint(-1, 2, (outputs, inputs), generator=generator))
        shape = reference.scale_shape(outputs, inputs, granularity)
        scale = 0.02 + 0.01 * torch.rand(shape, generator=generator)
        bias = torch.randn(outputs, generator=generator) if with_bias else None
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        given = [None if tensor is None else tensor.clone() for tensor in (x, packed, scale, bias)]
        with nan_in_new_memory():
            output = function(*given)
        expected = reference.ternary_linear(x.double(), packed, scale, bias)
        case = f"{rows} rows, {outputs} x {inputs}, scale of a {granularity}, {'a' if with_bias else 'no'} bias"
        if not isinstance(output, Tensor) or output.shape != expected.shape or output.dtype != dtype:
            got = (tuple(output.shape), output.dtype) if isinstance(output, Tensor) else type(output).__name__
            raise SystemExit(f"{name} returns {got} at {case}. It must return {tuple(expected.shape)}, {dtype}.")
        pairs = zip((x, packed, scale, bias), given, strict=True)
        if any(old is not None and not torch.equal(old, new) for old, new in pairs):
            raise SystemExit(f"{name} changes what it is given, at {case}. Write to a new tensor.")
        difference = (output.double() - expected).abs().max().item()
        error = relative_error(output, expected) if expected.any() else difference
        limit = 10 * tolerance * expected.square().mean().sqrt().item()
        if not (error <= tolerance and difference <= limit):  # NaN, too
            raise SystemExit(
                f"{name} is wrong at {case}: relative error {error:.2g} (tolerance {tolerance:g}), largest difference"
                f" {difference:.2g} (at most {limit:.2g}). NaN: does it write every output? --tolerance allows more."
            )


@contextlib.contextmanager
def nan_in_new_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills what `torch.empty` returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# Blocks


def measure_blocks(args: argparse.Namespace, left_out: list[str]) -> Iterator[list[dict]]:
    """Yield the records of every preset."""
    for preset in args.presets:
        print(preset, file=sys.stderr, flush=True)
        yield measure_block(preset, args.turns, left_out)


def model_modes(model: TerDiTTransformer2DModel, left_out: list[str]) -> dict[Mode, TerDiTTransformer2DModel]:
    """Return the model in every mode, each with its own weights; peers compute the blocks alone, whose are ternary."""
    dense = model.dequantize()
    modes = {DENSE["float32"]: dense, DENSE["bfloat16"]: copy.deepcopy(dense).bfloat16()}
    for dtype in DTYPES:
        modes[BEST[dtype]] = peers.swap(copy.deepcopy(modes[DENSE[dtype]]), peers.BestDense)
    for mode, peer in installed_peers(left_out).items():
        modes[mode] = copy.deepcopy(modes[DENSE[mode.dtype]])
        peers.swap(modes[mode].transformer_blocks, lambda weight, peer=peer: peer.build(weight.float()))
    for (name, bits), dtype in itertools.product(BITS.items(), DTYPES):
        if f"{name} {dtype}" not in left_out:
            own = copy.deepcopy(model).to(getattr(torch, dtype))
            own.set_activation_bits(bits)
            modes[Mode(name, dtype)] = own
    return {mode: modes[mode] for mode in modes if " ".join(mode) not in left_out}


def block_input(model: TerDiTTransformer2DModel) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return what the first block of a float32 model gets: tokens, condition, rotary embedding."""
    caught: list = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda block, inputs: caught.append(inputs[:3]))
    model(*shared.guided_input(model, torch.float32))
    hook.remove()
    return caught[0]


def measure_block(preset: str, turns: int, left_out: list[str]) -> list[dict]:
    """Return the records of one preset, one for each mode."""
    layers = shared.PRESETS[preset]["num_layers"]
    with torch.device("meta"):
        block = shared.new_model(preset, num_layers=1).transformer_blocks[0]
    measured = min(layers, max(1, BYTES // sum(weight.nbytes for weight in block.parameters())))
    modes = model_modes(shared.random_model(preset, num_layers=measured), left_out)
    tokens, condition, rotary = block_input(modes[DENSE["float32"]])
    exact = copy.deepcopy(modes[DENSE["float32"]].transformer_blocks[0]).double()
    expected = exact(tokens.double(), condition.double(), rotary)
    functions, errors = {}, {}

    def one_after_the_other(blocks: nn.ModuleList, *inputs: object) -> None:
        for block in blocks:
            block(*inputs)

    for mode, model in modes.items():
        dtype, blocks = getattr(torch, mode.dtype), model.transformer_blocks
        inputs = tokens.to(dtype), condition.to(dtype), rotary
        errors[mode] = rounded(relative_error(blocks[0](*inputs), expected))
        model.transformer_blocks = nn.ModuleList()  # what is left is the rest of the model
        functions["block", mode] = partial(one_after_the_other, blocks, *inputs)
        functions["rest", mode] = partial(model, *shared.guided_input(model, dtype))
    times = by_clock(in_turns(functions, turns))
    for clock in times.values():
        for mode in modes:
            clock["block", mode] = [seconds / measured for seconds in clock["block", mode]]
            parts = zip(clock["rest", mode], clock["block", mode], strict=True)
            clock["step", mode] = [rest + layers * block for rest, block in parts]
    records = []
    for mode in modes:
        record = {"preset": preset, "layers": layers, "blocks": measured, "tokens": list(tokens.shape[:2])}
        record |= {"turns": turns, "mode": mode.name, "dtype": mode.dtype}
        for part in ("block", "rest", "step"):
            own = {} if part == "rest" else speeds(times, lambda mode, part=part: (part, mode), mode)
            record[part] = medians(times, (part, mode)) | own
        records.append({**record, "error": errors[mode]})
    return records


# Pages


def clock_of(place: dict) -> str:
    """Return the prefix of the times to judge by: with one thread the processor's, which others do not lengthen."""
    return "cpu_" if place["threads"] == 1 else ""


def heading(place: dict) -> dict:
    """Return what the pages say about a place."""
    threads = f"{place['threads']} thread{'s' if place['threads'] > 1 else ''}"
    limited = ", libraries limited" if place["limits"] else ""
    return {
        **{key: place[key] for key in ("machine", "numba", "limits", "commands")},
        "when": " ".join(dict.fromkeys(map(sentence, place["records"]))),
        "slow": [mode for mode in place["left_out"] if not mode.startswith("int")],
        "title": f"{shared.processor(place['machine'])}, {ISA_NAMES[place['isa']]}, {threads}{limited}",
        "clock": "processor time" if clock_of(place) else "wall time",
        "note": place.get("note"),  # written into the JSON by hand: what has changed since
    }


def mode_of(record: dict) -> Mode:
    return Mode(record["mode"], record["dtype"])


def in_order(records: list[dict]) -> list[dict]:
    """Sort by mode: dense, the authors' scheme, ours, then others as they come; float32 first."""
    ours = ["dense", "best dense", REFERENCE.name, *BITS, *IN_GROUPS]
    names = list(dict.fromkeys([*ours, *(record["mode"] for record in records)]))
    return sorted(records, key=lambda record: (names.index(record["mode"]), record["dtype"] != "float32"))


def label(mode: Mode) -> str:
    return f"dense {mode.dtype}, as torch computes it" if mode.name == "dense" else " ".join(mode)


def shown_places(data: dict) -> list[dict]:
    """Return the places, without those of fewer instructions on a machine that has lookups."""
    with_lookups = {place["machine"] for place in data["places"] if (place["isa"] or "").endswith("lookup")}
    return [p for p in data["places"] if not (p["isa"] == "avx512_vnni" and p["machine"] in with_lookups)]


def over_dense(found: dict, prefix: str, dtype: str) -> list[float] | None:
    """Return the speed over the faster dense one: torch's own, or the best where that was measured."""
    keys = (f"{prefix}over_{best}{dtype}" for best in ("", "best_"))
    return min((found[key] for key in keys if key in found), default=None)


def bases(mode: Mode) -> list[str]:
    """Return the dtypes of the dense layers that a mode is compared with: float32, and what it computes in."""
    dtypes = dict.fromkeys(["float32", mode.dtype, *(["int8"] if "int8" in " ".join(mode) else [])])
    return [dtype for dtype in dtypes if mode not in (DENSE.get(dtype), BEST[dtype])]


def layers_page(data: dict) -> str:
    places = []
    for place in shown_places(data):
        rows = list(dict.fromkeys(record["rows"] for record in place["records"]))
        lines, ranges = [], {}
        for names, records in shared.grouped(in_order(place["records"]), "mode", "dtype").items():
            mode = Mode(*names)
            found = [[record["error"][kind] for record in records if record["error"]] for kind in INPUTS]
            errors = [f"{max(values):.1e}" if values else "-" for values in found]
            for dtype in bases(mode):
                speeds = {count: medians_over(records, count, clock_of(place), dtype) for count in rows}
                if any(speeds.values()):
                    ranges[mode, dtype] = speeds
                    lines.append([label(mode), dtype, *map(to_words, speeds.values()), *errors])
        shown = shown_rows(place["records"])
        says = [to_words(ranges.get(pair, {}).get(shown, [])) for pair in SAYS]
        chosen = sorted({f"{record['dtype']} by {record['by']}" for record in place["records"] if "by" in record})
        rows = [f"{count} rows" for count in rows]
        places.append(heading(place) | {"rows": rows, "lines": lines, "says": [shown, *says], "chosen": chosen})
    header = [f"{' '.join(mode)} over dense {dtype}" for mode, dtype in SAYS]
    return shared.render("kernels", places=places, says_header=header)


def shown_rows(records: list[dict]) -> int:
    """Return the rows of an image if they were measured, else the first there are."""
    rows = [record["rows"] for record in records]
    return 512 if 512 in rows else rows[0]


def medians_over(records: list[dict], rows: int, prefix: str, dtype: str) -> list[float]:
    """Return the lowest and highest median of the layers, over the faster dense one, or nothing."""
    found = [over[0] for r in records if r["rows"] == rows and (over := over_dense(r, prefix, dtype))]
    return [min(found), max(found)] if found else []


def to_words(values: list[float]) -> str:
    return " to ".join(map(shared.number, values)) or "-"


def step_page(data: dict) -> str:
    places = []
    for place in shown_places(data):
        clock, lines, says = clock_of(place), [], []
        default = "exact" if place["isa"] in EXACT_IN_BFLOAT16 else "int16"
        said = [Mode("exact", "float32"), Mode(default, "bfloat16"), Mode("int8", "bfloat16")]
        for (preset,), records in shared.grouped(place["records"], "preset").items():
            for record in in_order(records):
                step, seconds = record["step"], record["step"][f"{clock}seconds"]
                pictures = [f"{steps * seconds:,.{0 if seconds > 1 else 1}f}" for steps in STEPS]
                over = [over_dense(step, clock, dtype) for dtype in DTYPES]
                line = [preset, label(mode_of(record)), f"{seconds:.3g}", *map(shared.spread, over)]
                lines.append([*line, f"{record['error']:.1e}"])
                if mode_of(record) in said:
                    medians = [shared.number(speed[0]) if speed else "-" for speed in over]
                    says.append([preset, " ".join(mode_of(record)), *medians, *pictures])
        places.append(heading(place) | {"lines": lines, "says": says})
    headers = {"over_header": [f"over dense {dtype}" for dtype in DTYPES]}
    headers["picture_header"] = [f"{count} steps, s" for count in STEPS]
    return shared.render("step", places=places, steps=STEPS, **headers)


# Plots: speed over the fastest dense float32


def title_of(place: dict) -> str:
    """Return the heading of a place in two lines."""
    machine, threads = heading(place)["title"].rsplit(", ", 1)
    return f"{machine}\n{threads}"


def layers_plot(data: dict, path: Path) -> None:
    """Draw a panel per place, with its best instructions, and a bar per mode: the slowest and the fastest layer."""
    panels = {}
    for place in shown_places(data):
        rows = shown_rows(place["records"])
        found = shared.grouped(in_order(place["records"]), "mode", "dtype")
        over = {mode: medians_over(records, rows, clock_of(place), "float32") for mode, records in found.items()}
        panels[title_of(place)] = [(" ".join(mode), *ends) for mode, ends in over.items()]
    shared.bars(path, panels, speed="times as fast as the fastest dense float32", others=OTHERS)


def step_plot(data: dict, path: Path) -> None:
    """Draw a panel per place with a bar per mode: a step of the place's last preset."""
    panels = {}
    for place in data["places"]:
        preset, clock = place["records"][-1]["preset"], clock_of(place)
        again = "int16" if place["isa"] in EXACT_IN_BFLOAT16 else None  # which is exact arithmetic there
        records = [record for record in place["records"] if record["preset"] == preset and record["mode"] != again]
        over = {mode_of(record): over_dense(record["step"], clock, "float32") for record in in_order(records)}
        bars = [(" ".join(mode), *[speed[0]] * 2) for mode, speed in over.items()]
        panels[f"{title_of(place)}, {preset}"] = bars
    shared.bars(path, panels, speed="times as fast as the fastest dense float32", others=OTHERS)
