"""Which design multiplies with two-bit weights fastest on a GPU? About six minutes.

    PYTHONPATH=src:examples python examples/benchmarks/gpu_shootout.py --output_dir outputs/gpu

The linear layers of several transformer blocks run as one CUDA graph per design. Each block has its own weights, so
that none stays in the GPU's cache. Inputs in 8 bits are made beforehand, and a design without an epilogue leaves the
scale out: in a model both fuse with the neighbors. Every result goes to gpu_shootout.json and its page at once; a run
that was stopped goes on when it is started again.

On a CPU, Triton's interpreter computes the errors of toy sizes, without times, to try the code:

    TRITON_INTERPRET=1 PYTHONPATH=src:examples python examples/benchmarks/gpu_shootout.py \
        --device cpu --presets toy --rows 64 --dtype float16 --blocks 1 --output_dir outputs/toy
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import machine
from diffusers_terdit.ops import dequantize, pack_ternary, reference
from diffusers_terdit.ops.gpu import choose, decode
from gpu_benchmark import (
    captured,
    first_line,
    grouped,
    in_turns,
    is_held,
    loaded,
    place,
    resumed,
    save,
    script_command,
)
from gpu_designs import decode_words, fused_product, pack_along_inputs, scaled_product
from kernel_benchmark import relative_error, rounded
from kernel_page import table


SIZES = {"terdit-4.2b-256": (3072, 8192), "terdit-600m-256": (1536, 4096), "toy": (128, 256)}  # width, feed-forward
DENSE = "dense"
# Tile's rows, tile's columns, block of `pack_along_inputs` or of the sum, warps, stages
FUSED_16 = [
    (256, 128, 16, 8, 4),
    (128, 128, 16, 8, 4),
    (128, 128, 32, 8, 3),
    (128, 128, 16, 4, 4),
    (128, 64, 32, 4, 4),
]
FUSED_8 = [(256, 128, 32, 8, 3), (256, 128, 32, 8, 4), (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (256, 64, 32, 4, 3)]
SCALED_8 = [(128, 256, 128, 8, 3), (128, 128, 128, 4, 4), (128, 128, 128, 8, 4), (256, 128, 128, 8, 3)]


class Weight:
    """Random codes of one matrix (N, K), in every form that a design needs."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: str):
        codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, device=device)
        self.scale = torch.tensor([2.0 ** round(-0.5 * torch.tensor(in_features).log2().item())], device=device)
        self.packed = pack_ternary(codes)
        self.dense = dequantize(codes, self.scale).to(dtype)  # exact: the scale is a power of two
        self.along_inputs = {block: pack_along_inputs(codes, block) for block in (16, 32)}
        self.scales = self.scale.expand(1, out_features).contiguous()
        self.shape = (out_features, in_features)


class Input:
    """Random rows (M, K), and their roundings."""

    def __init__(self, rows: int, in_features: int, dtype: torch.dtype, device: str):
        self.plain = torch.randn(rows, in_features, device=device).to(dtype)
        codes, step = reference.round_activations(self.plain, 8)
        self.bytes, self.step = codes.to(torch.int8), step.flatten()
        codes, step = reference.round_activations(self.plain, 16)
        whole = codes.to(torch.int32)  # 256 * high + low
        low = ((whole + 128) & 255) - 128
        self.pairs, self.pair_step = torch.cat([(whole - low) >> 8, low]).to(torch.int8), step.flatten()
        self.fp8_step = self.plain.float().abs().amax(1, keepdim=True) / 448
        self.fp8 = (self.plain.float() / self.fp8_step).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Design:
    """`layer(weight)` runs a linear layer; `finish` is what a compiler would fuse behind it, in float64."""

    name: str
    layer: Callable[[Weight], Tensor]
    merged: bool = False  # q, k and v in one matrix, gate and up in another
    finish: Callable[[Tensor, Weight], Tensor] | None = lambda output, weight: output.double()  # None: not a product


def blocks_of(width: int, hidden: int, count: int, dtype: torch.dtype, device: str) -> dict[bool, list[list[Weight]]]:
    """The weights of blocks, {merged: [block]}."""
    separate = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    merged = [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden)]
    return {
        key: [[Weight(*shape, dtype, device) for shape in shapes] for _ in range(count)]
        for key, shapes in ((False, separate), (True, merged))
    }


class Workspace:
    """Inputs, outputs and decoded weights at fixed addresses, as a model would keep them."""

    def __init__(self, width: int, hidden: int, rows: int, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.inputs = {size: Input(rows, size, dtype, device) for size in (width, hidden)}
        largest = max(2 * hidden, 3 * width) * width
        self.scratch = [torch.empty(2 * largest, dtype=torch.int8, device=device) for _ in range(2)]
        self.outputs = {
            size: torch.empty(rows, size, dtype=dtype, device=device)
            for size in (width, hidden, 3 * width, 2 * hidden)
        }

    def input(self, weight: Weight) -> Input:
        return self.inputs[weight.shape[1]]

    def output(self, weight: Weight) -> Tensor:
        return self.outputs[weight.shape[0]]

    def decoded(self, weight: Weight, dtype: torch.dtype, slot: int = 0) -> Tensor:
        count = weight.shape[0] * weight.shape[1] * dtype.itemsize
        return decode_words(weight.packed, self.scratch[slot][:count].view(dtype).view(weight.shape))


def designs(space: Workspace, hidden: int, all_configs: bool) -> Iterator[Design]:
    dtype = space.dtype

    def quarters(weight: Weight) -> Tensor:
        rows, columns = weight.packed.shape
        output = space.output(weight)
        for i in range(4):
            part = space.scratch[0][: 2 * rows * columns].view(dtype).view(rows, columns)
            decode_words(weight.packed, part, i)
            torch.mm(space.input(weight).plain, part.T, out=output[:, i * rows : (i + 1) * rows])
        return output

    def package_int8(weight: Weight) -> Tensor:
        x = space.input(weight)
        rows = x.pairs if weight.shape[1] == hidden else x.bytes
        return torch.ops.diffusers_terdit.integer_product(rows, weight.packed)

    def after_package_int8(output: Tensor, weight: Weight) -> Tensor:
        x = space.input(weight)
        if weight.shape[1] == hidden:  # `down_proj` stays at 16 bits
            high, low = output.double().chunk(2)
            return (256 * high + low) * x.pair_step[:, None] * weight.scale
        return output.double() * x.step[:, None] * weight.scale

    def after_package(output: Tensor, weight: Weight) -> Tensor:
        return output.double() * reference.split_scale(weight.scale, dtype)[1]

    def after_words(output: Tensor, weight: Weight) -> Tensor:
        return output.double() * (-0.5 * weight.scale)

    def after_int_mm(output: Tensor, weight: Weight) -> Tensor:
        return output.double() * space.input(weight).step[:, None] * (weight.scale / -64)

    def scaled_mm(weight: Weight) -> Tensor:
        x, decoded = space.input(weight), space.decoded(weight, torch.float8_e4m3fn)
        scales = {"scale_a": x.fp8_step, "scale_b": -0.5 * weight.scales}
        return torch._scaled_mm(x.fp8, decoded.T, **scales, out_dtype=torch.bfloat16)

    def fused_16(weight: Weight, config: tuple) -> Tensor:
        x, packed = space.input(weight), weight.along_inputs[config[2]]
        return fused_product(x.plain, packed, space.output(weight), weight.scale, x.step, config)

    def fused_8(weight: Weight, config: tuple) -> Tensor:
        x, packed = space.input(weight), weight.along_inputs[config[2]]
        return fused_product(x.bytes, packed, space.output(weight), weight.scale, x.step, config)

    def scaled_8(weight: Weight, config: tuple) -> Tensor:
        x, decoded = space.input(weight), space.decoded(weight, torch.int8)
        return scaled_product(x.bytes, decoded, space.output(weight), weight.scale, x.step, config)

    def dense(weight: Weight) -> Tensor:
        return F.linear(space.input(weight).plain, weight.dense)

    def package(weight: Weight) -> Tensor:
        return torch.ops.diffusers_terdit.product(space.input(weight).plain, weight.packed, weight.scale)

    def decoded_by_package(weight: Weight) -> Tensor:
        packed = weight.packed
        return (choose.decoder(packed.device) if packed.is_cuda else decode.unpack)(packed, dtype)

    def words(weight: Weight) -> Tensor:
        return F.linear(space.input(weight).plain, space.decoded(weight, dtype))

    def int_mm(weight: Weight) -> Tensor:
        return torch._int_mm(space.input(weight).bytes, space.decoded(weight, torch.int8).T)

    yield Design(DENSE, dense)
    yield Design("dense, merged", dense, merged=True)
    yield Design("exact, package", package, finish=after_package)
    yield Design("exact, words", words, finish=after_words)
    yield Design("exact, words, merged", words, merged=True, finish=after_words)
    yield Design("exact, words in quarters", quarters, finish=after_words)
    yield Design("decode alone, package", decoded_by_package, finish=None)
    yield Design("decode alone, words", lambda weight: space.decoded(weight, dtype), finish=None)
    yield Design("int8, package", package_int8, finish=after_package_int8)
    yield Design("int8, words + _int_mm", int_mm, merged=True, finish=after_int_mm)
    yield Design("fp8, words + _scaled_mm", scaled_mm, merged=True)
    for name, layer, configs in (
        ("exact, fused", fused_16, FUSED_16),
        ("int8, fused", fused_8, FUSED_8),
        ("int8, words + scaled product", scaled_8, SCALED_8),
    ):
        for config in configs if all_configs else configs[:1]:
            yield Design(f"{name} {'-'.join(map(str, config))}", partial(layer, config=config), merged=True)


def overlapped(space: Workspace, weights: list[Weight]) -> None:
    """Decode each next layer on a second stream while this one multiplies, into two buffers in turns."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    free: list[torch.cuda.Event | None] = [None, None]
    decoded: list[tuple[Weight, Tensor, torch.cuda.Event]] = []

    def multiply(i: int) -> None:
        weight, matrix, ready = decoded[i]
        main.wait_event(ready)
        F.linear(space.input(weight).plain, matrix)
        free[i % 2] = torch.cuda.Event()
        free[i % 2].record(main)

    for i, weight in enumerate(weights):
        if free[i % 2] is not None:
            side.wait_event(free[i % 2])
        with torch.cuda.stream(side):
            matrix, ready = space.decoded(weight, space.dtype, slot=i % 2), torch.cuda.Event()
            ready.record(side)
        decoded.append((weight, matrix, ready))
        if i:
            multiply(i - 1)
    multiply(len(weights) - 1)
    main.wait_stream(side)


def measure(design: Design, space: Workspace, blocks: list[list[Weight]], turns: int) -> dict:
    """Error of a block's first and last layer against float64, and on a GPU the microseconds per block."""
    record, errors = {}, []
    for weight in (blocks[0][0], blocks[0][-1]):
        output = design.layer(weight)
        if design.finish is not None:
            expected = space.input(weight).plain.double() @ weight.dense.double().T
            errors.append(relative_error(design.finish(output, weight), expected))
            record["error"] = rounded(max(errors))
    if space.device == "cpu":
        return record

    def run() -> None:
        for block in blocks:
            for weight in block:
                design.layer(weight)

    return record | {"microseconds": microseconds(run, space, turns, len(blocks))}


def microseconds(run: Callable[[], None], space: Workspace, turns: int, blocks: int) -> float:
    times = in_turns({"": captured(run, space.device)}, turns, space.device)[""]
    return rounded(1e6 * statistics.median(times) / blocks)


def measure_all(args: argparse.Namespace, held: list[dict]) -> Iterator[dict]:
    """A record per preset, number of rows and design that is not held; one with "failed" where it raises."""
    for preset in args.presets:
        width, hidden = SIZES[preset]
        torch.manual_seed(0)
        blocks = blocks_of(width, hidden, args.blocks, getattr(torch, args.dtype), args.device)
        for rows in args.rows:
            space = Workspace(width, hidden, rows, getattr(torch, args.dtype), args.device)
            cases = {
                design.name: partial(measure, design, space, blocks[design.merged], args.turns)
                for design in designs(space, hidden, all_configs=args.device == "cuda")
            }
            if args.device == "cuda":  # streams and events need one
                for name, merged in (("exact, words, overlapped", False), ("exact, words, overlapped, merged", True)):
                    run = partial(overlapped, space, [weight for block in blocks[merged] for weight in block])
                    cases[name] = lambda run=run, space=space: {
                        "microseconds": microseconds(run, space, args.turns, args.blocks)
                    }
            for name, case in cases.items():
                record = {"preset": preset, "rows": rows, "dtype": args.dtype, "design": name}
                if is_held(held, **record):
                    continue
                try:
                    record |= case()
                except Exception as error:  # a kernel that does not compile, too little shared memory, ...
                    record["failed"] = first_line(error)
                print(json.dumps(record), flush=True)
                yield record
                if "failed" in record and args.device == "cuda":
                    torch.cuda.synchronize()  # raises where the failure broke the device: a new process goes on


def page(data: dict) -> str:
    parts = [
        "# Designs of a ternary layer on a GPU\n",
        "Microseconds for the linear layers of one transformer block (lower is better), run as a CUDA graph of several"
        " blocks, and the time over that of dense layers. Error: Frobenius norm of the difference from float64 over"
        " that of the result, normal inputs. A fused or scaled product names its tile, block, warps and stages.\n",
        f"{data['place']}\n\n```bash\n{data['command']}\n```\n",
    ]
    for (preset, rows, dtype), found in grouped(data["records"], "preset", "rows", "dtype").items():
        base = next((record.get("microseconds") for record in found if record["design"] == DENSE), None)
        lines = []
        for record in found:
            if "failed" in record:
                lines.append([record["design"], "-", "-", record["failed"].replace("|", "/")])
                continue
            time = f"{record['microseconds']:g}" if "microseconds" in record else "-"
            over = f"{record['microseconds'] / base:.2f}" if base else "-"
            error = f"{record['error']:.1e}" if "error" in record else "-"
            lines.append([record["design"], time, over, error])
        header = ["design", "time, us", "time over dense", "error"]
        parts.append(f"## {preset}, {rows} rows, {dtype}\n\n{table(header, lines)}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--presets", choices=SIZES, nargs="+", default=["terdit-4.2b-256", "terdit-600m-256"])
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096], help="of the layers' inputs")
    parser.add_argument("--blocks", type=int, default=6, help="with weights of their own")
    parser.add_argument("--turns", type=int, default=20, help="replays of each graph")
    parser.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already holds")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")
    args = parser.parse_args()
    path = args.output_dir / "gpu_shootout.json"
    data = loaded(path, args.render)
    if not args.render:
        data = resumed({} if args.fresh else data, place(args.device, machine()), script_command())
        for record in measure_all(args, data["records"]):
            data["records"].append(record)
            save(path, data, page(data))
    save(path, data, page(data))
    print(f"Written to {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
