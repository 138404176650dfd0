"""The Triton kernels compiled for cards that are not here: no spills, whole vectors.

In a process of its own, without the interpreter in which the other tests run them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers are for Linux")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target, tmp_path):
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), target]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 9
    for record in records:
        assert record["spills"] == 0, record
        assert record["registers"] <= 80, record
        if record["kernel"] != "mean":
            reduces = record["kernel"].startswith("round")
            assert (record["shared"] > 0) is reduces, record
            scalar = {"st.global.b32"} if reduces else set()  # the step
            scalar |= {"ld.global.b32"} if record["kernel"] in ("decode with a scale", "pack", "scale sums") else set()
            assert all(".v2." in op or ".v4." in op for op in set(record.get("memory", [])) - scalar), record
