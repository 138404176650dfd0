"""When, and at which commit of this package, the files of results in a folder were measured: `measured.json`."""

import json
import subprocess
from datetime import date
from pathlib import Path

from ..storage.saving import new_file


NAME = "measured.json"


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
