"""The page and the plot of `benchmark.py deployment`, from its JSON alone."""

import statistics
from pathlib import Path


STEPS = 250  # of a run, as in the paper

PAPER_PAIR = ("TerDiT-4.2B", "Large-DiT-4.2B")  # the paper's figures of both, in this order; source: PAPER_NOTE
PAPER_CHECKPOINT = (1.1, 16)  # GB
PAPER_MEMORY = (1_919, 17_027)  # MB
PAPER_SECONDS = (97, 83)  # of a run

INTRODUCTION = f"""\
# What the models need to run

How large is a checkpoint, how much memory does a denoising step need, and how long does it take? Ternary beside full
precision, for the models of TerDiT's deployment table. The weights are random, which changes none of the three.
This page is rendered from [deployment.json](deployment.json) (`python examples/benchmark.py deployment --render`).
The command below measures what the JSON does not hold for the machine and versions at hand, with `--fresh`
everything.

- **Models.** DiT-XL/2 is diffusers' own `DiTTransformer2DModel`. Large-DiT-4.2B is TerDiT-4.2B with `ternary=False`:
  the same network in full precision. TerDiT-600M and TerDiT-4.2B are packed, two bits per ternary weight.
- **Checkpoint**: all files that `save_pretrained` writes, in the dtype of the row. 1 MB is 1,000,000 bytes.
- **Step**: one guided DDPM step of one image of 256 px: two rows of 4 x 32 x 32 latents through the network, guidance,
  the scheduler in float32; no VAE. A run of {STEPS} steps is computed: {STEPS} times the step's time, or its processor
  time where that is less.
- **In turns**: every model has a process of its own, which loads the checkpoint with `from_pretrained` and waits while
  another one steps; the order is reversed in every round, and the first round warms up. Models that do not fit in
  memory together run in pairs. A ratio is the median over pairs of steps that ran beside each other.
"""

MEMORY_NOTE = {
    "cpu": """\
Peak memory is the largest resident memory of the whole process, its imports included. The checkpoint is a mapped file,
whose bytes count once a step has touched them. Times are medians. Where other programs run, the time of a step counts
waiting for the processor; with one thread, the processor time is about what the step takes on an idle machine.
""",
    "cuda": """\
Peak memory is `torch.cuda.max_memory_allocated()`: weights, activations and decoded weights, without the CUDA context.
Times are medians.
""",
}

PAPER_NOTE = """\
The rows in bold are quoted, not measured. Source: TerDiT, second version
([arXiv 2405.14854](https://arxiv.org/abs/2405.14854)), as two independent readers' notes give it; that the time is of
250 steps on an A100 stands in a walk-through of the paper. The paper's own table was not at hand: batch size and
dtype are not known to us, nor what its MB are, nor whether it has rows for 600M and DiT-XL/2.
"""

ADALN_NOTE = """\
The matrix of a block's adaLN has 6 x width x condition width weights (condition width: 1024 in both TerDiT models, the
width in DiT); the last layer's modulation is not counted. The paper, in the same readers' notes, gives adaLN 10 to
20 % of the parameters: right for 4.2B, too little for 600M.

diffusers' DiT keeps the timestep and label embedders in every block: 27 copies too many, 75.0 M parameters. Without
them it has the 674.8 M that DiT's paper rounds to 675 M, and adaLN is 33.0 % of those.
"""

READING = """
The paper's savings of disk and memory are there. Its 16 GB are about what a float32 checkpoint takes; beside bfloat16,
in which a full-precision model would be shipped, ternary divides the bytes by half as much. Memory shrinks less than
the checkpoint: the imports are the same for both, and a layer decodes a quarter of its rows at a time before it
multiplies.

Ratios above 1 are slower than full precision. In float32 the packed layers compute exactly: every step decodes the
codes of every layer again and multiplies at the dense layer's speed. In bfloat16 they round their inputs to 16-bit
integers (the default with numba); 8 bits are faster than dense layers: [speed](../speed.md).

TerDiT-4.2B over Large-DiT-4.2B is one network twice. TerDiT-600M over DiT-XL/2 compares two designs (16 blocks of
width 1536 with SwiGLU and normalised queries and keys; 28 of width 1152), not ternary with full precision alone.

bfloat16 is fast on processors that have instructions for it (avx512_bf16 in the line above the table). On others
dense layers run in PyTorch's slow bfloat16; ternary ones need no such instructions.
"""

NO_GPU = """\
- No GPU was at hand: `--device cuda` is written for one, with `torch.cuda.max_memory_allocated()` and synchronised
  steps, and was never run. The paper's times are a GPU's, so ours say nothing about them.
"""

NOT_SHOWN = """\
- An idle machine: where a step took much longer than its processor time, other programs were running.
- Whole runs: steps cost the same from first to last, so a run is computed from its step.
- More threads, larger batches, 512 px, and the VAE.
- Quality: random weights draw noise.
"""


def page(data: dict) -> str:
    """The Markdown; every number of ours in it comes from `data`."""
    parts = [INTRODUCTION]
    for device, machine in places(data):
        records, runs = of_place(data, (device, machine))
        commands = dict.fromkeys(item["command"] for item in [*records, *runs])
        parts.append(f"## On a {name_of(device)}\n\n{machine}\n")
        parts.append("```bash\n" + "\n".join(commands) + "\n```\n")
        parts.append(measured_table(records, runs))
        parts.append(MEMORY_NOTE[device])
        if compared := comparisons(records, runs):
            parts.append(compared_table(compared))
    parts.append("![Checkpoint, peak memory and relative time of a step](deployment.png)\n")
    parts.append("*On the right: the median of the pairs and their middle half; on a CPU, of processor time.*\n")
    parts.append(f"## Beside the paper\n\n{PAPER_NOTE}\n{paper_table(data)}")
    parts.append(f"## Where the weights are\n\n{weights_table(data['models'])}\n{ADALN_NOTE}")
    parts.append(conclusions(data))
    return "\n".join(parts)


def places(data: dict) -> list[tuple[str, str]]:
    """(device, machine) of the records, each once."""
    return list(dict.fromkeys((record["device"], record["machine"]) for record in data["models"]))


def of_place(data: dict, place: tuple[str, str]) -> tuple[list[dict], list[dict]]:
    """Records and timed runs of one device of one machine, float32 first."""
    found = []
    for key in ("models", "turns"):
        items = [item for item in data[key] if (item["device"], item["machine"]) == place]
        found.append(sorted(items, key=lambda item: item["dtype"] != "float32"))
    return found[0], found[1]


def name_of(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}[device]


def peak(record: dict) -> int:
    """Bytes at the peak: the GPU's where there is one, else the process's."""
    return record.get("device_peak_bytes", record["peak_bytes"])


def clock(device: str) -> str:
    """The times to judge by: on a CPU the process's own, which no other program lengthens."""
    return "cpu_seconds" if device == "cpu" else "seconds"


def step_seconds(runs: list[dict], name: str, dtype: str, key: str) -> float | None:
    """Median time of a step in the model's last run."""
    times = [run[key][name] for run in runs if run["dtype"] == dtype and name in run["models"]]
    return statistics.median(times[-1]) if times else None


def comparisons(records: list[dict], runs: list[dict]) -> list[dict]:
    """For neighbours that ran in turns: bytes, and times of each turn, of the first over those of the second."""
    found = {(record["model"], record["dtype"]): record for record in records}
    result = {}
    for run in runs:
        for names in zip(run["models"][::2], run["models"][1::2], strict=False):
            if not all((name, run["dtype"]) in found for name in names):
                continue  # measured anew on another machine
            first, second = (found[name, run["dtype"]] for name in names)
            result[names, run["dtype"]] = {
                "names": names,
                "device": run["device"],
                "dtype": run["dtype"],
                "checkpoint": first["checkpoint_bytes"] / second["checkpoint_bytes"],
                "peak": peak(first) / peak(second),
                **{
                    key: [a / b for a, b in zip(*(run[key][name] for name in names), strict=True)]
                    for key in ("seconds", "cpu_seconds")
                },
            }
    return list(result.values())


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.0f}" if number >= 1e7 else f"{number / 1e6:,.2f}"


def part(ratio: float) -> str:
    """1/15.4, or 1.05."""
    return f"1/{1 / ratio:.1f}" if ratio < 0.95 else f"{ratio:.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *rows])


def measured_table(records: list[dict], runs: list[dict]) -> str:
    rows = []
    for record in records:
        sizes = [record["checkpoint_bytes"], peak(record), record["imported_bytes"]]
        times = [step_seconds(runs, record["model"], record["dtype"], key) for key in ("seconds", "cpu_seconds")]
        if None in times:
            cells = ["not timed"] * 3
        else:
            shown = times if record["device"] == "cpu" else times[:1]
            cells = [*(f"{time:,.2f}" for time in shown), f"{STEPS * min(shown):,.0f}"]
            cells[1:1] = [] if record["device"] == "cpu" else ["-"]
        rows.append([record["model"], record["dtype"], *map(megabytes, sizes), *cells])
    sizes = ["checkpoint, MB", "peak memory, MB", "imports alone, MB"]
    times = ["step, s", "its processor time, s", f"{STEPS} steps, s (computed)"]
    return table(["model", "dtype", *sizes, *times], rows)


def compared_table(compared: list[dict]) -> str:
    def spread(ratios: list[float]) -> str:
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    rows = []
    for pair in compared:
        sizes = [part(pair["checkpoint"]), part(pair["peak"])]
        times = [spread(pair["seconds"]), spread(pair["cpu_seconds"]) if pair["device"] == "cpu" else "-"]
        rows.append([" over ".join(pair["names"]), pair["dtype"], *sizes, *times, str(len(pair["seconds"]))])
    times = ["time of a step (lowest to highest pair)", "processor time (the same)", "pairs"]
    return table(["", "dtype", "checkpoint", "peak memory", *times], rows)


def paper_table(data: dict) -> str:
    rows = [
        [f"**paper: {what}**", f"{full:,} {unit}", f"{ternary:,} {unit}", part(ternary / full)]
        for what, unit, (ternary, full) in (
            ("checkpoint", "GB", PAPER_CHECKPOINT),
            ("peak memory, GPU", "MB", PAPER_MEMORY),
            ("250 steps, A100", "s", PAPER_SECONDS),
        )
    ]
    for place in places(data):
        records, runs = of_place(data, place)
        found = {(record["model"], record["dtype"]): record for record in records}
        for pair in comparisons(records, runs):
            if pair["names"] == PAPER_PAIR:
                where = f"ours: {{}}, {pair['dtype']}, {name_of(place[0])}"
                both = [found[name, pair["dtype"]] for name in reversed(PAPER_PAIR)]
                sizes = [f"{megabytes(record['checkpoint_bytes'])} MB" for record in both]
                peaks = [f"{megabytes(peak(record))} MB" for record in both]
                key = clock(place[0])
                steps = [f"{step_seconds(runs, record['model'], pair['dtype'], key):.2f} s" for record in both]
                rows.append([where.format("checkpoint"), *sizes, part(pair["checkpoint"])])
                rows.append([where.format("peak memory"), *peaks, part(pair["peak"])])
                step = "processor time of a step" if key == "cpu_seconds" else "time of a step"
                rows.append([where.format(step), *steps, f"{statistics.median(pair[key]):.2f}"])
    return table(["4.2B", "full precision", "ternary", "ternary over full precision"], rows)


def weights_table(records: list[dict]) -> str:
    rows = []
    for record in {record["model"]: record for record in records}.values():
        sizes = [f"{record[key] / 1e6:,.1f}" for key in ("parameters", "ternary_weights", "adaln_weights")]
        rows.append([record["model"], *sizes, f"{100 * record['adaln_weights'] / record['parameters']:.1f} %"])
    return table(["model", "parameters, M", "ternary, M", "in the blocks' adaLN, M", "adaLN's share"], rows)


def conclusions(data: dict) -> str:
    """What the figures say; the sentences quote them, so that they cannot say otherwise."""
    lines = []
    for place in places(data):
        for pair in comparisons(*of_place(data, place)):
            first, second = pair["names"]
            time = statistics.median(pair[clock(pair["device"])])
            lines.append(
                f"- On a {name_of(pair['device'])} in {pair['dtype']}, {first} takes {part(pair['checkpoint'])} of the"
                f" disk, {part(pair['peak'])} of the memory and {time:.2f} times the"
                f" {'processor ' if pair['device'] == 'cpu' else ''}time of {second}.\n"
            )
    no_gpu = "" if any(device == "cuda" for device, _ in places(data)) else NO_GPU
    return f"## What this says\n\n{''.join(lines)}{READING}\n## What was not shown\n\n{no_gpu}{NOT_SHOWN}"


def plot(data: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = [(place, dtype) for place in places(data) for dtype in ("float32", "bfloat16")]
    series = [(place, dtype) for place, dtype in series if any(r["dtype"] == dtype for r in of_place(data, place)[0])]
    names = list(dict.fromkeys(record["model"] for record in data["models"]))
    colours = ["#1f4e79", "#8db4d8", "#7a3b00", "#e0a060"]
    height = 0.8 / len(series)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), width_ratios=[1, 1, 1.1], layout="constrained")
    pairs: list[tuple[str, str]] = []
    for number, (place, dtype) in enumerate(series):
        records, runs = of_place(data, place)
        shift = (number - (len(series) - 1) / 2) * height
        style = {"height": height, "color": colours[number % len(colours)], "label": f"{name_of(place[0])}, {dtype}"}
        own = {record["model"]: record for record in records if record["dtype"] == dtype}
        rows = [names.index(name) + shift for name in own]
        axes[0].barh(rows, [record["checkpoint_bytes"] / 1e9 for record in own.values()], **style)
        axes[1].barh(rows, [peak(record) / 1e9 for record in own.values()], **style)
        for pair in comparisons(records, [run for run in runs if run["dtype"] == dtype]):
            if pair["names"] not in pairs:
                pairs.append(pair["names"])
            ratios = sorted(pair[clock(pair["device"])])
            median, quarter = statistics.median(ratios), len(ratios) // 4
            reach = [[median - ratios[quarter]], [ratios[-1 - quarter] - median]]
            axes[2].barh(pairs.index(pair["names"]) + shift, median, xerr=reach, ecolor="gray", capsize=3, **style)
    paper = {"marker": "D", "color": "#c00000", "zorder": 3, "linestyle": "none", "label": "the paper's, quoted (GPU)"}
    if PAPER_PAIR in pairs:
        rows = [names.index(name) for name in PAPER_PAIR]
        axes[0].plot(PAPER_CHECKPOINT, rows, **paper)
        axes[1].plot([value / 1000 for value in PAPER_MEMORY], rows, **paper)
        axes[2].plot(PAPER_SECONDS[0] / PAPER_SECONDS[1], pairs.index(PAPER_PAIR), **paper)
    for axis, label in zip(axes, ("checkpoint, GB", "peak memory, GB"), strict=False):
        axis.set(xscale="log", xlabel=label, yticks=range(len(names)), yticklabels=names)
        axis.xaxis.set_major_formatter("{x:g}")
        left = min(bar.get_width() for bar in axis.patches) / 5
        axis.set_xlim(left=left)
        for bar in axis.patches:
            middle = bar.get_y() + bar.get_height() / 2
            dark = sum(bar.get_facecolor()[:3]) < 1.5
            colour = "white" if dark else "black"
            axis.text(1.15 * left, middle, f"{bar.get_width():.3g}", color=colour, va="center", fontsize=8)
    axes[1].set_yticklabels([])
    axes[2].axvline(1, color="black", linewidth=0.8)
    axes[2].set(xlabel="time of a step, ratio\n(CPU: processor time)", yticks=range(len(pairs)), xlim=(0, None))
    axes[2].set_yticklabels([" /\n".join(pair) for pair in pairs])
    for axis in axes:
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
