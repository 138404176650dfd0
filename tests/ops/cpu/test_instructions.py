"""Code for other processors than this one, and numba's cache of it on disk."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import run

import diffusers_terdit
from diffusers_terdit.ops import has_integer_kernel, integer_linear, reference
from diffusers_terdit.ops.cpu import choose

from .test_integer import new_case


numba = pytest.importorskip("numba")
integer = pytest.importorskip("diffusers_terdit.ops.cpu.integer")
pytestmark = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="this processor has no AVX2")
SAME = """
from diffusers_terdit.ops import integer_linear, pack_ternary, reference
from diffusers_terdit.ops.cpu import choose
torch.manual_seed(0)
case = torch.randn(9, 70), pack_ternary(torch.randint(-1, 2, (40, 70))), torch.rand(1), torch.randn(40)
same = torch.equal(integer_linear(*case), reference.integer_linear(*case, 16))
print(same, ",".join(choose.integer_kernels()))
"""


WITH_AVX512 = "+avx2,+avx512f,+avx512bw,+avx512vl,+avx512vnni"


@pytest.mark.skipif("avx2" not in choose.integer_kernels(), reason="x86 only")
@pytest.mark.parametrize(
    ("name", "features", "names"),
    [
        ("haswell", "+avx2", "avx2"),
        ("alderlake", "+avx2,+avxvnni", "avx_vnni,avx2"),
        ("cascadelake", WITH_AVX512, "avx512_vnni,avx_vnni,avx2"),
        ("znver4", WITH_AVX512, "avx512_vnni_lookup,avx512_vnni,avx_vnni,avx2"),
        ("nehalem", "+sse4.2", ""),
    ],
)
def test_code_for_another_processor(tmp_path, name, features, names):
    here = choose.integer_kernels()
    if ("avxvnni" in features and "avx_vnni" not in here) or ("avx512" in features and "avx512_vnni" not in here):
        pytest.skip("this processor does not run it")
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    if name == "alderlake" and not _has_flag("avx_vnni"):
        pytest.skip("avx_vnni without avx512 is another encoding, which this processor does not run")
    assert run(SAME, **environment) == f"True {names}".strip()


def _has_flag(flag):
    try:
        with open("/proc/cpuinfo") as file:
            return f" {flag} " in file.read()
    except OSError:
        return False


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with compiled code, of a run that found none."""
    folder = tmp_path_factory.mktemp("compiled")
    assert run(SAME, NUMBA_CACHE_DIR=str(folder)).startswith("True")
    return folder


def test_compiled_code_is_kept_between_runs(compiled):
    def files():
        return {path: path.stat().st_mtime_ns for path in compiled.rglob("*.nb*")}

    first = files()
    assert len(first) >= 4  # index and code of two functions
    assert run(SAME, NUMBA_CACHE_DIR=str(compiled)).startswith("True")
    assert files() == first


@pytest.mark.parametrize("length", [0, 40])
def test_damaged_compiled_code_is_compiled_again(compiled, tmp_path, length):
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    paths = [*tmp_path.rglob("*.nb*")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:length])
    assert run(SAME, NUMBA_CACHE_DIR=str(tmp_path)).startswith("True")
    assert sum(path.stat().st_size > length for path in paths) >= 4, {p.name: p.stat().st_size for p in paths}


def test_a_change_in_another_file_is_compiled(tmp_path):
    """numba looks at the file of a compiled function alone, not at those of what it calls."""
    ignored = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(Path(diffusers_terdit.__file__).parent, tmp_path / "diffusers_terdit", ignore=ignored)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "compiled"), "PYTHONPATH": str(tmp_path)}
    assert run(SAME, **environment).startswith("True")
    path = tmp_path / "diffusers_terdit" / "ops" / "cpu" / "instructions.py"
    before, after = "builder.fmul(builder.sitofp(", "builder.fadd(builder.sitofp("  # scales are added
    assert path.read_text().count(before) == 1
    path.write_text(path.read_text().replace(before, after))
    assert run(SAME, **environment).startswith("False")


def test_no_place_for_compiled_code(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cache"):
        integer.compile_functions(integer.KERNELS[-1], 2, False, cached=True)
    integer.compiled.cache_clear()
    try:
        case = new_case(3, 8, 16)
        assert torch.equal(integer_linear(*case), reference.integer_linear(*case, 16))
    finally:
        integer.compiled.cache_clear()
