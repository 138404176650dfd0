"""`gpu-layers`: which design multiplies with two-bit weights fastest on a GPU? About six minutes.

The linear layers of several transformer blocks run as one CUDA graph per design. Each block has its own weights, so
that none stays in the GPU's cache. Inputs in 8 bits are made beforehand, and a design without an epilogue leaves the
scale out: in a model both fuse with the neighbors. Before anything is timed, the tests of the kernels have to pass.

On a CPU, Triton's interpreter computes the errors of toy sizes, without times, to try the code:

    TRITON_INTERPRET=1 python examples/benchmarks/run.py gpu-layers \
        --device cpu --presets toy --rows 64 --dtype float16 --blocks 1 --skip_tests
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

import shared
from diffusers_terdit.ops.gpu.graphs import capture
from shared import Results, device_seconds, first_line, relative_error, rounded


# Without those that compile for minutes, which `gpu-tests` runs
TESTS = ["tests/ops/gpu", "-k", "not (whole_network or inductor or cuda_graph)"]


def add_arguments(commands) -> None:
    parser = commands.add_parser("gpu-layers", help="a block's layers on a GPU, in every design")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--presets", choices=shared.PRESETS, nargs="+", default=shared.PAPER_PRESETS[::-1])
    parser.add_argument("--rows", type=shared.positive, nargs="+", default=[512, 4096], help="of the layers' inputs")
    parser.add_argument("--blocks", type=shared.positive, default=6, help="each with its own weights")
    parser.add_argument("--turns", type=shared.positive, default=20, help="replays of each graph")
    parser.add_argument("--skip_tests", action="store_true", help="where the tests are not there")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "gpu_layers", lambda data: shared.render("gpu_layers", **data))
    if not args.render:
        results.resume(args.fresh, place=shared.place(args.device), device=args.device)
        shared.run_tests(args.skip_tests, *TESTS)
        results.collect(measure_all(args, results))
    results.finish()


def measure_all(args: argparse.Namespace, results: Results) -> Iterator[dict]:
    """Yield a record per preset, number of rows and design that is not held; one with "failed" where it raises."""
    import gpu_designs  # needs Triton

    dtype, cuda = getattr(torch, args.dtype), args.device == "cuda"
    for preset in args.presets:
        (width, _), (hidden, _) = shared.layer_shapes(preset)[:2]
        torch.manual_seed(0)
        blocks = gpu_designs.blocks_of(width, hidden, args.blocks, dtype, args.device)
        for rows in args.rows:
            space = gpu_designs.Workspace(width, hidden, rows, dtype, args.device)
            designs = gpu_designs.designs(space, hidden, all_configs=cuda)
            cases = {
                design.name: partial(measure, design, space, blocks[design.merged], args.turns) for design in designs
            }
            if cuda:  # streams and events need one
                for name, merged in (("exact, words, overlapped", False), ("exact, words, overlapped, merged", True)):
                    run = partial(
                        gpu_designs.overlapped, space, [weight for block in blocks[merged] for weight in block]
                    )
                    cases[name] = partial(microseconds, run, args.turns, args.blocks)
            common = {"preset": preset, "rows": rows, "dtype": args.dtype}
            for case in results.missing(common | {"design": name} for name in cases):
                try:
                    record = case | cases[case["design"]]()
                except Exception as error:  # a kernel that does not compile, too little shared memory, ...
                    record = case | {"failed": first_line(error)}
                yield record
                if "failed" in record and cuda:
                    torch.cuda.synchronize()  # raises where the failure broke the device: a new process goes on


def measure(design, space, blocks: list[list], turns: int) -> dict:
    """Return the error of a block's first and last layer against float64, and on a GPU the time per block."""
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

    return record | microseconds(run, turns, len(blocks))


def microseconds(run: Callable[[], None], turns: int, blocks: int) -> dict[str, float]:
    times = device_seconds({"": capture(run)[0]}, turns, "cuda")[""]
    return {"microseconds": rounded(1e6 * statistics.median(times) / blocks)}
