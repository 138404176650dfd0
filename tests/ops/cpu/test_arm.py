"""The kernels on ARM: compiled for it by LLVM's own target, and run there where an emulator is installed.

On Debian: `apt-get install --no-install-recommends qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross`.
"""

import contextlib
import itertools
import multiprocessing
import re
import shutil
import struct
import subprocess
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from weights import new_weight

from diffusers_terdit.ops.cpu import exact


pytest.importorskip("numba")
codegen = pytest.importorskip("numba.core.codegen")
llvm = pytest.importorskip("llvmlite.binding")
from diffusers_terdit.ops.cpu import instructions, integer, lookup, pack, scale_gradient  # noqa: E402 - after the skip


ARM, LANES = "aarch64-unknown-linux-gnu", 8
(SDOT,) = (kernel for kernel in integer.KERNELS if kernel.name == "neon_sdot")
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
FUNCTIONS = {
    "lay": lambda: lookup._compile_lay(cached=False),
    "lay_transposed": lambda: lookup._compile_lay_transposed(cached=False),
    "tile": lambda: lookup._compile_tile(LANES, 1, cached=False),
    "multiply": lambda: lookup._compile_multiply(LANES, 1, 0, cached=False),
    "absolute_sums": lambda: pack._compile_sums(cached=False),
    "pack": lambda: pack._compile_pack(cached=False),
    "scale_gradient": lambda: scale_gradient._compile(cached=False),
    "quantize": lambda: integer._compile_quantize(SDOT.shape, 1, False, cached=False),
    "multiply_integers": lambda: integer._compile_multiply(SDOT, 1, False, cached=False),
}
MAIN = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void NRT_incref(void *p) {}
void NRT_decref(void *p) {}
int lay(void **, void **, int64_t), tile(void **, void **, int64_t), multiply(void **, void **, int64_t);
int main(int count, char **arguments) {
    /* memory.bin: bytes, fields, their first address, the units of each function, the fields, the memory */
    FILE *file = fopen(arguments[1], "r+b");
    int64_t head[6], job[64];
    fread(head, 8, 6, file);
    fread(job, 8, head[1], file);
    char *memory = aligned_alloc(64, head[0]);
    long start = ftell(file);
    fread(memory, 1, head[0], file);
    for (int i = head[2]; i < head[1]; i++) job[i] += (int64_t)memory;
    int64_t *placed = (int64_t *)job[head[2]];
    int addresses[] = {2, 3, 4, 6};
    for (int i = 0; i < 4; i++) placed[addresses[i]] += (int64_t)memory;
    int (*functions[])(void **, void **, int64_t) = {lay, tile, multiply};
    for (int i = 0; i < 3; i++) {
        void *result = 0, *error = 0;
        job[0] = job[1] = 0;
        job[2] = head[3 + i];
        if (functions[i](&result, &error, (int64_t)job)) return 1;
    }
    fseek(file, start, SEEK_SET);
    fwrite(memory, 1, head[0], file);
    return fclose(file);
}
"""


def compile_for_arm():
    """Name of a function -> its assembly for ARM and its object files, with what it calls; in a fresh process."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(ARM).create_target_machine(cpu="neoverse-n1", opt=3, reloc="pic")
    modules, add = [], codegen.CPUCodeLibrary.add_ir_module
    compiled: dict[str, tuple[str, list[bytes]]] = {}

    class _Captured(Exception):
        pass

    def capture(library, module):
        modules.append(str(module))
        if "llvm.aarch64" in modules[-1]:
            raise _Captured  # this processor would not know the instruction
        add(library, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codegen.CPUCodeLibrary, "add_ir_module", capture)
        patch.setattr(lookup, "processor", lambda: instructions.Processor("neoverse-n1", frozenset({"+neon"})))
        for name, compile_ in FUNCTIONS.items():
            modules.clear()
            with contextlib.suppress(_Captured):
                compile_()
            assembly, files = "", []
            for text in modules:
                text = re.sub('target triple = ".*"', f'target triple = "{ARM}"', text)
                text = re.sub('target datalayout = ".*"', f'target datalayout = "{machine.target_data}"', text)
                for found in re.findall(r'define [^@]*@"(_ZN16diffusers_terdit[^"]*)"', text):
                    text = text.replace(f'@"{found}"', f"@{name}")
                module = llvm.parse_assembly(text)
                passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
                passes.getModulePassManager().run(module, passes)
                assembly += machine.emit_assembly(module)
                if "@cfunc." not in text and '@"cfunc.' not in text and "nrt_atomic" not in text:
                    files.append(machine.emit_object(module))
            compiled[name] = assembly, files
    return compiled


@pytest.fixture(scope="module")
def objects():
    """Compiled in a process that has compiled nothing before: numba would leave out what it has."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(compile_for_arm).result()


def test_all_compile_for_it_and_sums_are_vectors(objects):
    for assembly, _ in objects.values():
        assert re.search(r"\bret\b", assembly)
    assert len(re.findall(r"fadd\tv\d+\.4s", objects["multiply"][0])) > 100
    assert len(re.findall(r"sdot\tv\d+\.4s", objects["multiply_integers"][0])) >= SDOT.shape.rows * SDOT.shape.vectors


def aligned(array):
    return -(-array.nbytes // 64) * 64


@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}")
def test_the_bits_are_those_of_this_processor(objects, tmp_path, monkeypatch):
    rows, out_features, in_features, group = 11, 44, 192, 64
    packed, scale, bias = new_weight(out_features, in_features, group)
    input = torch.randn(rows, in_features)
    expected = exact.linears(lookup.products, input, [(packed, scale, bias)], [out_features])[0]

    groups, chunks, tiles = in_features // group, in_features // lookup.CHUNK, -(-rows // LANES)
    fields = dict.fromkeys(lookup.Job._fields, 0)
    fields |= {"layers": 1, "rows": rows, "groups": groups, "size": group, "width": in_features}
    fields |= {"chunks": chunks, "outputs": out_features, "tiles": tiles, "share": out_features}
    fields["own"] = LANES * (lookup.TABLES * lookup.CASES + lookup.SPARE + 2 * LANES + out_features)
    arrays = {
        "placed": torch.zeros(9, dtype=torch.int64),
        "input": input,
        "tiled": torch.full((tiles * in_features * LANES,), float("nan")),
        "indices": torch.full((chunks * out_features * lookup.TABLES,), 255, dtype=torch.uint8),
        "group_scale": scale.T.contiguous(),
        "scale": torch.ones(1),
        "bias": bias,
        "scratch": torch.full((fields["own"],), float("nan")),
        "packed": packed,
        "output": torch.full((rows, out_features), float("nan")),
    }
    starts = itertools.accumulate(map(aligned, arrays.values()), initial=0)
    places = dict(zip(arrays, starts, strict=False))
    addresses = [places[name] for name in ("packed", "output", "scale", "bias")]
    arrays["placed"][:] = torch.tensor([0, out_features, *addresses[:3], 0, addresses[3], bias.itemsize, 0])
    memory = b"".join(array.numpy().tobytes().ljust(aligned(array), b"\0") for array in arrays.values())
    fields |= {name: place for name, place in places.items() if name in fields}
    units = -(-out_features // 4 // lookup.ROWS_LAID), tiles, tiles
    head = struct.pack("<6q", len(memory), len(fields), lookup.JOB.placed, *units)
    file = tmp_path / "memory.bin"
    file.write_bytes(head + struct.pack(f"<{len(fields)}q", *fields.values()) + memory)

    (tmp_path / "main.c").write_text(MAIN)
    names = []
    for name in ("lay", "tile", "multiply"):
        for number, content in enumerate(objects[name][1]):
            names.append(f"{name}{number}.o")
            (tmp_path / names[-1]).write_bytes(content)
    link = [COMPILER, "-static", "-Wl,--allow-multiple-definition", "-o", "run", "main.c", *names, "-lm"]
    subprocess.run(link, cwd=tmp_path, check=True)
    subprocess.run([EMULATOR, "./run", file.name], cwd=tmp_path, check=True)
    start = len(head) + 8 * len(fields) + places["output"]
    output = torch.frombuffer(bytearray(file.read_bytes()[start : start + expected.nbytes]), dtype=torch.float32)
    assert torch.equal(output.view_as(expected), expected)
