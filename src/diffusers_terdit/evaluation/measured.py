"""Where, when and at which commit of this package results were measured. `measured.json` has it for each file."""

import json
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..storage.saving import new_file


NAME = "measured.json"


def machine() -> str:
    """Return one line: processor, its instruction sets that matter here, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = found.get("flags", "").split()
    sets = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    name = found.get("model name", platform.processor() or platform.machine())
    if find_spec("llvmlite"):  # numba's, without which there are no kernels for a CPU
        from llvmlite.binding import get_host_cpu_name

        if (cpu := get_host_cpu_name()).startswith("znver"):  # AMD's names do not tell
            name += f", Zen {cpu.removeprefix('znver')}"
    return (
        f"{name} ({', '.join(name for name in sets if name in flags) or 'no AVX2'}),"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {version('diffusers')},"
        f" Python {platform.python_version()}"
    )


def commit() -> str:
    """Return the short hash of the checkout's commit; "" for an installed package."""
    if not (Path(__file__).parents[3] / ".git").exists():
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def now() -> dict[str, str]:
    """Return today's `date` and the `commit`."""
    return {"date": date.today().isoformat(), "commit": commit()}


def stamp(path: Path) -> None:
    """Note today's date and the commit for a file of results."""
    where = path.parent / NAME
    noted = json.loads(where.read_text("utf-8")) if where.exists() else {}
    noted[path.name] = now()
    with new_file(where) as partial:
        partial.write_text(json.dumps(dict(sorted(noted.items())), indent=2) + "\n", "utf-8")


def measured(path: Path) -> str:
    """Return what a page says about a file of results: when it was measured, and at which commit."""
    where = path.parent / NAME
    noted = json.loads(where.read_text("utf-8")).get(path.name) if where.exists() else None
    return sentence(noted) if noted else ""


def sentence(noted: dict) -> str:
    """Return what a page says about one of `now`."""
    return f"Measured on {noted['date']} at commit {noted['commit'] or 'unknown'}."
