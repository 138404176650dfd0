"""The pages and plots of `benchmark.py kernels` and `benchmark.py step`, from their JSON alone."""

from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image


DENSE, REFERENCE = "dense", "unpack in every call"
OWN_MODES = (DENSE, REFERENCE, "exact", "int16", "int8")
INPUTS = ("gaussian", "gated", "outliers")
LIMITS = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # of the libraries torch calls
STEPS = (250, 20)  # of a picture: the paper's, and a fast sampler's
ISA_NAMES = {
    "avx512_vnni_lookup": "AVX-512 VNNI with lookups",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    None: "no integer kernels",
}
COLOURS = {DENSE: "#555555", REFERENCE: "#c00000", "exact": "#1f4e79", "int16": "#2e8b57", "int8": "#e08a1e"}
MARKERS = {"float32": "o", "bfloat16": "D"}

LAYERS_INTRODUCTION = f"""\
# Ternary layers beside dense ones

How fast is a packed ternary layer on a CPU, and how exact, beside a dense layer that holds the same values? This page
is rendered from [kernels.json](kernels.json) (`python examples/benchmark.py kernels --render`); the command of each
table measures anew and replaces that table.

- **Layers**: the matrices of TerDiT-600M (1536 wide) and TerDiT-4.2B (3072): attention, feed-forward in and out,
  adaLN (1024 inputs), without bias. 512 rows are one image of 256 px with guidance, 2048 rows one of 512 px; 2 and 8
  rows are what adaLN sees. T is random, the scale a power of two: the dense bfloat16 weight is the same matrix.
- **{DENSE}**: `F.linear` with a dense weight: 4 bytes per weight in float32, 2 in bfloat16. All others read two bits.
- **{REFERENCE}**: the authors' scheme in plain PyTorch: unpack to float32, multiply by the scale, `F.linear`.
- **exact**: `ternary_linear`, this package's default in float32: decodes into a scratch, then multiplies.
- **int16**, **int8**: `integer_linear`: rounds each row of the input to 16 or 8 bits in every call, then sums exact
  integers. int16 is the default for bfloat16 inputs; int8 is opt-in.
- **Side by side**: all modes run in one process, one call each per turn, the order reversed from turn to turn; a first
  turn warms up. Below 64 rows there are five times as many turns. A figure is a speed: how many times as fast as the
  dense layer, above 1 is faster; the median of the pairs of a turn, with the lowest and highest pair in brackets.
- **Clock**: with one thread the processor time is given beside the wall time, which other programs lengthen; with
  several threads processor time adds up over them, so only wall time is given.
- **Error**: Frobenius norm of the difference from float64 arithmetic on the float32 input, over that of the result: so
  bfloat16 includes the rounding of input and output. On at most 64 rows of normal numbers ("gaussian"), of SiLU-gated
  ones ("gated": silu(a) b, what `down_proj` sees), and with 0.1 % of the numbers 20 times as large ("outliers").
"""

STEP_INTRODUCTION = """\
# A denoising step beside the dense model's

How long does a whole block of the transformer take (norms, rotary embedding, attention, feed-forward, adaLN), and what
follows for a step and a picture? This page is rendered from [step.json](step.json)
(`python examples/benchmark.py step --render`); the command of each table measures anew and replaces that table.

- **Block**: one block of the preset with random codes on the tokens of a guided image (two rows of 256 tokens), of
  every mode in turns in one process, the order reversed from turn to turn; a first turn warms up. The dense block is
  `model.dequantize()`: the same values in full precision (`ternary=False`).
- **Rest**: the same model without blocks (embedding, final layer), in the same turns.
- **Step, computed from measured blocks**: rest + number of blocks x block, turn by turn. Dense float32 needs 17 GB for
  4.2B, a block of it half a gigabyte. [What the models need](deployment.md) measures whole steps of whole models.
- **Picture, computed from measured blocks**: the step times 250 (the paper's) and times 20 (a fast sampler's), without
  the scheduler and the VAE. `TerDiTPipeline` computes adaLN once for many steps; here every step computes it.
- **Speed**: how many times as fast as dense float32, above 1 is faster: the median of the pairs of a turn, with the
  lowest and highest pair in brackets.
- **Modes**: exact is `set_activation_bits(None)`, int16 `set_activation_bits(16)` (in bfloat16 also the default,
  "auto"), int8 `set_activation_bits(8)`, which leaves `down_proj` at 16 bits.
- **Error**: of the block's output, Frobenius norm of the difference from float64 over that of the result, gates of the
  order of one. bfloat16 includes the rounding of the block's input.
"""

IMITATION = """\
A processor with AVX2 alone is imitated by `--isa avx2` and
`MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`, which limit the libraries that PyTorch
calls; clock rates and caches stay this processor's.
"""

LAYERS_OPEN = """\
- An idle machine, where other programs ran: the brackets show how far pairs lie apart.
- Processors that no table names: ARM, AVX-VNNI without AVX-512, AMX. Without AVX2 or numba layers compute exactly.
- A GPU.
- What a rounding of activations does to pictures: it is an error of numbers here.
- `--kernel module:function` checks and times a kernel of yours in the same tables.
"""

STEP_OPEN = """\
- Whole pictures: their seconds are computed, and hold for this machine only, which is shared with other programs.
- Memory: peaks are measured by `python examples/benchmark.py memory`, see [memory](../memory.md); sizes of checkpoints
  in [what the models need](deployment.md).
- 512 px, larger batches, a GPU; the quality of pictures.
"""


def write(command: str, data: dict, folder: Path) -> None:
    """`kernels.md` and `.png`, or `step.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    page, plot = {"kernels": (layers_page, layers_plot), "step": (step_page, step_plot)}[command]
    (folder / f"{command}.md").write_text(page(data), "utf-8")
    plot(data, folder / f"{command}.png")


def measured(record: dict) -> tuple:
    """What a record's modes were measured on together: a layer and rows, or a preset."""
    return (record["preset"],) if "preset" in record else (*record["shape"], record["rows"])


def modes_of(records: Iterable[dict]) -> list[tuple[str, str]]:
    """(mode, dtype), ours in order, then others as they come."""
    found = list(dict.fromkeys((record["mode"], record["dtype"]) for record in records))
    places = {name: place for place, name in enumerate(OWN_MODES)}
    return sorted(found, key=lambda mode: (places.get(mode[0], len(places)), mode[1] != "float32"))


def title(place: dict) -> str:
    threads = f"{place['threads']} thread{'s' if place['threads'] > 1 else ''}"
    return f"{ISA_NAMES[place['isa']]}, {threads}" + (", libraries limited" if place["limits"] else "")


def clock(place: dict) -> str:
    """Prefix of the speeds to judge by: with one thread the processor's time, which no other program lengthens."""
    return "cpu_" if place["threads"] == 1 else ""


def clock_name(place: dict) -> str:
    return "processor time" if clock(place) else "wall time"


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def spread(speed: list[float] | None) -> str:
    return "-" if speed is None else f"{number(speed[0])} ({number(speed[1])} to {number(speed[2])})"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *rows])


def heading(place: dict) -> str:
    numba = f"numba {place['numba']}" if place["numba"] else "the integer kernels cannot run (no numba, or no AVX2)"
    lines = [f"## {title(place)}\n", f"{place['machine']}, {numba}\n"]
    lines.append("```bash\n" + "\n".join(place["commands"]) + "\n```\n")
    if place["forced"]:
        lines.append(
            f"The integer kernels were held to {ISA_NAMES[place['isa']]} (`--isa`); the processor has better.\n"
        )
    if place["limits"]:
        limits = " ".join(f"{name}={value}" for name, value in place["limits"].items())
        lines.append(f"The libraries were limited by `{limits}`.\n")
    if place["left_out"]:
        lines.append(left_out(place["left_out"]))
    if place.get("note"):  # written into the JSON by hand: what has changed since
        lines.append(f"{place['note']}\n")
    return "\n".join(lines)


def left_out(modes: list[str]) -> str:
    integers = [mode for mode in modes if mode.startswith("int")]
    halves = [mode for mode in modes if not mode.startswith("int")]
    lines = [f"Left out: {', '.join(integers)}, whose kernels cannot run here.\n"] if integers else []
    if halves:
        lines.append(
            f"Left out: {', '.join(halves)}. A matmul in bfloat16 was tried and is slower than float32 here: there are"
            " no instructions for it, or none that the libraries may use.\n"
        )
    return "\n".join(lines)


# Layers


def layers_page(data: dict) -> str:
    """The Markdown of `kernels`; every figure comes from `data`."""
    parts = [LAYERS_INTRODUCTION, "![Speed over dense float32](kernels.png)\n", f"*{layers_caption(data)}*\n"]
    parts.append(f"## What this says\n\n{''.join(layers_conclusions(data))}")
    for place in data["places"]:
        parts.append(heading(place))
        for rows in dict.fromkeys(record["rows"] for record in place["records"]):
            parts.append(f"### {rows} rows\n\n{speeds_table(place, rows)}")
        parts.append(f"### Error against float64, largest of the layers above\n\n{errors_table(place)}")
    parts.append(f"## An older processor\n\n{IMITATION}\n## What was not shown\n\n{LAYERS_OPEN}")
    return "\n".join(parts)


def speeds_table(place: dict, rows: int) -> str:
    """Speeds of all layers for one number of rows; a line per measure."""
    records = [record for record in place["records"] if record["rows"] == rows]
    modes = [mode for mode in modes_of(records) if mode != (DENSE, "float32")]
    lines = []
    for shape in dict.fromkeys(tuple(record["shape"]) for record in records):
        found = {(r["mode"], r["dtype"]): r for r in records if tuple(r["shape"]) == shape}
        for key, name in measures(place):
            cells = [spread(found.get(mode, {}).get(key)) for mode in modes]
            if any(cell != "-" for cell in cells):
                lines.append([f"{shape[0]} x {shape[1]}", name, *cells])
    return table(["outputs x inputs", "speed over", *(" ".join(mode) for mode in modes)], lines)


def measures(place: dict) -> list[tuple[str, str]]:
    """(key of a record, words) of the lines of a layer."""
    found = [("over_float32", "dense float32, wall")]
    if place["threads"] == 1:
        found.append(("cpu_over_float32", "dense float32, processor"))
    return [*found, (f"{clock(place)}over_bfloat16", f"dense bfloat16, {'processor' if clock(place) else 'wall'}")]


def errors_table(place: dict) -> str:
    lines = []
    for mode in modes_of(place["records"]):
        errors = [record["error"] for record in place["records"] if (record["mode"], record["dtype"]) == mode]
        lines.append([" ".join(mode), *(f"{max(error[kind] for error in errors):.1e}" for kind in INPUTS)])
    return table(["mode", *INPUTS], lines)


def shown_rows(data: dict) -> int:
    """The rows that the plot and the conclusions are about: those of an image, else the first there are."""
    rows = [record["rows"] for place in data["places"] for record in place["records"]]
    return 512 if 512 in rows else rows[0]


def ranges(place: dict, rows: int, key: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Lowest and highest median over the layers, by mode."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in place["records"]:
        if record["rows"] == rows and key in record:
            found.setdefault((record["mode"], record["dtype"]), []).append(record[key][0])
    return {mode: (min(values), max(values)) for mode, values in found.items()}


def layers_conclusions(data: dict) -> Iterable[str]:
    """Least to most of the layers, by mode and rows."""
    for place in data["places"]:
        yield f"{title(place)}: speed by {clock_name(place)}, least to most of the layers:\n\n"
        yield f"{ranges_table(place)}\n"
    if any(record["mode"] == "int8" for place in data["places"] for record in place["records"]):
        yield (
            "In float32, exact has the error of a dense layer, and int16 a smaller one than any bfloat16 mode; int8"
            " has a larger one, most of all on gated inputs and outliers.\n"
        )


def ranges_table(place: dict) -> str:
    rows = list(dict.fromkeys(record["rows"] for record in place["records"]))
    lines = []
    for base in MARKERS:
        found = [ranges(place, number_of_rows, f"{clock(place)}over_{base}") for number_of_rows in rows]
        for mode in modes_of(place["records"]):
            # beside dense bfloat16 stand those that take its inputs
            if mode == (DENSE, base) or (base == "bfloat16" and mode[1] == "float32"):
                continue
            cells = [" to ".join(number(value) for value in speeds.get(mode, ())) or "-" for speeds in found]
            if set(cells) != {"-"}:
                lines.append([" ".join(mode), f"dense {base}", *cells])
    return table(["mode", "speed over", *(f"{number_of_rows} rows" for number_of_rows in rows)], lines)


def layers_caption(data: dict) -> str:
    several = any(place["threads"] > 1 for place in data["places"])
    clocks = "processor time with one thread, wall time with several" if several else "processor time"
    return f"{shown_rows(data)} rows; medians, by {clocks}. The line at 1 is dense float32."


def layers_plot(data: dict, path: Path) -> None:
    """A panel per place, a row per layer, a mark per mode."""
    rows = shown_rows(data)
    places = [place for place in data["places"] if any(record["rows"] == rows for record in place["records"])]

    def draw(axis, place) -> None:
        records = [record for record in place["records"] if record["rows"] == rows]
        shapes = list(dict.fromkeys(tuple(record["shape"]) for record in records))
        axis.set(yticks=range(len(shapes)), yticklabels=[f"{n} x {k}" for n, k in shapes])
        for mode in modes_of(records):
            if mode == (DENSE, "float32"):
                continue  # the line at 1
            own = [record for record in records if (record["mode"], record["dtype"]) == mode]
            values = [record[f"{clock(place)}over_float32"][0] for record in own]
            axis.plot(values, [shapes.index(tuple(record["shape"])) for record in own], **style(mode))

    panels(places, draw, path, height=lambda place: 1.0 + 0.24 * len({tuple(r["shape"]) for r in place["records"]}))


# Blocks


def step_page(data: dict) -> str:
    """The Markdown of `step`; every figure comes from `data`."""
    parts = [STEP_INTRODUCTION, "![Speed of a step over dense float32](step.png)\n"]
    parts.append("*Whole step, computed from measured blocks; medians. The line at 1 is dense float32.*\n")
    parts.append(f"## What this says\n\n{''.join(step_conclusions(data))}")
    for place in data["places"]:
        parts.append(heading(place))
        for preset in dict.fromkeys(record["preset"] for record in place["records"]):
            records = [record for record in place["records"] if record["preset"] == preset]
            parts.append(f"### {preset}, {records[0]['layers']} blocks\n\n{blocks_table(place, records)}")
            parts.append(seconds_table(place, records))
    parts.append(f"## An older processor\n\n{IMITATION}\n## What was not shown\n\n{STEP_OPEN}")
    return "\n".join(parts)


def blocks_table(place: dict, records: list[dict]) -> str:
    header = ["mode", "block, wall", "step (computed), wall"]
    keys = [("block", "over_float32"), ("step", "over_float32")]
    if place["threads"] == 1:
        header += ["block, processor time", "step (computed), processor time"]
        keys += [("block", "cpu_over_float32"), ("step", "cpu_over_float32")]
    half = f"{clock(place)}over_bfloat16"
    if any(half in record["step"] for record in records):
        header.append("step (computed) over dense bfloat16")
        keys.append(("step", half))
    lines = []
    for record in in_order(records):
        cells = [spread(record[part].get(key)) for part, key in keys]
        lines.append([label(record), *cells, f"{record['error']:.1e}"])
    return "Speed over dense float32:\n\n" + table([*header, "error"], lines)


def seconds_table(place: dict, records: list[dict]) -> str:
    key = f"{clock(place)}seconds"
    pictures = [f"picture, {steps} steps, s (computed)" for steps in STEPS]
    lines = []
    for record in in_order(records):
        times = [record[part][key] for part in ("block", "rest", "step")]
        shown = [f"{time:.3f}" for time in times] + [f"{steps * times[-1]:,.0f}" for steps in STEPS]
        lines.append([label(record), *shown])
    words = f"Seconds, {clock_name(place)}, on this shared machine with {place['threads']} thread(s):\n\n"
    return words + table(["mode", "block, s", "rest, s", "step, s (computed)", *pictures], lines)


def label(record: dict) -> str:
    return f"{record['mode']} {record['dtype']}"


def in_order(records: list[dict]) -> list[dict]:
    modes = modes_of(records)
    return sorted(records, key=lambda record: modes.index((record["mode"], record["dtype"])))


def step_conclusions(data: dict) -> Iterable[str]:
    for place in data["places"]:
        for preset in dict.fromkeys(record["preset"] for record in place["records"]):
            records = in_order([record for record in place["records"] if record["preset"] == preset])
            speeds = [
                f"{label(record)} {number(record['step'][f'{clock(place)}over_float32'][0])}"
                for record in records
                if label(record) != f"{DENSE} float32"
            ]
            yield (
                f"- {title(place)}, {preset}: speed of a step over dense float32 by {clock_name(place)}:"
                f" {', '.join(speeds)}.\n"
            )
            default = next((r for r in records if label(r) == "int16 bfloat16"), None)
            if default:
                step = default["step"][f"{clock(place)}seconds"]
                seconds = " and ".join(f"{n * step:,.0f} s at {n} steps" for n in STEPS)
                yield f"  A picture of 256 px in bfloat16 (int16, the default) is computed to take {seconds}.\n"


def step_plot(data: dict, path: Path) -> None:
    """A panel per place, a row per preset, a mark per mode."""

    def draw(axis, place) -> None:
        presets = list(dict.fromkeys(record["preset"] for record in place["records"]))
        axis.set(yticks=range(len(presets)), yticklabels=presets)
        for mode in modes_of(place["records"]):
            if mode == (DENSE, "float32"):
                continue  # the line at 1
            own = [record for record in place["records"] if (record["mode"], record["dtype"]) == mode]
            values = [record["step"][f"{clock(place)}over_float32"][0] for record in own]
            axis.plot(values, [presets.index(record["preset"]) for record in own], **style(mode))

    panels(data["places"], draw, path, height=lambda place: 1.8)


def style(mode: tuple[str, str]) -> dict:
    """Of the marks of a mode: colour by arithmetic, form by dtype."""
    name, dtype = mode
    known = name in COLOURS
    return {
        "linestyle": "none",
        "marker": MARKERS[dtype] if known else "*",
        "color": COLOURS.get(name, "#7b3fa0"),
        "markerfacecolor": "white" if dtype == "bfloat16" else None,
        "markersize": 6 if known else 10,
        "label": f"{name}, {dtype}",
    }


def panels(places: list[dict], draw: Callable, path: Path, height: Callable[[dict], float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(places))
    rows = -(-len(places) // columns)
    size = (9, 1.0 + rows * max(height(place) for place in places))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for axis, place in zip(axes.flat, places, strict=False):
        axis.axvline(1, color="black", linewidth=0.8)
        draw(axis, place)
        axis.set_title(title(place), fontsize=10)
        axis.set(xlabel="speed over dense float32 (times as fast)")
        axis.margins(y=0.15)
        axis.tick_params(labelbottom=True)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    axes[0, 0].set_xlim(left=0)  # of all, once all is drawn
    for axis in list(axes.flat)[len(places) :]:
        axis.remove()
    found = {}
    for axis in figure.axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(64)  # a third of the bytes
    few.save(path, optimize=True)
