"""Is ternary worth it, in small: against full precision, equal bytes, equal compute, four levels, row scales, a start.

    OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --part sizes
    OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --render docs/results

Records go to outputs/results/worth_it.jsonl; a run that is there, or in adaln_norm.jsonl, is not done again.
"""

from dataclasses import asdict
from pathlib import Path

from common import (
    METHOD,
    SIZES,
    Arm,
    Records,
    cell,
    claim,
    comparisons,
    draw_seeds,
    file_bytes,
    judge,
    made_on,
    main,
    mean,
    rate_cell,
    real_features,
    run_arm,
    sample,
    save_figure,
    table,
    training_flops,
    values,
    verdict,
)  # fmt: skip
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusers_terdit import TerDiTPipeline, evaluation
from diffusers_terdit.checkpoints import bundled


FULL = {"weights": "full", "adaln": "plain"}
SMALL = "32, ffn 72"  # in bfloat16 as many bytes as the ternary model of width 64
SIZE_NAMES = ("32", "64", "128")


COMPUTE_FACTOR = 4.75  # matrix products of a step of width 64, over those of a step of SMALL

# What is trained. Learning rates and steps: `common.SIZES`; seeds: `common.SEEDS`.
ARMS = {
    "sizes": {
        **{f"ternary, {size}": Arm(size) for size in SIZE_NAMES},
        **{f"full precision, {size}": Arm(size, **FULL) for size in SIZE_NAMES},
    },
    "bytes": {
        "ternary, 64": Arm("64"),
        "bfloat16, equal bytes": Arm(SMALL, **FULL),
        "bfloat16, equal bytes, equal compute": Arm(SMALL, **FULL, steps_factor=COMPUTE_FACTOR),
        "four levels, 64": Arm("64", weights="four levels"),
    },
    "scales": {
        "row scales, 64": Arm("64", scale="row"),
        "absmean scale, 64": Arm("64", scale="absmean"),
    },
    "start": {
        "full precision for 1/2 of the steps, then ternary": Arm("64", full_share=0.5),
        "the same, blended over 1/4 of the rest": Arm("64", full_share=0.5, blend_share=0.25),
        "full precision for 1/4 of the steps, then ternary": Arm("64", full_share=0.25),
    },
}

# Sampling of the bundled checkpoint: (sampler, steps, guidance), 500 images each from 3 seeds
SAMPLERS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}
SETTINGS = [
    *[("DDPM", steps, 1.5) for steps in (250, 50, 25)],
    *[(name, steps, 1.5) for name in ("DDIM", "DPM-Solver++") for steps in (50, 20, 10)],
    *[("DDIM", 50, scale) for scale in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)],
]
SAMPLING_SEEDS = (0, 1, 2)


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

    records.get({"sampling": "held-out digits"}, held_out)
    for setting in SETTINGS:
        for seed in SAMPLING_SEEDS:
            records.get(sampling_run(*setting, seed), lambda setting=setting, seed=seed: judged(*setting, seed))


def costs(arm: Arm) -> dict:
    """Bytes of the weights file, and operations of the matrix products of a training run."""
    images = arm.steps * SIZES[arm.size].batch_size
    return {"file_bytes": file_bytes(arm), "training_flops": images * training_flops(arm.size)}


def cost_run(arm: Arm) -> dict:
    return {"costs": asdict(arm)}


def run_arms(part: str):
    def run(records: Records) -> None:
        for arm in ARMS[part].values():
            records.get(cost_run(arm), lambda arm=arm: costs(arm))
            run_arm(records, arm)

    return run


PARTS = {**{part: run_arms(part) for part in ARMS}, "sampling": run_sampling}


ALL_ARMS = {name: arm for part in ARMS.values() for name, arm in part.items()}
TABLES = {
    "Does the gap shrink with size?": list(ARMS["sizes"]),
    "Equal bytes, equal compute, four levels": list(ARMS["bytes"]),
    "Scales": ["ternary, 64", *ARMS["scales"]],
    "A start in full precision, equal steps in all": ["ternary, 64", *ARMS["start"]],
}
QUESTIONS = {
    "Does the gap shrink with size?": [(f"ternary, {size}", f"full precision, {size}") for size in SIZE_NAMES],
    "Equal bytes, equal compute, four levels": [("ternary, 64", other) for other in list(ARMS["bytes"])[1:]],
    "Scales": [(name, "ternary, 64") for name in ARMS["scales"]],
    "A start in full precision, equal steps in all": [(name, "ternary, 64") for name in ARMS["start"]],
}


SHRINKS = "The gap to full precision shrinks with size (noise error, width 128 against 32)"
CLAIMS = [
    ("At equal bytes and steps, ternary beats a smaller model in bfloat16", "ternary, 64", "bfloat16, equal bytes"),
    ("At equal bytes and compute, too", "ternary, 64", "bfloat16, equal bytes, equal compute"),
    ("Four levels make better use of two bits", "four levels, 64", "ternary, 64"),
    ("A scale per row is better than one per matrix", "row scales, 64", "ternary, 64"),
    ("A learned scale is better than the mean of the magnitudes", "ternary, 64", "absmean scale, 64"),
    *[(f"A start in full precision is better: {name}", name, "ternary, 64") for name in ARMS["start"]],
]


def claim_rows(found: dict) -> list[list[str]]:
    ends = [(found.get(f"ternary, {size}"), found.get(f"full precision, {size}")) for size in ("128", "32")]
    answer = "not run"
    if all(all(pair) for pair in ends):
        ratios = [{"seeds": [{"ratio": ratio} for ratio in gap(*pair, "noise_error_held_out")]} for pair in ends]
        text = verdict(*ratios, "ratio").replace("**better**", "**held**").replace("**worse**", "**the opposite**")
        answer = f"ratio {' against '.join(cell(values(ratio, 'ratio'), 2) for ratio in ratios)}: {text}"
    return [[SHRINKS, answer], *([text, claim(found, first, second)] for text, first, second in CLAIMS)]


def gap(ternary: dict, full: dict, key: str) -> list[float]:
    """Ternary over full precision, seed by seed."""
    return [a / b for a, b in zip(values(ternary, key), values(full, key), strict=True)]


def draw(records: Records, found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_bytes, by_arm, by_guidance) = plt.subplots(1, 3, figsize=(12, 4.6), dpi=80, layout="constrained")
    for kind, color, offset in (("ternary", "tab:blue", -12), ("full precision", "black", 6)):
        names = [f"{kind}, {size}" for size in SIZE_NAMES if f"{kind}, {size}" in found]
        sizes = [records.find(cost_run(ALL_ARMS[name]))["file_bytes"] / 1000 for name in names]
        errors = [values(found[name], "noise_error_held_out") for name in names]
        label = "ternary" if kind == "ternary" else "dense, bfloat16"
        draw_seeds(by_bytes, sizes, errors, color=color, label=label)
        for name, x, error in zip(names, sizes, errors, strict=True):
            by_bytes.annotate(name.split(", ")[1], (x, mean(error)), textcoords="offset points", xytext=(3, offset))
    by_bytes.set(xscale="log", xlabel="weights file, kB", ylabel="noise error, held-out digits", title="equal steps")
    by_bytes.minorticks_off()
    by_bytes.set_xticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1000", "2000"])
    by_bytes.legend(loc="lower left", fontsize=7)
    names = [
        name for name in dict.fromkeys(name for title in list(TABLES)[1:] for name in TABLES[title]) if name in found
    ]
    names += [name for name in ("full precision, 64",) if name in found]
    for row, name in enumerate(reversed(names)):
        errors = values(found[name], "noise_error_held_out")
        by_arm.plot(errors, [row] * len(errors), ".", color="tab:blue", alpha=0.6)
        by_arm.plot(mean(errors), row, "|", markersize=14, color="black")
    wrapped = [
        name.replace(" of the steps, then", "\nof the steps, then").replace(", equal c", ",\nequal c")
        for name in names
    ]
    by_arm.set_yticks(range(len(names)), reversed(wrapped), fontsize=8)
    by_arm.set(xlabel="noise error, held-out digits", title="width 64 and equals, 3 seeds")
    for key, axis, color in (
        ("frechet_distance", by_guidance, "tab:blue"),
        ("recognised", by_guidance.twinx(), "tab:green"),
    ):
        settings = sorted((s for s in SETTINGS if s[:2] == ("DDIM", 50)), key=lambda setting: setting[2])
        at = {s[2]: [records.find(sampling_run(*s, seed)) for seed in SAMPLING_SEEDS] for s in settings}
        at = {scale: [result[key] for result in results] for scale, results in at.items() if None not in results}
        draw_seeds(axis, list(at), list(at.values()), color=color)
        name = "Fréchet distance" if key == "frechet_distance" else "share recognised"
        axis.set_ylabel(name, color=color)
        axis.set(xlabel="guidance scale", title="bundled digits, DDIM 50 steps")
    save_figure(figure, path)
    plt.close(figure)


def arm_row(records: Records, name: str, outcome: dict) -> list[str]:
    cost = records.find(cost_run(ALL_ARMS[name]))
    steps = ALL_ARMS[name].steps
    return [
        name,
        f"{cost['file_bytes'] / 1000:.0f}",
        f"{cost['training_flops'] / 1e12:.2f}",
        f"{steps} / {mean(values(outcome, 'cpu_seconds')):.0f}",
        cell(values(outcome, "noise_error")),
        cell(values(outcome, "noise_error_held_out")),
        cell(values(outcome, "frechet_distance"), 1),
        rate_cell(outcome),
    ]


def gaps(found: dict) -> str:
    """Noise error and Frechet distance of ternary over full precision, seed by seed."""
    rows = []
    for size in SIZE_NAMES:
        ternary, full = found.get(f"ternary, {size}"), found.get(f"full precision, {size}")
        if ternary and full:
            keys = ("noise_error", "noise_error_held_out", "frechet_distance")
            ratios = [gap(ternary, full, key) for key in keys]
            rows.append([size, *(cell(ratio, 2) for ratio in ratios)])
    header = ["width", "noise error, training", "noise error, held out", "Fréchet distance"]
    return "Ternary over full precision, each seed by itself:\n\n" + table(header, rows)


def section(records: Records, found: dict, title: str) -> str:
    header = [
        "arm",
        "file, kB",
        "TFLOP",
        "steps / CPU s",
        "noise error, training",
        "held out",
        "Fréchet distance",
        "learning rate",
    ]
    parts = [f"## {title}", table(header, [arm_row(records, n, found[n]) for n in TABLES[title] if n in found])]
    if title.startswith("Does the gap"):
        parts.append(gaps(found))
    return "\n\n".join([*parts, comparisons(found, QUESTIONS[title])])


def sampling_section(records: Records) -> str:
    rows = []
    for setting in SETTINGS:
        results = [records.find(sampling_run(*setting, seed)) for seed in SAMPLING_SEEDS]
        if None not in results:
            recognised = [100 * result["recognised"] for result in results]
            distance = [result["frechet_distance"] for result in results]
            rows.append([setting[0], str(setting[1]), f"{setting[2]:g}", cell(distance, 2), cell(recognised, 1)])
    floor = records.find({"sampling": "held-out digits"})
    if not rows or floor is None:
        return "## Samplers, steps and guidance\n\nNot run."
    header = ["sampler", "steps", "guidance", "Fréchet distance", "recognised, %"]
    return SAMPLING.format(table=table(header, rows), floor=floor["frechet_distance"])


SAMPLING = """## Samplers, steps and guidance

The bundled checkpoint (ternary, width 64, 12,000 steps), packed, 500 images from each of 3 seeds, no training. The
300 held-out digits themselves have a Fréchet distance of {floor:.2f} to the training digits. There is no
full-precision twin of this checkpoint here, so this says how the ternary model behaves, not that it is more or less
robust.

{table}"""

PAGE = """# Is ternary worth it? In small

Asked: how far is a ternary model behind full precision, does the gap shrink with size, and what else could the same
bytes or the same training compute buy?

The paper (https://arxiv.org/abs/2405.14854) says that larger ternary models come closer to full precision: with
guidance, FID 4.34 for TerDiT-600M, 2.42 for TerDiT-4.2B, against 2.27 for DiT-XL/2 and 2.10 for Large-DiT-4.2B (its
ImageNet 256x256 table), in a checkpoint 14 times smaller. It does not compare at equal bytes or equal training
compute, and its reviewers asked why three levels, when two bits store four.

{made}

```bash
OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --list   # parts, minutes each; a rerun goes on
OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --part sizes
OMP_NUM_THREADS=1 python examples/experiments/worth_it.py --render docs/results  # this page
```

![Noise error by bytes; arms at width 64; guidance](worth_it.png)

Dots: seeds. Lines: their mean, lowest and highest.

## Arms

Three layers; widths 32, 64 and 128. *ternary*: TerDiT as this package trains it (RMSNorm in adaLN, `small_gain`).
*full precision*: no ternary layer, DiT's adaLN (no norm). *file*: the safetensors file,
ternary weights packed, everything else bfloat16, scales float32, header included. *TFLOP*: matrix products of
training, forward and backward, counted; the same for ternary and full precision of a size. *CPU s*: processor time
of the training steps, data and measuring left out; a ternary step pays for ternarizing, which weighs more in small
models. *equal bytes*: a full-precision model of width 32 with a narrower feed-forward, so that its bfloat16 file is
as large as the packed ternary one of width 64. *equal compute*: the same model for {factor} times the steps, as many
TFLOP as the ternary one. *four levels*: the same two bits for -1.5, -0.5, 0.5, 1.5 times a learned scale, rounded at
multiples of the mean of |W|; same file size. *blended*: weights go linearly from full precision to ternary.

{method}

## What held

The first is the paper's claim, the others are questions that it leaves open.

{claims}

{sections}

{sampling}

## What this does not show

- Models of 70 thousand to 1 million weights on 8x8 pixels and {steps} steps: nothing about 600M or 4.2B, where the
  paper's own numbers stand. The gap at the end of a long run may differ from the gap at {steps} steps, because all
  models here still improve.
- Three sizes a factor of two apart in width say whether the gap moves here, not where it goes.
- At these sizes embeddings and final layer, never ternary, are two fifths to half of the packed file; the paper's
  models are nearly all ternary. That favours full precision in "equal bytes".
- Equal compute counts training. Where inference decides, the small full-precision model also takes {factor} times
  fewer operations per image.
- A start in full precision was tried with one learning rate for both phases and a fresh optimizer at the switch;
  fine-tuning after a full-length full-precision run costs more steps and was not tried.
- Not run: orders of average and ternarization; distillation.
"""


def render(folder: Path, plot: bool = False) -> str:
    """The page of the records in a folder; with `plot`, the picture beside it."""
    records = Records(folder / "worth_it.jsonl")
    found = {name: run_arm(records, arm, find_only=True) for name, arm in ALL_ARMS.items()}
    found = {name: outcome for name, outcome in found.items() if outcome and records.find(cost_run(ALL_ARMS[name]))}
    if plot:
        draw(records, found, folder / "worth_it.png")
    return PAGE.format(
        made=made_on(records),
        method=METHOD,
        factor=COMPUTE_FACTOR,
        steps=SIZES["64"].steps,
        claims=table(["claim", "here"], claim_rows(found)),
        sections="\n\n".join(section(records, found, title) for title in TABLES),
        sampling=sampling_section(records),
    )


if __name__ == "__main__":
    main(__doc__, "worth_it", PARTS, render)
