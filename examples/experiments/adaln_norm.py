"""The RMSNorm that TerDiT adds after adaLN, at small scale: Figures 3, 7 and 8 of https://arxiv.org/abs/2405.14854.

    OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --part activations
    OMP_NUM_THREADS=1 python examples/experiments/adaln_norm.py --render docs/results

Records go to outputs/results/adaln_norm.jsonl; a run that is there is not repeated.
"""

from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from common import (
    SIZES,
    Records,
    Variant,
    cell,
    claim,
    comparisons,
    draw_variants,
    made_on,
    main,
    pyplot,
    rate_cell,
    run_variant,
    save_figure,
    values,
    write_page,
)
from diffusers_terdit import TernaryLinear


# What is trained at each width. Learning rates and steps: `common.SIZES`; seeds: `common.SEEDS`.
VARIANTS = {
    "reference, RMSNorm": {"initialization": "reference", "adaln": "norm"},
    "reference, no norm": {"initialization": "reference", "adaln": "plain"},
    "small gain, RMSNorm": {"initialization": "small_gain", "adaln": "norm"},
    "small gain, no norm": {"initialization": "small_gain", "adaln": "plain"},
    "full precision": {"initialization": "small_gain", "adaln": "plain", "weights": "full"},
}
MORE_VARIANTS = {
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
            output = layer(torch.ones(rows, inputs))[0]  # all rows are equal
            if norm:
                gain = 0.1 if kind == "small gain" else 1.0
                output = gain * nn.functional.rms_norm(output, (outputs,), eps=1e-5)
        result["std"].append(output.std().item())
        result["largest"].append(output.abs().max().item())
        result["histogram"] += torch.histogram(output.abs().clamp(min=1e-3).log10(), BINS).hist
    return {**result, "histogram": result["histogram"].int().tolist()}


def activations_run(kind: str, norm: bool) -> dict:
    return {"activations": kind, "norm": norm, "draws": DRAWS, "shape": list(SHAPE)}


LAYERS = [(kind, norm) for kind in KINDS for norm in (False, True)]


def run_activations(records: Records) -> None:
    for layer in LAYERS:
        records.get(activations_run(*layer), lambda layer=layer: activations(*layer))


def run_width(width: str, variants: dict):
    return lambda records: [run_variant(records, Variant(width, **variant)) for variant in variants.values()]


PARTS = {
    "activations": run_activations,
    **{f"width {width}": run_width(width, VARIANTS) for width in WIDTHS},
    **{f"width {width}, more": run_width(width, MORE_VARIANTS) for width in WIDTHS},
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
CLAIMS = [
    ("The RMSNorm is better than no norm, from the authors' start", "reference, RMSNorm", "reference, no norm"),
    ("BitNet's layout is worse than the RMSNorm after adaLN", "reference, RMSNorm", "reference, BitNet layout"),
    ("A better start without any norm beats the authors' start with one", "small gain, no norm", "reference, RMSNorm"),
    ("The RMSNorm is better than no norm, from the better start", "small gain, RMSNorm", "small gain, no norm"),
]
ERROR = "noise_error_held_out"


def outcomes(records: Records, width: str) -> dict[str, dict]:
    """Find what the records hold of the variants of a width, by name."""
    variants = {name: Variant(width, **variant) for name, variant in {**VARIANTS, **MORE_VARIANTS}.items()}
    found = {name: run_variant(records, variant, find_only=True) for name, variant in variants.items()}
    return {name: outcome for name, outcome in found.items() if outcome}


def draw(records: Records, path: Path) -> None:
    plt = pyplot()
    figure, (sizes, *errors) = plt.subplots(1, 3, figsize=(12, 4), width_ratios=(4, 5, 5))
    for kind, color in zip(KINDS, ("C1", "C2", "C0"), strict=True):
        if result := records.find(activations_run(kind, False)):
            share = torch.tensor(result["histogram"]) / (SHAPE[2] * DRAWS)
            sizes.stairs(share, 10**BINS, label=kind, color=color, fill=True, alpha=0.45)
    sizes.set(xscale="log", xlabel="magnitude of an output", ylabel="share of outputs per bin")
    sizes.set_title("a random layer, no norm")
    sizes.set_ylim(0, 0.17)
    sizes.legend(loc="upper right")
    for axis, width in zip(errors, WIDTHS, strict=True):
        found = {name: values(outcome, ERROR) for name, outcome in outcomes(records, width).items()}
        draw_variants(axis, found, {"small gain": "C0", "reference": "C2"})
        steps = SIZES[width].steps
        axis.set(xlabel="noise error (lower is better)", title=f"width {width}, {steps} steps")
    save_figure(figure, path)
    plt.close(figure)


def activation_row(kind: str, norm: bool, result: dict) -> list[str]:
    ranges = [f"{min(result['std']):.3f} to {max(result['std']):.3f}"]
    ranges.append(f"{min(result['largest']):.2f} to {max(result['largest']):.2f}")
    return [kind, "RMSNorm" if norm else "none", *ranges]


def claim_rows(found: dict[tuple, dict], widths: dict[str, dict]) -> list[list[str]]:
    rows = []
    if all((kind, False) in found for kind in KINDS):
        full, reference, ours = (median(found[kind, False]["std"]) for kind in KINDS)
        text = f"deviation (median): authors' start {reference:.1f}, full precision {full:.2f}, small gain {ours:.2f}"
        rows.append(["Outputs of a random ternary layer are far larger than full precision's", text, ""])
    return rows + [[text, *(claim(w, first, second) for w in widths.values())] for text, first, second in CLAIMS]


def variant_row(name: str, outcome: dict) -> list[str]:
    return [
        name,
        cell(values(outcome, "noise_error")),
        cell(values(outcome, "noise_error_held_out")),
        cell(values(outcome, "frechet_distance"), 1),
        cell([100 * share for share in values(outcome, "recognised")], 0),
        f"{mean(seed['curve'][0]['frechet_distance'] for seed in outcome['seeds']):.1f}",
        f"{max(values(outcome, 'max_grad_norm')):.0f}",
        rate_cell(outcome),
    ]


def render(folder: Path, plot: bool = False) -> str:
    """Page of the records in a folder; with `plot`, write the picture, too."""
    records = Records(folder / "adaln_norm.jsonl")
    if plot:
        draw(records, folder / "adaln_norm.png")
    found = {layer: result for layer in LAYERS if (result := records.find(activations_run(*layer)))}
    widths = {width: outcomes(records, width) for width in WIDTHS}
    return write_page(
        "adaln_norm",
        made=made_on(records),
        sizes=SIZES,
        claims=claim_rows(found, widths),
        activations=[activation_row(*layer, result) for layer, result in found.items()],
        widths={width: [variant_row(*item) for item in outcome.items()] for width, outcome in widths.items()},
        comparisons={width: comparisons(outcome, QUESTIONS) for width, outcome in widths.items()},
    )


if __name__ == "__main__":
    main(__doc__, "adaln_norm", PARTS, render)
