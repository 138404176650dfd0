"""`gpu-tests`: run the tests that need a GPU, and write what passed.

Tests that compile whole networks run last, one at a time. A part that passed in this place is not run again.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import shared
from shared import Results


FOLDERS = ["tests/ops", "tests/models", "tests/pipelines", "tests/examples/test_benchmarks.py"]
NETWORKS = "whole_network or inductor or cuda_graph"
PARTS = {  # pytest's arguments, and seconds that it may take
    "kernels and pipelines": (["-n", "6", "-k", f"not ({NETWORKS})"], 180),
    "compiled networks": (["-k", NETWORKS], 240),
}


def add_arguments(commands) -> None:
    parser = commands.add_parser("gpu-tests", help="the tests that need a GPU")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "gpu_tests", page)
    if not args.render:
        results.resume(args.fresh, place=shared.place("cuda"))
        for case in results.missing({"part": part, "complete": True, "failed": 0} for part in PARTS):
            arguments, seconds = PARTS[case["part"]]
            results.data["records"] = [r for r in results.data["records"] if r["part"] != case["part"]]
            results.collect([{"part": case["part"], **run_part(["-m", "gpu", *arguments, *FOLDERS], seconds)}])
    results.finish()
    sys.exit(not all(record["complete"] and not record["failed"] for record in results.data["records"]))


# A shell's background job, and what it starts, ignores SIGINT.
PYTEST = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_part(arguments: list[str], seconds: float) -> dict:
    """Return what pytest counted, and the first line of every failure; `complete` is False where time ran out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-c", PYTEST, "-q", "-W", "default", "-p", "no:cacheprovider"]
        start = time.monotonic()
        with subprocess.Popen([*command, f"--junitxml={report}", *arguments], cwd=shared.ROOT) as process:
            try:
                complete = process.wait(seconds) in (0, 1)
            except subprocess.TimeoutExpired:
                complete = False
                process.send_signal(signal.SIGINT)  # pytest writes its report before it ends
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
        spent = round(time.monotonic() - start)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failures, skipped = {}, 0
    for case in cases:
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            line = "".join((wrong[0].get("message") or "").splitlines()[:1])
            failures[f"{case.get('classname')}::{case.get('name')}"] = line[:300]
        skipped += any(child.tag == "skipped" for child in case)
    passed = len(cases) - len(failures) - skipped
    counts = {"passed": passed, "failed": len(failures), "skipped": skipped}
    return {"complete": complete, "seconds": spent, **counts, "failures": failures}


def page(data: dict) -> str:
    return shared.render("gpu_tests", **data)
