"""Write the page of the reliability programs from their reports: docs/results/reliability.md.

python examples/reliability/page.py --output_dir outputs/results
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import data_files
import files
import kills
import load
import races
from diffusers_terdit.evaluation.measured import measured
from harness import SECONDS


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table of names and numbers."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def total(counted: dict[str, dict[str, int]]) -> dict[str, int]:
    return sum((Counter(counts) for counts in counted.values()), Counter())


def outcomes(first: str, counted: dict[str, dict[str, int]], program: ModuleType = files) -> str:
    """Table of outcomes by fault or kind of folder, and of all together; all kinds of failures are one column."""
    rows = []
    for name, counts in [*counted.items(), ("**all**", total(counted))]:
        good = [counts.get(column, 0) for column in program.GOOD]
        rows.append([name, sum(counts.values()), *good, sum(counts.get(column, 0) for column in program.BAD)])
    return table([first, "inputs", *program.GOOD, "failures"], rows)


def trials(report: dict, columns: dict[str, str | tuple[str, str]], kinds: tuple[str, ...]) -> str:
    """Table of counts by program: header -> key, or keys, in a program's report; and failures of kinds of trials."""
    rows = []
    for name in kills.PROGRAMS:
        found = report["programs"][name]
        paths = [(key,) if isinstance(key, str) else key for key in columns.values()]
        counts = [found[path[0]] if len(path) == 1 else found[path[0]].get(path[1], 0) for path in paths]
        failures = [failure for failure in found["failures"] if failure["trial"] in kinds]
        rows.append([name, *counts, len(failures)])
    return table(["program", *columns, "failures"], rows)


def growth_table(report: dict) -> str:
    """Table of what each scenario adds per cycle."""
    rows = []
    for name, result in ((name, report["scenarios"][name]) for name in load.SCENARIOS):
        notes, slopes = result["notes"], load.growth(result["notes"])
        sizes = [f"{item['bytes'] / 1e6:.1f}" for item in (notes[len(notes) // 2], notes[-1])]
        others = [f"{round(slopes[key], 3) + 0.0:+.3f}" for key in list(load.BOUNDS)[1:]]
        rows.append([name, result["cycles"], *sizes, f"{slopes['bytes']:+,.0f}", *others])
    bounds = [f"{bound:,.0f}" if bound > 1 else f"{bound:g}" for bound in load.BOUNDS.values()]
    rows.append(["*at most*", "", "", "", *bounds])
    return table(["scenario", "cycles", "MB at half", "MB at the end", *load.BOUNDS], rows)


KILLS = {
    "kills": "kills",
    **{moment: ("moments", moment) for moment in kills.MOMENTS},
    "while writing": "writing",
    **{state: ("states", state) for state in ("old", "part", "new", "interrupted")},
    "ended exactly": "resumed",
}
REPORTS = ("files", "data_files", "races", "kills", "load")
DISKS = {kind: ("disk", kind) for kind in ("full", "fitted", "read-only disk", "folder without permission")}
PAIRS = {kind: ("twice", kind) for kind in ("both succeeded", "one was killed", "one was refused")}


def render(folder: Path) -> str:
    """Page of the reports in a folder."""
    paths = {name: folder / f"reliability_{name}.json" for name in REPORTS}
    reports = {name: json.loads(path.read_text()) | {"measured": measured(path)} for name, path in paths.items()}
    hostile, damaged, raced, killed, loaded = reports.values()
    total_kills = sum(found["kills"] for found in killed["programs"].values())
    loader = FileSystemLoader(Path(__file__).parent / "pages")
    pages = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return pages.get_template("reliability.md.j2").render(
        **reports,
        total_kills=total_kills,
        by_fault=outcomes("fault", {fault: hostile["faults"][fault] for fault in files.FAULTS}),
        by_kind=outcomes("folder", dict(sorted(hostile["kinds"].items()))),
        memory=[files.MEMORY / 1e9, files.MEMORY_OF_OTHERS / 1e9],
        seconds=SECONDS,
        faults={name: fault.__doc__ for name, (fault, _) in files.FAULTS.items()},
        by_data=outcomes(
            "files", {kind: total(found["faults"]) for kind, found in damaged["kinds"].items()}, data_files
        ),
        by_data_fault={
            kind: outcomes("fault", found["faults"], data_files) for kind, found in damaged["kinds"].items()
        },
        data_options=" ".join(f"--{kind} {found['next']}" for kind, found in damaged["kinds"].items()),
        data_kinds={kind: " ".join(cls.__doc__.split()) for kind, cls in data_files.KINDS.items()},
        by_race=outcomes("folder", {kind: found["outcomes"] for kind, found in raced["kinds"].items()}, races),
        by_moment=trials(killed, KILLS, ("kill",)),
        by_disk=trials(killed, DISKS, ("full", "read-only", "forbidden")),
        by_pair=trials(killed, PAIRS, ("twice",)),
        programs={name: program.__doc__ for name, program in kills.PROGRAMS.items()},
        growth=growth_table(loaded),
        notes=load.NOTES,
        first=loaded["scenarios"]["load, sample, delete"],
        loading="; ".join(load.LOADING),
        scenarios={name: " ".join(scenario.__doc__.split()) for name, scenario in load.SCENARIOS.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"), help="folder of the reports")
    args = parser.parse_args()
    (args.output_dir / "reliability.md").write_text(render(args.output_dir), encoding="utf-8")


if __name__ == "__main__":
    main()
