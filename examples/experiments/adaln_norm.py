"""The RMSNorm that TerDiT adds after adaLN, in small: Figures 3, 7 and 8 of https://arxiv.org/abs/2405.14854.

    OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --part activations
    OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --render docs/results

Records go to outputs/results/adaln_norm.jsonl; a run that is there is not done again.
"""

import statistics
from pathlib import Path

import torch
from common import (
    METHOD,
    SIZES,
    Arm,
    Records,
    cell,
    claim,
    comparisons,
    draw_seeds,
    made_on,
    main,
    mean,
    rate_cell,
    run_arm,
    save_figure,
    table,
    values,
)
from torch import nn

from diffusers_terdit import TernaryLinear


# width -> arm -> what is trained. Learning rates and steps: `common.SIZES`; seeds: `common.SEEDS`.
ARMS = {
    "reference, RMSNorm": {"initialization": "reference", "adaln": "norm"},
    "reference, no norm": {"initialization": "reference", "adaln": "plain"},
    "small gain, RMSNorm": {"initialization": "small_gain", "adaln": "norm"},
    "small gain, no norm": {"initialization": "small_gain", "adaln": "plain"},
    "full precision": {"initialization": "small_gain", "adaln": "plain", "weights": "full"},
}
MORE_ARMS = {
    "reference, full-precision adaLN": {"initialization": "reference", "adaln": "full"},
    "reference, BitNet layout": {"initialization": "reference", "adaln": "bitnet"},
    "small gain, full-precision adaLN": {"initialization": "small_gain", "adaln": "full"},
}
WIDTHS = ("64", "384")

# Figure 3: (rows, inputs, outputs), how often a layer is drawn, and the bins of log10 of the outputs' magnitude
SHAPE, DRAWS = (512, 1024, 9216), 16
BINS = torch.linspace(-3, 3, 61)
KINDS = ("full precision", "reference", "small gain")


def activations(kind: str, norm: bool) -> dict:
    """Outputs of random layers for an input of ones: deviation and largest magnitude of each, one histogram of all."""
    rows, inputs, outputs = SHAPE
    result = {"std": [], "largest": [], "histogram": torch.zeros(len(BINS) - 1)}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        layer = (nn.Linear if kind == "full precision" else TernaryLinear)(inputs, outputs, bias=False)
        nn.init.xavier_uniform_(layer.weight)
        if kind == "reference":
            nn.init.normal_(layer.weight_scale)
        with torch.no_grad():
            output = layer(torch.ones(rows, inputs))
            if norm:
                gain = 0.1 if kind == "small gain" else 1.0
                output = gain * nn.functional.rms_norm(output, (outputs,), eps=1e-5)
        result["std"].append(output[0].std().item())
        result["largest"].append(output[0].abs().max().item())
        result["histogram"] += torch.histogram(
            output[0].abs().clamp(min=1e-3).log10(), BINS
        ).hist  # all rows are equal
    return {**result, "histogram": result["histogram"].int().tolist()}


def activations_run(kind: str, norm: bool) -> dict:
    return {"activations": kind, "norm": norm, "draws": DRAWS, "shape": list(SHAPE)}


def run_activations(records: Records) -> None:
    for kind in KINDS:
        for norm in (False, True):
            records.get(activations_run(kind, norm), lambda kind=kind, norm=norm: activations(kind, norm))


def run_width(width: str, arms: dict):
    return lambda records: [run_arm(records, Arm(width, **arm)) for arm in arms.values()]


PARTS = {
    "activations": run_activations,
    **{f"width {width}": run_width(width, ARMS) for width in WIDTHS},
    **{f"width {width}, more": run_width(width, MORE_ARMS) for width in WIDTHS},
}


QUESTIONS = [
    ("reference, RMSNorm", "reference, no norm"),
    ("small gain, RMSNorm", "small gain, no norm"),
    ("small gain, no norm", "reference, RMSNorm"),
    ("small gain, RMSNorm", "reference, RMSNorm"),
    ("reference, full-precision adaLN", "reference, RMSNorm"),
    ("reference, BitNet layout", "reference, RMSNorm"),
    ("small gain, full-precision adaLN", "small gain, RMSNorm"),
    ("full precision", "small gain, RMSNorm"),
]


def outcomes(records: Records, width: str) -> dict[str, dict]:
    """What the records hold of the arms of a width, by name."""
    found = {name: run_arm(records, Arm(width, **arm), find_only=True) for name, arm in {**ARMS, **MORE_ARMS}.items()}
    return {name: outcome for name, outcome in found.items() if outcome}


def points(outcome: dict, key: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and at each the value of every seed."""
    curves = [seed["curve"] for seed in outcome["seeds"]]
    return [point["step"] for point in curves[0]], [[point[key] for point in at] for at in zip(*curves, strict=True)]


COLORS = {
    "reference, RMSNorm": "tab:red",
    "reference, no norm": "tab:orange",
    "small gain, RMSNorm": "tab:blue",
    "small gain, no norm": "tab:cyan",
    "full precision": "black",
    "reference, full-precision adaLN": "tab:pink",
    "reference, BitNet layout": "tab:brown",
    "small gain, full-precision adaLN": "tab:green",
}


def draw(records: Records, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), dpi=80, layout="constrained")
    for axis, norm in zip(axes[:, 0], (False, True), strict=True):
        for kind, color in zip(KINDS, ("tab:gray", "tab:red", "tab:blue"), strict=True):
            result = records.find(activations_run(kind, norm))
            if result:
                share = torch.tensor(result["histogram"]) / (SHAPE[2] * DRAWS)
                axis.stairs(share, 10**BINS, label=kind, color=color, fill=True, alpha=0.45)
        axis.set(xscale="log", xlabel="magnitude of an output", ylabel="share of outputs per bin")
        axis.set_title("1024 -> 9216, ones in, " + ("with RMSNorm" if norm else "no norm"))
        axis.legend()
    measures = {"noise_error_held_out": "noise error, held-out digits", "frechet_distance": "Fréchet distance"}
    for row, width in zip(axes, WIDTHS, strict=True):
        found = outcomes(records, width)
        for axis, (key, label) in zip(row[1:], measures.items(), strict=True):
            for name, outcome in found.items():
                steps, seeds = points(outcome, key)
                style = "--" if "no norm" in name else "-"
                draw_seeds(axis, steps, seeds, linestyle=style, color=COLORS[name], label=name)
            axis.set(xlabel="optimizer steps", ylabel=label, title=f"width {width}")
    handles = {
        label: handle for axis in axes[:, 1] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    save_figure(figure, path)
    plt.close(figure)


def activation_rows(records: Records) -> list[list[str]]:
    rows = []
    for kind in KINDS:
        for norm in (False, True):
            result = records.find(activations_run(kind, norm))
            if result:
                low, high = min(result["std"]), max(result["std"])
                largest = f"{min(result['largest']):.2f} to {max(result['largest']):.2f}"
                rows.append([kind, "RMSNorm" if norm else "none", f"{low:.3f} to {high:.3f}", largest])
    return rows


PAGE = """# The RMSNorm after adaLN, in small

Asked: does the RMSNorm that TerDiT adds after its ternary adaLN layer do what the paper says, and what would do
without it?

The paper (https://arxiv.org/abs/2405.14854) says: outputs of a random ternary layer are far larger than those of a
full-precision one, and an RMSNorm bounds them (Figure 3); with it the loss falls faster and the FID is clearly lower
at every checkpoint of a run of 400,000 steps (Figures 7 and 8; the curves carry no numbers). Notes that others took
of the paper's second version give an FID of 6.60 for the layout of BitNet b1.58, where TerDiT-600M has 4.34. A
reviewer asked whether a better initial scale would do the same, because the authors draw each layer's scale from a
normal distribution.

{made}

```bash
OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --list   # parts, minutes each; a rerun goes on
OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --part "width 384"
OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --render docs/results  # this page
```

![Output magnitudes of random layers; noise error and Fréchet distance by step](adaln_norm.png)

Shaded: lowest to highest of three seeds.

## Arms

*reference*: the authors' start: scales drawn from a normal distribution, adaLN weights zero, gain of the RMSNorm 1.
*small gain*: this package's: scales that keep the variance; adaLN xavier with gain 0.1 where there is the RMSNorm,
zero where there is none. *full-precision adaLN*: all other layers ternary; adaLN as in DiT, without a norm. *BitNet
layout*: no norm after adaLN, but an RMSNorm with gain before every ternary layer. *full precision*: no ternary
layer, adaLN as in DiT.

{method}

## What held

The first three are the paper's, the next is the reviewer's, the last is the question that is left.

{claims}

## Figure 3: a random layer, 1024 inputs, 9216 outputs, 512 rows of ones

{activations}

Ones are the input at which a sum of 1024 random signs shows at its full size. The reference's scale is a normal
number, so its layers differ from draw to draw; with the scale that keeps the variance the outputs are of size 1
without any norm.

{sections}

## What this does not show

- Models of at most 6 million weights on 8x8 pixels, hundreds of steps: the first moments of a run that the paper
  measures over 400,000 steps with 600 million weights. A faster start need not be a better end, and nothing here
  speaks about 600M or 4.2B.
- Three seeds: a range of three is a rough measure of chance, and many pairs are compared. The reference's start
  varies most from seed to seed, because it draws its scales.
- The two widths differ in depth, steps, batch, number of samples and learning rates as well; their numbers do not
  compare with each other.
- The layout of BitNet is ours after its description; the authors' script for that comparison was not seen.
"""


CLAIMS = [
    ("The RMSNorm is better than no norm, from the authors' start", "reference, RMSNorm", "reference, no norm"),
    ("BitNet's layout is worse than the RMSNorm after adaLN", "reference, RMSNorm", "reference, BitNet layout"),
    ("A better start without any norm beats the authors' start with it", "small gain, no norm", "reference, RMSNorm"),
    ("The RMSNorm is better than no norm, from the better start", "small gain, RMSNorm", "small gain, no norm"),
]


def claim_rows(records: Records) -> list[list[str]]:
    rows = []
    plain, reference, ours = (records.find(activations_run(kind, norm=False)) for kind in KINDS)
    if plain and reference and ours:
        medians = [statistics.median(result["std"]) for result in (reference, plain, ours)]
        text = "deviation (median): authors' start {:.1f}, full precision {:.2f}, small gain {:.2f}".format(*medians)
        rows.append(["Outputs of a random ternary layer are far larger", text, ""])
    by_width = [outcomes(records, width) for width in WIDTHS]
    return rows + [[text, *(claim(found, first, second) for found in by_width)] for text, first, second in CLAIMS]


def arm_row(name: str, outcome: dict) -> list[str]:
    early = [seed["curve"][0]["frechet_distance"] for seed in outcome["seeds"]]
    return [
        name,
        cell(values(outcome, "noise_error")),
        cell(values(outcome, "noise_error_held_out")),
        cell(values(outcome, "frechet_distance"), 1),
        f"{mean(early):.1f}",
        f"{max(values(outcome, 'max_grad_norm')):.0f}",
        rate_cell(outcome),
    ]


def section(records: Records, width: str) -> str:
    found, size = outcomes(records, width), SIZES[width]
    header = ["arm", "noise error, training", "held out", "Fréchet distance", f"after {size.every} steps"]
    header += ["largest gradient norm", "learning rate"]
    title = f"## Width {width}: {size.num_layers} layers, {size.steps} steps of {size.batch_size}"
    title += f"; {size.num_images} samples of {size.sampling_steps} steps"
    rows = [arm_row(name, outcome) for name, outcome in found.items()]
    return "\n\n".join([title, table(header, rows), comparisons(found, QUESTIONS)])


def render(folder: Path, plot: bool = False) -> str:
    """The page of the records in a folder; with `plot`, the picture beside it."""
    records = Records(folder / "adaln_norm.jsonl")
    if plot:
        draw(records, folder / "adaln_norm.png")
    header = ["layer", "after it", "standard deviation, lowest to highest of 16 draws", "largest magnitude"]
    return PAGE.format(
        method=METHOD,
        made=made_on(records),
        claims=table(["claim", *(f"width {width}" for width in WIDTHS)], claim_rows(records)),
        activations=table(header, activation_rows(records)),
        sections="\n\n".join(section(records, width) for width in WIDTHS),
    )


if __name__ == "__main__":
    main(__doc__, "adaln_norm", PARTS, render)
