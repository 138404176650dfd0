"""Code for other processors than this one, and numba's cache of it on disk."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from processes import run
from weights import new_weight

from diffusers_terdit.ops import has_integer_kernel, integer_linear, reference
from diffusers_terdit.ops.cpu import choose


numba = pytest.importorskip("numba")
instructions = pytest.importorskip("diffusers_terdit.ops.cpu.instructions")
pointer = instructions.pointer
integer = pytest.importorskip("diffusers_terdit.ops.cpu.integer")
integer_amx = pytest.importorskip("diffusers_terdit.ops.cpu.integer_amx")
integer_lookup = pytest.importorskip("diffusers_terdit.ops.cpu.integer_lookup")
pytestmark = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="this processor has no AVX2")

WITH_AVX512 = "+avx2,+fma,+avx512f,+avx512bw,+avx512vl,+avx512vnni"
WITH_AMX = f"{WITH_AVX512},+amx-int8,+amx-tile"
KERNELS_OF = {  # best first
    ("haswell", "+avx2,+fma"): "avx2",
    ("alderlake", "+avx2,+fma,+avxvnni"): "avx_vnni,avx2",
    ("cascadelake", WITH_AVX512): "avx512_vnni,avx2",
    ("znver4", WITH_AVX512): "avx512_vnni_lookup,avx512_vnni,avx2",
    ("znver5", WITH_AVX512): "avx512_vnni_lookup,avx512_vnni,avx2",
    ("sapphirerapids", WITH_AMX): "amx_int8,avx512_vnni,avx2",
    ("neoverse-n1", "+neon,+dotprod"): "neon_sdot",
    ("nehalem", "+sse4.2"): "",
}


def test_the_kernels_of_a_processor_are_those_for_its_instructions():
    for (name, features), names in KERNELS_OF.items():
        processor = instructions.Processor(name, frozenset(features.split(",")))
        kernels = (integer_amx.KERNEL, integer_lookup.KERNEL, *integer.KERNELS)
        assert ",".join(kernel.name for kernel in kernels if kernel.runs_on(processor)) == names


@pytest.mark.parametrize("permission", [None, lambda: False])
def test_tiles_that_the_system_does_not_permit_are_not_used(permission, monkeypatch):
    monkeypatch.setattr(instructions.cpu_target.target_context.codegen(), "magic_tuple", lambda: ("", "any", WITH_AMX))
    if permission is None:  # an older torch
        monkeypatch.delattr(torch.cpu, "_init_amx")
    else:
        monkeypatch.setattr(torch.cpu, "_init_amx", permission)
    assert instructions.processor.__wrapped__() == ("any", frozenset(WITH_AVX512.split(",")))


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("sapphirerapids", WITH_AMX),
        ("znver4", WITH_AVX512),  # with a kernel of its own
        pytest.param("haswell", "+avx2,+fma", marks=[pytest.mark.slow] * ("avx512_vnni" in choose.integer_kernels())),
    ],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_code_for_another_processor_first_used_after_a_fork(tmp_path, name, features):
    """Threads have run, but no kernel was loaded before the fork: the child must not wait for those it lost."""
    here = choose.integer_kernels()
    needed = KERNELS_OF[name, features].replace("_lookup", "").split(",")
    if not {*needed} <= {*here}:
        pytest.skip("this processor does not run it")
    code = """
import os, signal
from concurrent.futures import ThreadPoolExecutor
from diffusers_terdit.ops import integer_linear, reference
from diffusers_terdit.ops.cpu import choose
torch.set_num_threads(2)
torch.randn(2000, 2000).sin()
case = torch.randn(300, 512), torch.full((256, 512), 0b01010110, dtype=torch.uint8), torch.rand(1), torch.randn(1024)
expected = reference.integer_linear(*case, 16).numpy()
pool = ThreadPoolExecutor(2)
list(pool.map(str, range(9)))
child = os.fork()
if not child:
    signal.alarm(60)
    os._exit(0 if (integer_linear(*case).numpy() == expected).all() else 1)
same = [(integer_linear(*case).numpy() == expected).all()]
same += pool.map(lambda _: (integer_linear(*case).numpy() == expected).all(), range(4))
print(os.waitpid(child, 0)[1], all(same), ",".join(choose.integer_kernels()))
"""
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(code, **environment) == f"0 True {KERNELS_OF[name, features]}"


class TestCompiledCode:
    """numba's files of it."""

    @pytest.fixture
    def compiles(self, tmp_path, monkeypatch):
        """Compile a function, or load it as a new process does; use it; return the files and when each was made."""
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "compiled"))

        def run():
            def double(address):
                numbers = numba.carray(pointer(address, "int64"), 1)
                numbers[0] = 2 * numbers[0]

            number = torch.tensor([21])
            instructions.c_function(cached=True)(double).ctypes(number.data_ptr())
            assert number.item() == 42
            return {path: path.stat().st_mtime_ns for path in (tmp_path / "compiled").rglob("*.nb*")}

        yield run
        instructions._digest_of_sources.cache_clear()

    def test_it_is_kept_until_a_source_changes_or_a_file_is_damaged(self, compiles, tmp_path, monkeypatch):
        first = compiles()
        assert len(first) == 2  # index and code
        # numba looks at the file of a compiled function alone, not at those of what it calls
        copy = shutil.copytree(Path(instructions.__file__).parent, tmp_path / "copy")
        monkeypatch.setattr(instructions, "files", lambda package: copy)
        instructions._digest_of_sources.cache_clear()
        assert compiles() == first
        path = copy / "integer_lookup.py"
        path.write_text(path.read_text() + "\n# changed")
        instructions._digest_of_sources.cache_clear()
        changed = compiles()
        assert len(changed) == 4
        for length in (0, 40):
            for path in changed:
                path.write_bytes(path.read_bytes()[:length])
            assert compiles().keys() == changed.keys()
            assert sum(path.stat().st_size > 40 for path in changed) == 2

    def test_processors_that_share_a_home_have_their_own(self, compiles, monkeypatch):
        first, here = compiles(), instructions.processor()
        with monkeypatch.context() as patch:
            patch.setattr(instructions, "processor", lambda: here._replace(name="another"))
            both = compiles()
        assert len(both) == 4
        assert first.items() < both.items()
        assert compiles() == both

    def test_two_processes_that_compile_variants_at_once_do_not_exchange_them(self, compiles, monkeypatch):
        """numba reads the index, takes the next number of a file, writes the index, then the file, without a lock."""
        file = numba.core.caching.IndexDataCacheFile
        save, others = file._save_data, []

        def multiply_by(factor):
            def multiply(address):
                numbers = numba.carray(pointer(address, "int64"), 1)
                numbers[0] = factor * numbers[0]

            number = torch.tensor([21])
            instructions.c_function(True, factor)(multiply).ctypes(number.data_ptr())
            return number.item()

        def save_late(*arguments):
            if not others:  # the other one has read the index before this one wrote it, and writes its own now
                others.append(3)
                with monkeypatch.context() as patch:
                    patch.setattr(file, "_load_index", lambda self: {})
                    assert multiply_by(3) == 63
            save(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(file, "_save_data", save_late)
            assert multiply_by(2) == 42
        assert others
        for _ in range(2):  # as later processes load them
            assert (multiply_by(2), multiply_by(3)) == (42, 63)

    def test_there_is_no_place_for_it(self, monkeypatch):
        monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
        with pytest.raises(RuntimeError, match="cache"):
            integer.compile_functions(integer.KERNELS[-1], 1, False, cached=True)
        integer.compiled.cache_clear()
        try:
            packed, scale, bias = new_weight(8, 16)
            x = torch.randn(3, 16)
            expected = reference.integer_linear(x, packed, scale, bias, 8)
            assert torch.equal(integer_linear(x, packed, scale, bias, 8), expected)
        finally:
            integer.compiled.cache_clear()
