"""A text-to-image model of diffusers made ternary: before, without training, and after training on, at small scale.

    OMP_NUM_THREADS=1 python examples/experiments/text_to_image.py --part "seed 0"
    OMP_NUM_THREADS=1 python examples/experiments/text_to_image.py --render docs/results

Models go to outputs/results/text_to_image/, records to outputs/results/text_to_image.jsonl; what is there is not
repeated, and a killed training goes on from its last checkpoint.
"""

import base64
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from common import Records, cell, classifier, draw_pictures, judge, made_on, main, tie, values, write_page
from diffusers_terdit import TernaryConfig, losses, training
from diffusers_terdit.storage.saving import new_folder


sys.path.append(str(Path(__file__).parents[1]))
import train_text_to_image as script  # the program that this experiment runs


SEEDS = (0, 1, 2)
EVAL_SEED = 7  # captions to draw, noise and timesteps of the noise error
NUM_IMAGES = 400
SAMPLING = ["--num_inference_steps", "15", "--guidance_scale", "1.5"]
SHOWN = [
    "a bold zero",
    "a one slanted right",
    "a one slanted left",
    "a two",
    "a bold three slanted right",
    "a thin three",
    "a four",
    "a six slanted left",
    "a thin seven",
    "a bold eight",
]


@dataclass(frozen=True)
class Variant:
    """A model and how it is made. `steps` 0: as its start was, ternarized."""

    steps: int
    learning_rate: float = 0.0
    ternary: bool = True
    scale_granularity: str | int = "tensor"
    start: str | None = None
    teacher: str | None = None


DENSE_STEPS, TUNE_STEPS, FEW_STEPS = 1500, 500, 100
DENSE, UNTRAINED, TUNED, DISTILLED = "full precision", "ternarized", "ternarized, trained on", "... and distilled"
FEW, FEW_DISTILLED = "ternarized, trained on a little", "... a little and distilled"
SCRATCH = "ternary from scratch"
LONG, CONTROL = "ternary from scratch, all steps", "full precision, trained on"
VARIANTS = {
    DENSE: Variant(DENSE_STEPS, 4e-3, ternary=False),
    UNTRAINED: Variant(0, start=DENSE),
    "ternarized, a scale per row": Variant(0, scale_granularity="row", start=DENSE),
    "ternarized, a scale per 32 inputs": Variant(0, scale_granularity=32, start=DENSE),
    FEW: Variant(FEW_STEPS, 2e-3, start=DENSE),
    FEW_DISTILLED: Variant(FEW_STEPS, 2e-3, start=DENSE, teacher=DENSE),
    TUNED: Variant(TUNE_STEPS, 2e-3, start=DENSE),
    DISTILLED: Variant(TUNE_STEPS, 2e-3, start=DENSE, teacher=DENSE),
    SCRATCH: Variant(TUNE_STEPS, 4e-3),
    LONG: Variant(DENSE_STEPS + TUNE_STEPS, 4e-3),
    CONTROL: Variant(TUNE_STEPS, 2e-3, ternary=False, start=DENSE),
}


# --- measures ---


@cache
def digits(train: bool) -> script.CaptionedDigits:
    return script.CaptionedDigits(train)


@cache
def drawn() -> list[int]:
    """Training digits whose captions are drawn: as often as they occur there."""
    return training.random.sample_order(len(digits(True)), EVAL_SEED, 0)[:NUM_IMAGES].tolist()


def judged(images: Tensor, wanted: list[int], of: script.CaptionedDigits) -> dict[str, float]:
    """Frechet distance to the training digits; shares of images with the digit, ink and slant of their caption.

    The captions' own rule, for the wanted digit, decides about ink and slant.
    """
    meant = of.digits[wanted]
    right = {"digit": classifier()(images)["logits"].argmax(1) == meant}
    right |= {name: found == of.properties[name][wanted] for name, found in of.measure(images, meant).items()}
    right["all three"] = torch.stack(list(right.values())).all(0)
    return {
        "frechet_distance": judge(images)["frechet_distance"],
        **{name: share.float().mean().item() for name, share in right.items()},
    }


@torch.no_grad()
def noise_error(pipe: PixArtAlphaPipeline) -> float:
    """Mean squared error of the predicted noise on the held-out digits, two fixed draws of noise and timestep each."""
    held_out, scheduler = digits(False), DDPMScheduler.from_config(pipe.scheduler.config)
    examples = training.data.TrainingExamples(held_out, EVAL_SEED, (4, 4, 4), len(held_out.captions))
    rows = [examples.example(2 * i + draw, *held_out[i]) for i in range(len(held_out)) for draw in (0, 1)]
    batch = training.data.LatentCodec(pipe.vae).encode(default_collate(rows))
    text = script.encode(pipe, [held_out.caption(i // 2) for i in range(len(rows))], torch.device("cpu"))
    noisy, noise, when = losses.training_target(scheduler, batch["samples"], batch["noise"], batch["time"])
    return losses.mean_squared_error(script.predict(pipe.transformer, noisy, when, text), noise).mean().item()


def draw_images(pipe: PixArtAlphaPipeline, captions: list[str], seeds: range) -> Tensor:
    args = script.parse_args(["--demo", *SAMPLING])
    parts = [slice(start, start + 100) for start in range(0, len(captions), 100)]
    return torch.cat([script.sample_images(pipe, captions[part], list(seeds[part]), args) for part in parts])


def measure(pipe: PixArtAlphaPipeline, folder: Path, seed: int) -> dict:
    """Measure what the page shows of a model; the variants of a seed share their initial noise."""
    pipe.set_progress_bar_config(disable=True)
    captions = [digits(True).caption(i) for i in drawn()]
    images = draw_images(pipe, captions, range(10_000 * (seed + 1), 10_000 * (seed + 1) + len(captions)))
    pixels = (draw_images(pipe, SHOWN, range(len(SHOWN))) * 255).round().byte().numpy().tobytes()
    return {
        **judged(images, drawn(), digits(True)),
        "noise_error_held_out": noise_error(pipe),
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "shown": base64.b64encode(pixels).decode(),
    }


# --- runs ---


def run_of(variant: Variant, seed: int) -> dict:
    """All that defines a result, as JSON."""
    run = asdict(variant) | {"seed": seed, "model": script.MODEL, "images": NUM_IMAGES, "sampling": SAMPLING}
    parents = {key: run_of(VARIANTS[run[key]], seed) for key in ("start", "teacher") if run[key]}
    return run | {"shown": SHOWN, **parents}


def model_folder(models: Path, name: str, seed: int) -> Path:
    """Return the pipeline folder of a variant, trained where it is missing."""
    variant, folder = VARIANTS[name], models / f"{name.replace(' ', '-').replace(',', '').strip('.-')}-{seed}"
    if (folder / "model_index.json").is_file():
        return folder
    options = {
        "seed": seed,
        "max_train_steps": variant.steps,
        "output_dir": folder,
        "learning_rate": variant.learning_rate,
        "resume_from_checkpoint": "latest",
        "lr_warmup_steps": min(50, variant.steps // 5),
        "checkpointing_steps": 250,
        "checkpoints_total_limit": 1,
        "scale_granularity": variant.scale_granularity,
    }
    for flag, parent in (("pretrained_model_name_or_path", variant.start), ("teacher", variant.teacher)):
        if parent:
            options[flag] = model_folder(models, parent, seed)
    if not variant.start:
        options["pretrained_vae_model_name_or_path"] = vae = models / "vae"
        if not vae.is_dir():
            torch.manual_seed(0)
            trained = script.train_vae(digits(True).images)
            with new_folder(vae) as partial_folder:
                trained.save_pretrained(partial_folder)
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    script.main(["--demo", *flags, *SAMPLING, *(["--ternary"] if variant.ternary else [])])
    return folder


def result_of(models: Path, name: str, seed: int) -> dict:
    variant = VARIANTS[name]
    if variant.steps:
        folder = model_folder(models, name, seed)
        return measure(PixArtAlphaPipeline.from_pretrained(folder), folder / "transformer", seed)
    pipe = PixArtAlphaPipeline.from_pretrained(model_folder(models, variant.start, seed))
    with tempfile.TemporaryDirectory() as folder:
        config = TernaryConfig(scale_granularity=variant.scale_granularity)
        config.quantize(pipe.transformer).save_pretrained(folder)
        pipe.transformer = PixArtTransformer2DModel.from_pretrained(folder)
        return measure(pipe, Path(folder), seed)


REAL = {"real": "held-out digits, and training digits through the VAE"}


def real_result(models: Path) -> dict:
    """Judge real digits like samples: no model can be better."""
    vae = PixArtAlphaPipeline.from_pretrained(model_folder(models, DENSE, SEEDS[0])).vae
    with torch.no_grad():
        decoded = vae.decode(vae.encode(digits(True).images[drawn()]).latent_dist.mean).sample
    held_out = (digits(False).images + 1) / 2
    return {
        "held out": judged(held_out, list(range(len(held_out))), digits(False)),
        "through the VAE": judged((decoded / 2 + 0.5).clamp(0, 1), drawn(), digits(True)),
    }


def run_variants(names: list[str], seeds: tuple[int, ...], records: Records) -> None:
    models = records.path.with_suffix("")
    for seed in seeds:
        for name in names:
            records.get(run_of(VARIANTS[name], seed), partial(result_of, models, name, seed))
    records.get(REAL, partial(real_result, models))


MAIN = [name for name in VARIANTS if name not in (LONG, CONTROL)]
PARTS = {f"seed {seed}": partial(run_variants, MAIN, (seed,)) for seed in SEEDS}
PARTS["controls"] = partial(run_variants, [LONG, CONTROL], SEEDS)


# --- page ---


# Claim; two variants; whether the first one's figures should be above (1) or below (-1) the second's.
QUESTIONS = [
    ("Ternarizing without training ruins the model", UNTRAINED, DENSE, 1),
    (f"Another {FEW_STEPS} steps of training recover it", FEW, UNTRAINED, -1),
    ("... to full precision", FEW, DENSE, -1),
    (f"Distillation helps these {FEW_STEPS} steps", FEW_DISTILLED, FEW, -1),
    (f"{TUNE_STEPS} steps are better than {FEW_STEPS}", TUNED, FEW, -1),
    (f"Distillation helps these {TUNE_STEPS} steps", DISTILLED, TUNED, -1),
    (f"{TUNE_STEPS} steps are better than the full-precision model they started from", TUNED, DENSE, -1),
    ("... than full precision, trained on for as long", TUNED, CONTROL, -1),
    ("Starting from full precision is better than from scratch, at equal ternary steps", TUNED, SCRATCH, -1),
    ("... at equal total steps", TUNED, LONG, -1),
    ("Distilled is better than from scratch, at equal total steps", DISTILLED, LONG, -1),
]
SHARES = ("digit", "ink", "slant", "all three")


def number(outcome: dict, key: str, digits: int, factor: float = 1.0) -> str:
    """Mean ± standard deviation of the seeds; the figure alone where there is one."""
    numbers = [factor * value for value in values(outcome, key)]
    return cell(numbers, digits) if len(numbers) > 1 else f"{numbers[0]:.{digits}f}"


def variant_row(name: str, outcome: dict) -> list[str]:
    variant = VARIANTS[name]
    return [
        name,
        f"{DENSE_STEPS} + {variant.steps}" if variant.start else str(variant.steps),
        f"{mean(values(outcome, 'file_bytes')) / 1000:.0f}",
        number(outcome, "frechet_distance", 2),
        *(number(outcome, key, 0, 100) for key in SHARES),
        number(outcome, "noise_error_held_out", 3),
    ]


def real_row(name: str, found: dict) -> list[str]:
    label = "training digits through the VAE" if name == "through the VAE" else "held-out digits"
    return [label, "", "", f"{found['frechet_distance']:.2f}", *(f"{100 * found[key]:.0f}" for key in SHARES), ""]


def answer(found: dict[str, dict], first: str, second: str, direction: int, key: str) -> str:
    """Say whether the first model's figure is above or below the second's, as asked."""
    a, b = values(found[first], key), values(found[second], key)
    change = f"{mean(a):.3g} against {mean(b):.3g}"
    if len(a) < 2 or len(b) < 2:
        return f"{change}; one seed"
    if tie(a, b):
        return f"tie ({change})"
    return f"**{'yes' if (mean(a) - mean(b)) * direction > 0 else 'no'}** ({change})"


def draw(found: dict[str, dict], path: Path) -> None:
    """Plot one row per model and one column per caption, of seed 0."""
    rows = {}
    for name in (DENSE, UNTRAINED, FEW, FEW_DISTILLED, TUNED, SCRATCH):
        if name in found:
            pixels = base64.b64decode(found[name]["seeds"][0]["shown"])
            images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(len(SHOWN), 8, 8).numpy()
            label = textwrap.fill(name.replace("... a little and distilled", "the same, distilled"), 22)
            rows[label] = [Image.fromarray(image) for image in images]
    titles = [caption.replace("a ", "", 1).replace(" ", "\n") for caption in SHOWN]
    draw_pictures(rows, path, titles)


def render(folder: Path, plot: bool = False) -> str:
    """Page of the records in a folder; with `plot`, write the picture, too."""
    records = Records(folder / "text_to_image.jsonl")
    results = {name: [records.find(run_of(variant, seed)) for seed in SEEDS] for name, variant in VARIANTS.items()}
    found = {name: {"seeds": [result for result in of if result]} for name, of in results.items() if any(of)}
    if plot:
        draw(found, folder / "text_to_image.png")
    real = records.find(REAL) or {}
    return write_page(
        "text_to_image",
        made=made_on(records),
        rows=[variant_row(*item) for item in found.items()] + [real_row(*item) for item in real.items()],
        seeds=SEEDS[: max(len(outcome["seeds"]) for outcome in found.values())],
        answers=[
            [text, *(answer(found, *question, key) for key in ("frechet_distance", "noise_error_held_out"))]
            for text, *question in QUESTIONS
            if set(question[:2]) <= set(found)
        ],
        variants=VARIANTS,
        vae_steps=script.VAE_STEPS,
        images=NUM_IMAGES,
        inference_steps=SAMPLING[1],
        guidance=SAMPLING[3],
    )


if __name__ == "__main__":
    main(__doc__, "text_to_image", PARTS, render)
