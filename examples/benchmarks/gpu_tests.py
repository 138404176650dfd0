"""Run the tests that need a GPU, and write what passed to gpu_tests.json and its page.

    PYTHONPATH=src:examples python examples/benchmarks/gpu_tests.py --output_dir outputs/gpu

Tests that compile whole networks run last, one at a time. A part that passed in this place is not run again.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmark import machine
from gpu_benchmark import is_held, place, resumed, save, script_command
from kernel_page import table


ROOT = Path(__file__).parents[2]
FILES = [
    "tests/ops/gpu",
    "tests/ops/test_torch_ops.py",
    "tests/models/test_compile.py",
    "tests/pipelines/test_not_finite.py",
    "tests/pipelines/test_offload.py",
    "tests/pipelines/test_schedulers.py",
    "tests/examples/test_gpu_benchmark.py",
]
NETWORKS = "whole_network or inductor or cuda_graph"
PARTS = {  # pytest's arguments, and seconds that it may take
    "kernels and pipelines": (["-n", "6", "-k", f"not ({NETWORKS})"], 180),
    "compiled networks": (["-k", NETWORKS], 240),
}


def run_part(arguments: list[str], seconds: float) -> dict:
    """What pytest counted, with the first line of every failure; `complete` is False where time ran out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
        start = time.monotonic()
        process = subprocess.Popen([*command, f"--junitxml={report}", *arguments, *FILES], cwd=ROOT)
        try:
            complete = process.wait(seconds) in (0, 1)
        except subprocess.TimeoutExpired:
            complete = False
            process.send_signal(signal.SIGINT)  # pytest writes its report before it ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        record = {"complete": complete, "seconds": round(time.monotonic() - start)}
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
        outcomes = {f"{case.get('classname')}::{case.get('name')}": list(case) for case in cases}
    wrong = {
        name: (child.get("message") or "").splitlines()[:1]
        for name, children in outcomes.items()
        for child in children
        if child.tag in ("failure", "error")
    }
    skipped = sum(any(child.tag == "skipped" for child in children) for children in outcomes.values())
    counts = {"passed": len(outcomes) - len(wrong) - skipped, "failed": len(wrong), "skipped": skipped}
    return record | counts | {"failures": {name: "".join(lines)[:300] for name, lines in wrong.items()}}


def page(data: dict) -> str:
    parts = [f"# Tests on a GPU\n\n{data['place']}\n\n```bash\n{data['command']}\n```\n"]
    header = ["part", "passed", "failed", "skipped", "complete", "seconds"]
    lines = []
    for record in data["records"]:
        complete = "yes" if record["complete"] else "no"
        counts = [str(record[key]) for key in header[1:4]]
        lines.append([record["part"], *counts, complete, str(record["seconds"])])
    parts.append(table(header, lines))
    failures = [(name, line) for record in data["records"] for name, line in record["failures"].items()]
    if failures:
        parts.append("Failures:\n\n" + "".join(f"- `{name}`: {line}\n" for name, line in failures))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    parser.add_argument("--fresh", action="store_true", help="run again what passed")
    args = parser.parse_args()
    path = args.output_dir / "gpu_tests.json"
    data = json.loads(path.read_text()) if path.exists() and not args.fresh else {}
    data = resumed(data, place("cuda", machine()), script_command())
    for part, (arguments, seconds) in PARTS.items():
        if is_held(data["records"], part=part, complete=True, failed=0):
            continue
        record = {"part": part} | run_part(["-m", "gpu", *arguments], seconds)
        data["records"] = [old for old in data["records"] if old["part"] != part] + [record]
        save(path, data, page(data))
    print(f"Written to {path.with_suffix('.md')}")
    sys.exit(not all(record["complete"] and not record["failed"] for record in data["records"]))


if __name__ == "__main__":
    main()
