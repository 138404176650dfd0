"""Compile every Triton kernel for a card that need not be here: one line of JSON each.

python tests/ops/gpu/compile_kernels.py sm_90
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffusers_terdit.ops import reference
from diffusers_terdit.ops.gpu import triton_kernels as kernels


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = ("words", "columns", "length")  # multiples of 16, as those of the released models
WORDS = {"packed": "*u32", "out": "*u32", "rows": "i32", "words": "i32"}
SIZE = {"rows": "i32", "columns": "i32"}
ROWS = {**SIZE, "group": "i32"}
BLOCK = {"BLOCK": kernels.BLOCK}
ROUND = {"input": "*bf16", "codes": "*i8", "step": "*fp32", **SIZE}
WARPS = {"round to int8": 4096 // kernels.VALUES_PER_WARP, "round to two int8": 8192 // kernels.VALUES_PER_WARP}
CASES = {  # kernel, types of its arguments, constants
    "decode to 16 bits": (kernels._unpack_words, WORDS, {"WIDE": True, "MINUS_ONE": 0xBF80, "WORDS": kernels.WORDS}),
    "decode to int8": (kernels._unpack_words, WORDS, {"WIDE": False, "MINUS_ONE": 0xFF, "WORDS": kernels.WORDS}),
    "decode to fp8": (kernels._unpack_words, WORDS, {"WIDE": False, "MINUS_ONE": 0xB8, "WORDS": kernels.WORDS}),
    "decode with a scale": (
        kernels._unpack,
        {"packed": "*u8", "scale": "*fp32", "out": "*bf16", "scale_stride": "i32", **ROWS},
        {"SCALED": True, "GROUPED": False, **BLOCK},
    ),
    "round to int8": (
        kernels._round_to_bytes,
        ROUND,
        {"TOP": 127.0, "WIDE": False, "ROUNDING": reference.ROUNDING, "BLOCK": 4096},
    ),
    "round to two int8": (
        kernels._round_to_bytes,
        ROUND,
        {"TOP": 32639.0, "WIDE": True, "ROUNDING": reference.ROUNDING, "BLOCK": 8192},
    ),
    "scale sums": (
        kernels._scale_sums,
        {"sums": "*i32", "step": "*fp32", "scale": "*fp32", "bias": "*fp32", "out": "*bf16", **SIZE},
        {"WIDE": True, "BY_ROW": True, "BIASED": True, **BLOCK},
    ),
    "mean": (
        kernels._absolute_sums,
        {"weight": "*fp32", "sums": "*fp64", "length": "i32", "parts": "i32"},
        {"STEPS": kernels.STEPS, **BLOCK},
    ),
    "pack": (
        kernels._pack,
        {"weight": "*fp32", "mean": "*fp32", "packed": "*u8", "mean_stride": "i32", **ROWS},
        {"EPS": reference.EPS, "GROUPED": False, **BLOCK},
    ),
}


def compiled(kernel, types, constants, target, options):
    place = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    whole = [argument for argument, kind in types.items() if kind.startswith("*") or argument in SIZES]
    source = ASTSource(
        fn=kernel,
        signature={argument: types.get(argument, "constexpr") for argument in kernel.arg_names},
        constexprs={place[argument]: value for argument, value in constants.items()},
        attrs={place[argument]: [["tt.divisibility", 16]] for argument in whole},
    )
    return triton.compile(source, target=target, options=options)


def main() -> None:
    name = sys.argv[1]
    for case, arguments in CASES.items():
        options = {"num_warps": WARPS.get(case, 4), "enable_fp_fusion": case != "scale sums"}
        kernel = compiled(*arguments, TARGETS[name], options)
        record = {"kernel": case, "shared": kernel.metadata.shared}
        if "ptx" in kernel.asm:
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(kernel.asm["ptx"])
                file.flush()
                arch = name + ("a" if name == "sm_90" else "")
                command = [knobs.nvidia.ptxas.path, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            record["registers"] = int(re.search(r"Used (\d+) registers", said)[1])
            record["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
            record["memory"] = sorted(set(re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"])))
        else:
            found = re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"])
            counts = {key: int(value) for key, value in found}
            record["registers"] = counts["vgpr_count"]
            record["spills"] = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
        print(json.dumps(record))


if __name__ == "__main__":
    main()
