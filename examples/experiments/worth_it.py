"""Is ternary worth it, at small scale: full precision, equal bytes, equal compute, four levels, row scales, a start.

    OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --part sizes
    OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --render docs/results

Records go to outputs/results/worth_it.jsonl; a run that is there, or in adaln_norm.jsonl, is not repeated.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import mean

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from common import (
    SIZES,
    Records,
    Variant,
    cell,
    claim,
    comparisons,
    draw_seeds,
    draw_variants,
    file_bytes,
    judge,
    made_on,
    main,
    pyplot,
    rate_cell,
    real_features,
    run_variant,
    sample,
    save_figure,
    training_flops,
    values,
    verdict,
    write_page,
)  # fmt: skip
from diffusers_terdit import TerDiTPipeline, evaluation
from diffusers_terdit.checkpoints import bundled


FULL = {"weights": "full", "adaln": "plain"}
SMALL = "32, ffn 72"  # in bfloat16 as many bytes as the ternary model of width 64
SIZE_NAMES = ("32", "64", "128")
COMPUTE_FACTOR = 4.75  # matrix products of a step of width 64, over those of a step of SMALL

# What is trained. Learning rates and steps: `common.SIZES`; seeds: `common.SEEDS`.
VARIANTS = {
    "sizes": {
        **{f"ternary, {size}": Variant(size) for size in SIZE_NAMES},
        **{f"full precision, {size}": Variant(size, **FULL) for size in SIZE_NAMES},
    },
    "bytes": {
        "ternary, 64": Variant("64"),
        "bfloat16, equal bytes": Variant(SMALL, **FULL),
        "bfloat16, equal bytes, equal compute": Variant(SMALL, **FULL, steps_factor=COMPUTE_FACTOR),
        "four levels, 64": Variant("64", weights="four levels"),
    },
    "scales": {
        "row scales, 64": Variant("64", scale="row"),
        "absmean scale, 64": Variant("64", scale="absmean"),
    },
    "start": {
        "full precision for 1/2 of the steps, then ternary": Variant("64", full_share=0.5),
        "the same, blended over 1/4 of the rest": Variant("64", full_share=0.5, blend_share=0.25),
        "full precision for 1/4 of the steps, then ternary": Variant("64", full_share=0.25),
    },
}
ALL_VARIANTS = {name: variant for part in VARIANTS.values() for name, variant in part.items()}

# Sampling of the bundled checkpoint: (sampler, steps, guidance), 500 images each from 3 seeds
SAMPLERS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}
SETTINGS = [
    *[("DDPM", steps, 1.5) for steps in (250, 50, 25)],
    *[(name, steps, 1.5) for name in ("DDIM", "DPM-Solver++") for steps in (50, 20, 10)],
    *[("DDIM", 50, scale) for scale in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)],
]
SAMPLING_SEEDS = (0, 1, 2)
HELD_OUT = {"sampling": "held-out digits"}


def sampling_run(name: str, steps: int, guidance_scale: float, seed: int) -> dict:
    return {"sampling": name, "steps": steps, "guidance_scale": guidance_scale, "seed": seed, "images": 500}


def run_sampling(records: Records) -> None:
    pipe = TerDiTPipeline.from_pretrained(bundled("digits"))
    config = pipe.scheduler.config

    def judged(name: str, steps: int, guidance: float, seed: int) -> dict:
        pipe.scheduler = SAMPLERS[name].from_config(config)
        return judge(sample(pipe, 500, steps, guidance, seed))

    def held_out() -> dict:
        return {"frechet_distance": evaluation.frechet_distance(real_features(False), real_features())}

    records.get(HELD_OUT, held_out)
    for setting in SETTINGS:
        for seed in SAMPLING_SEEDS:
            records.get(sampling_run(*setting, seed), lambda setting=setting, seed=seed: judged(*setting, seed))


def find_sampling(records: Records, setting: tuple) -> list[dict] | None:
    """Find the results of a setting's seeds; `None` where one is missing."""
    results = [records.find(sampling_run(*setting, seed)) for seed in SAMPLING_SEEDS]
    return None if None in results else results


def costs(variant: Variant) -> dict:
    """Bytes of the weights file, and operations of the matrix products of a training run."""
    images = variant.steps * SIZES[variant.size].batch_size
    return {"file_bytes": file_bytes(variant), "training_flops": images * training_flops(variant.size)}


def cost_run(variant: Variant) -> dict:
    return {"costs": asdict(variant)}


def run_part(part: str):
    def run(records: Records) -> None:
        for variant in VARIANTS[part].values():
            records.get(cost_run(variant), lambda variant=variant: costs(variant))
            run_variant(records, variant)

    return run


PARTS = {**{part: run_part(part) for part in VARIANTS}, "sampling": run_sampling}

# title -> the variants of its table, and the pairs that are compared
TABLES = {
    "Does the gap shrink with size?": (
        list(VARIANTS["sizes"]),
        [(f"ternary, {size}", f"full precision, {size}") for size in SIZE_NAMES],
    ),
    "Equal bytes, equal compute, four levels": (
        list(VARIANTS["bytes"]),
        [("ternary, 64", other) for other in list(VARIANTS["bytes"])[1:]],
    ),
    "Scales": (["ternary, 64", *VARIANTS["scales"]], [(name, "ternary, 64") for name in VARIANTS["scales"]]),
    "A start in full precision, equal steps in all": (
        ["ternary, 64", *VARIANTS["start"]],
        [(name, "ternary, 64") for name in VARIANTS["start"]],
    ),
}
SHRINKS = "The gap to full precision shrinks with size (noise error, width 128 against 32)"
CLAIMS = [
    ("At equal bytes and steps, ternary beats a smaller model in bfloat16", "ternary, 64", "bfloat16, equal bytes"),
    ("At equal bytes and compute, too", "ternary, 64", "bfloat16, equal bytes, equal compute"),
    ("Four levels make better use of two bits", "four levels, 64", "ternary, 64"),
    ("A scale per row is better than one per matrix", "row scales, 64", "ternary, 64"),
    ("A learned scale is better than the mean of the magnitudes", "ternary, 64", "absmean scale, 64"),
    *[(f"A start in full precision is better: {name}", name, "ternary, 64") for name in VARIANTS["start"]],
]


def gap(found: dict, size: str, key: str) -> list[float]:
    """Ternary over full precision, seed by seed; empty where one is missing."""
    pair = [found.get(f"{weights}, {size}") for weights in ("ternary", "full precision")]
    return [a / b for a, b in zip(*(values(outcome, key) for outcome in pair), strict=True)] if all(pair) else []


def claim_rows(found: dict) -> list[list[str]]:
    ratios = [gap(found, size, "noise_error_held_out") for size in ("128", "32")]
    answer = "not run"
    if all(ratios):
        text = verdict(*ratios).replace("**better**", "**held**").replace("**worse**", "**refuted**")
        answer = f"ratio {' against '.join(cell(ratio, 2) for ratio in ratios)}: {text}"
    return [[SHRINKS, answer], *([text, claim(found, first, second)] for text, first, second in CLAIMS)]


def draw(records: Records, found: dict, path: Path) -> None:
    plt = pyplot()
    figure, (by_bytes, by_variant) = plt.subplots(1, 2, figsize=(11, 4.4))
    for kind, color, place in (("ternary", "C0", (-6, -12)), ("full precision", "C1", (6, 6))):
        names = [f"{kind}, {size}" for size in SIZE_NAMES if f"{kind}, {size}" in found]
        sizes = [records.find(cost_run(ALL_VARIANTS[name]))["file_bytes"] / 1000 for name in names]
        errors = [values(found[name], "noise_error_held_out") for name in names]
        draw_seeds(by_bytes, sizes, errors, color=color, label=kind if kind == "ternary" else f"{kind}, bfloat16")
        for name, x, error in zip(names, sizes, errors, strict=True):
            by_bytes.annotate(name.split(', ')[1], (x, mean(error)), textcoords="offset points",
                              xytext=place, color=color, ha="right" if kind == "ternary" else "left")  # fmt: skip
    by_bytes.set(xlabel="weights file, kB", ylabel="held-out noise error (lower is better)")
    by_bytes.set_title("equal steps; the numbers are widths")
    by_bytes.set_xlim(-170, 2300)
    by_bytes.legend(loc="upper right")
    names = [*dict.fromkeys(name for shown, _ in list(TABLES.values())[1:] for name in shown), "full precision, 64"]
    shown = {name: values(found[name], "noise_error_held_out") for name in names if name in found}
    draw_variants(by_variant, shown, {"ternary, 64": "C0"})
    by_variant.set(xlabel="held-out noise error (lower is better)", title="width 64 and equals, 3 seeds")
    save_figure(figure, path)
    plt.close(figure)


def variant_row(records: Records, name: str, outcome: dict) -> list[str]:
    cost = records.find(cost_run(ALL_VARIANTS[name]))
    return [
        name,
        f"{cost['file_bytes'] / 1000:.0f}",
        f"{cost['training_flops'] / 1e12:.2f}",
        f"{ALL_VARIANTS[name].steps} / {mean(values(outcome, 'cpu_seconds')):.0f}",
        cell(values(outcome, "noise_error")),
        cell(values(outcome, "noise_error_held_out")),
        cell(values(outcome, "frechet_distance"), 1),
        cell([100 * share for share in values(outcome, "recognised")], 0),
        rate_cell(outcome),
    ]


def sampling_row(setting: tuple, results: list[dict]) -> list[str]:
    distance = cell([result["frechet_distance"] for result in results], 2)
    return [setting[0], str(setting[1]), f"{setting[2]:g}", distance,
            cell([100 * result["recognised"] for result in results], 1)]  # fmt: skip


def render(folder: Path, plot: bool = False) -> str:
    """Page of the records in a folder; with `plot`, write the picture, too."""
    records = Records(folder / "worth_it.jsonl")
    found = {name: run_variant(records, variant, find_only=True) for name, variant in ALL_VARIANTS.items()}
    found = {
        name: outcome for name, outcome in found.items() if outcome and records.find(cost_run(ALL_VARIANTS[name]))
    }
    if plot:
        draw(records, found, folder / "worth_it.png")
    keys = ("noise_error", "noise_error_held_out", "frechet_distance")
    return write_page(
        "worth_it",
        made=made_on(records),
        factor=COMPUTE_FACTOR,
        steps=SIZES["64"].steps,
        claims=claim_rows(found),
        gaps=[[s, *(cell(gap(found, s, key), 2) for key in keys)] for s in SIZE_NAMES if gap(found, s, keys[0])],
        sections={
            title: [variant_row(records, name, found[name]) for name in names if name in found]
            for title, (names, _) in TABLES.items()
        },
        comparisons={title: comparisons(found, pairs) for title, (_, pairs) in TABLES.items()},
        sampling=[sampling_row(setting, at) for setting in SETTINGS if (at := find_sampling(records, setting))],
        floor=records.find(HELD_OUT),
    )


if __name__ == "__main__":
    main(__doc__, "worth_it", PARTS, render)
