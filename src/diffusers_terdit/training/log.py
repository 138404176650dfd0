"""The log of a run, one JSON record a line: read it, also where a killed run tore it, and draw it."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from ..storage.saving import new_file


# What the picture shows: the title of a panel, whether a wide range makes its scale logarithmic, its curves by name.
_PANELS: list[tuple[str, bool, dict[str, str]]] = [
    (
        "loss",
        True,
        {
            "loss": "training",
            "noise_error": "average, fixed noise",
            "noise_error_held_out": "average, held-out images",
        },
    ),
    ("Fréchet distance", True, {"frechet_distance": ""}),
    ("codes that flipped since the last record, %", True, {"flip_share": ""}),
    ("zeros among the ternary weights, %", False, {"zero_share": ""}),
    ("learning rate", False, {"lr": ""}),
    ("norm of the gradient", True, {"grad_norm": "mean", "grad_norm_max": "largest"}),
]


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of a JSONL log, each with its `step`; none where there is no file.

    A killed run may have torn the last line; it is left out, as is any other that is no record of a step.
    """
    path, records = Path(path), []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def draw(path: str | os.PathLike, picture: str | os.PathLike) -> None:
    """Draw the log of a run as a PNG: loss, Fréchet distance, ternary weights, learning rate and gradient, by step.

    What the log does not have, such as flips in full precision, has no panel.

    Args:
        path (`str` or `os.PathLike`): `log.jsonl`.
        picture (`str` or `os.PathLike`): The PNG; replaced as a whole.

    Raises:
        ImportError: There is no matplotlib.
        OSError: The disk is full or not writable.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    except ImportError as error:
        raise ImportError("A picture of the log needs matplotlib: pip install matplotlib") from error

    records = read(path)
    keys = {key for record in records for key in record}
    panels = [(title, log, curves) for title, log, curves in _PANELS if keys & curves.keys()]
    columns = 3 if len(panels) > 4 else 2
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4 * columns, 2.7 * rows), dpi=100, layout="constrained")
    for number, (title, log, curves) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, number)
        positive: list[float] = []
        for key, name in curves.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            if not points:
                continue
            values = [100 * value if title.endswith("%") else value for _, value in points]
            style: dict[str, Any] = {"linewidth": 1.2, "markersize": 5, "marker": "." if len(points) < 30 else ""}
            axis.plot([step for step, _ in points], values, label=name, **style)
            positive += [value for value in values if 0 < value < math.inf]
        if log and positive and max(positive) > 5 * min(positive):
            axis.set_yscale("log", nonpositive="mask")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(alpha=0.3)
        if len([key for key in curves if key in keys]) > 1:
            axis.legend(fontsize=8)
    with new_file(Path(picture)) as partial:
        figure.savefig(partial, format="png")
