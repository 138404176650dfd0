"""`gpu-steps`: forward passes of whole models in every mode, with compiled blocks in one CUDA graph.

`--device cpu` tries the code, without graphs.
"""

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

import shared
from diffusers_terdit import layers as package_layers
from diffusers_terdit.ops.gpu.graphs import capture
from shared import Results, device_seconds, ratios, relative_error, rounded


DENSE, REFERENCE = "dense", "unpack in every call"
BITS = {"exact": None, "int16": 16, "int8": 8}


def add_arguments(commands) -> None:
    parser = commands.add_parser("gpu-steps", help="forward passes of whole models on a GPU, in every mode")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    parser.add_argument("--dtypes", choices=["bfloat16", "float16"], nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--presets", choices=shared.PRESETS, nargs="+", default=shared.PAPER_PRESETS)
    parser.add_argument("--batch_sizes", type=shared.positive, nargs="+", default=[1, 8], help="guided images")
    parser.add_argument("--turns", type=shared.positive, default=20, help="calls of each mode, after one to warm up")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "gpu_steps", lambda data: shared.render("gpu_steps", **data))
    if not args.render:
        results.resume(args.fresh, place=shared.place(args.device), device=args.device)
        results.data.setdefault("left_out", [])
        results.collect(measure_all(args, results))
    results.finish()


def measure_all(args: argparse.Namespace, results: Results) -> Iterator[dict]:
    """Yield the records of every preset, batch size and dtype that are not held."""
    for preset, dtype in itertools.product(args.presets, args.dtypes):
        cases = results.missing({"preset": preset, "dtype": dtype, "batch": batch} for batch in args.batch_sizes)
        if not cases:
            continue
        models = models_of(preset, dtype, args.device)
        for case in cases:
            torch._dynamo.reset()  # it keeps 8 graphs per function, whatever the model; the ninth would raise
            yield from measure(models, case, args, results.data["left_out"])
        del models
        if args.device == "cuda":
            torch.cuda.empty_cache()


def models_of(preset: str, dtype: str, device: str) -> dict[str, nn.Module]:
    """Return the same weights in every mode."""
    packed = shared.random_model(preset, device)
    models: dict[str, nn.Module] = {REFERENCE: packed}  # float32, as the authors run it
    half = copy.deepcopy(packed).to(getattr(torch, dtype))
    models[f"{DENSE}, eager"] = packed.dequantize().to(half.dtype)
    models["exact, eager"] = half
    models[DENSE] = copy.deepcopy(models[f"{DENSE}, eager"])
    for name, bits in BITS.items():
        models[name] = copy.deepcopy(half)
        models[name].set_activation_bits(bits)
    for name in (DENSE, *BITS):  # not dynamic, as the second batch size would be
        backend = "inductor" if device == "cuda" else "eager"
        models[name].compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    return models


def measure(models: dict[str, nn.Module], case: dict, args: argparse.Namespace, left_out: list[str]) -> list[dict]:
    """Return a record per mode of one forward pass of guided images."""
    functions, outputs = {}, {}
    with torch.inference_mode():
        for name, model in models.items():
            inputs = [tensor.to(args.device) for tensor in shared.guided_input(model, model.dtype, case["batch"])]
            call = partial(model, *inputs, return_dict=False)
            if name == REFERENCE:
                call = partial(as_the_authors, call)
            else:  # the pipeline computes adaLN ahead, for many steps at once
                rows = inputs[1].expand(len(inputs[2])), inputs[2]
                call.keywords["modulation"] = model.modulations(*rows).contiguous()
            try:
                outputs[name] = call()[0].float()
                plain = name == REFERENCE or name.endswith("eager") or args.device == "cpu"
                functions[name] = call if plain else capture(call)[0]
            except Exception as error:  # a mode that does not compile here is left out, with its reason
                reason = f"{name}, {', '.join(map(str, case.values()))}: {shared.first_line(error)}"
                print(f"left out: {reason}", file=sys.stderr, flush=True)
                left_out.append(reason)
        times = device_seconds(functions, args.turns, args.device)
    return [
        case
        | {
            "mode": name,
            "milliseconds": rounded(1e3 * statistics.median(times[name])),
            "over_dense": ratios(times[name], times.get(DENSE, times[name])),
            "weights_bytes": sum(p.numel() * p.element_size() for p in models[name].parameters()),
            "error": rounded(relative_error(outputs[name], outputs.get(REFERENCE, outputs[name]))),
        }
        for name in functions
    ]


def as_the_authors(call: Callable[[], object]) -> object:
    """Run a packed float32 model as the authors' code does: TF32, and a new float32 weight in every call."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with patch.object(package_layers, "linear", lambda *arguments: shared.unpack_every_call(*arguments[:4])):
            return call()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
