"""A text-to-image model of diffusers made ternary: before, without training, and after training on. In small.

    OMP_NUM_THREADS=1 python examples/experiments/text_to_image.py --part "seed 0"
    OMP_NUM_THREADS=1 python examples/experiments/text_to_image.py --render docs/results

Models go to outputs/results/text_to_image/, records to outputs/results/text_to_image.jsonl; what is there is not done
again, and a killed training goes on from its last checkpoint.
"""

import base64
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from common import Records, cell, classifier, judge, made_on, main, mean, overlap, table, values
from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from diffusers_terdit import TernaryConfig, losses, training
from diffusers_terdit.storage.saving import new_folder


sys.path.append(str(Path(__file__).parents[1]))
import train_text_to_image as script


SEEDS = (0, 1, 2)
EVAL_SEED = 7  # of captions to draw, and of noise and timesteps of the noise error
NUM_IMAGES = 400
NUM_INFERENCE_STEPS = 15
GUIDANCE_SCALE = 1.5
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
class Arm:
    """What a model is made of. `steps` 0: as its start was, ternarized."""

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
ARMS = {
    DENSE: Arm(DENSE_STEPS, 4e-3, ternary=False),
    UNTRAINED: Arm(0, start=DENSE),
    "ternarized, a scale per row": Arm(0, scale_granularity="row", start=DENSE),
    "ternarized, a scale per 32 inputs": Arm(0, scale_granularity=32, start=DENSE),
    FEW: Arm(FEW_STEPS, 2e-3, start=DENSE),
    FEW_DISTILLED: Arm(FEW_STEPS, 2e-3, start=DENSE, teacher=DENSE),
    TUNED: Arm(TUNE_STEPS, 2e-3, start=DENSE),
    DISTILLED: Arm(TUNE_STEPS, 2e-3, start=DENSE, teacher=DENSE),
    SCRATCH: Arm(TUNE_STEPS, 4e-3),
    LONG: Arm(DENSE_STEPS + TUNE_STEPS, 4e-3),
    CONTROL: Arm(TUNE_STEPS, 2e-3, ternary=False, start=DENSE),
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
    """Frechet distance to the training digits; shares of images that show digit, ink and slant of their caption.

    Ink and slant are judged by the captions' own rule, for the wanted digit.
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
    noisy = scheduler.add_noise(batch["samples"], batch["noise"], batch["time"])
    output = script.predict(pipe.transformer, noisy, batch["time"], text)
    return losses.mean_squared_error(output, batch["noise"]).mean().item()


def draw_images(pipe: PixArtAlphaPipeline, captions: list[str], seeds: range, flags: list[str]) -> Tensor:
    args = script.parse_args(["--demo", *flags])
    parts = [slice(start, start + 100) for start in range(0, len(captions), 100)]
    return torch.cat([script.sample_images(pipe, captions[part], list(seeds[part]), args) for part in parts])


SAMPLING = ["--num_inference_steps", str(NUM_INFERENCE_STEPS), "--guidance_scale", str(GUIDANCE_SCALE)]


def measure(pipe: PixArtAlphaPipeline, folder: Path, seed: int) -> dict:
    """All that the page says about a model; start noise is shared by the arms of a seed."""
    pipe.set_progress_bar_config(disable=True)
    captions = [digits(True).caption(i) for i in drawn()]
    images = draw_images(pipe, captions, range(10_000 * (seed + 1), 10_000 * (seed + 1) + len(captions)), SAMPLING)
    shown = draw_images(pipe, SHOWN, range(len(SHOWN)), SAMPLING)
    pixels = (shown * 255).round().byte().numpy().tobytes()
    return {
        **judged(images, drawn(), digits(True)),
        "noise_error_held_out": noise_error(pipe),
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "shown": base64.b64encode(pixels).decode(),
    }


# --- runs ---


def run_of(arm: Arm, seed: int) -> dict:
    """Everything that defines a result, as JSON."""
    run = asdict(arm) | {"seed": seed, "model": script.MODEL, "images": NUM_IMAGES, "sampling": SAMPLING}
    parents = {key: run_of(ARMS[run[key]], seed) for key in ("start", "teacher") if run[key]}
    return run | {"shown": SHOWN, **parents}


def model_folder(models: Path, name: str, seed: int) -> Path:
    """The pipeline folder of an arm, trained where it is not there."""
    arm, folder = ARMS[name], models / f"{name.replace(' ', '-').replace(',', '').strip('.-')}-{seed}"
    if (folder / "model_index.json").is_file():
        return folder
    flags = ["--demo", "--seed", str(seed), "--max_train_steps", str(arm.steps), "--output_dir", str(folder)]
    flags += ["--learning_rate", str(arm.learning_rate), "--resume_from_checkpoint", "latest"]
    flags += [
        "--lr_warmup_steps",
        str(min(50, arm.steps // 5)),
        "--checkpointing_steps",
        "250",
        "--checkpoints_total_limit",
        "1",
        *SAMPLING,
    ]
    flags += ["--ternary", "--scale_granularity", str(arm.scale_granularity)] if arm.ternary else []
    for flag, parent in (("--pretrained_model_name_or_path", arm.start), ("--teacher", arm.teacher)):
        flags += [flag, str(model_folder(models, parent, seed))] if parent else []
    if not arm.start:
        vae = models / "vae"
        if not vae.is_dir():
            torch.manual_seed(0)
            with new_folder(vae) as partial_folder:
                script.train_vae(digits(True).images).save_pretrained(partial_folder)
        flags += ["--pretrained_vae_model_name_or_path", str(vae)]
    script.main(flags)
    return folder


def result_of(models: Path, name: str, seed: int) -> dict:
    arm = ARMS[name]
    if arm.steps:
        folder = model_folder(models, name, seed)
        return measure(PixArtAlphaPipeline.from_pretrained(folder), folder / "transformer", seed)
    pipe = PixArtAlphaPipeline.from_pretrained(model_folder(models, arm.start, seed))
    with tempfile.TemporaryDirectory() as folder:
        TernaryConfig(scale_granularity=arm.scale_granularity).quantize(pipe.transformer).save_pretrained(folder)
        pipe.transformer = PixArtTransformer2DModel.from_pretrained(folder)
        return measure(pipe, Path(folder), seed)


REAL = {"real": "held-out digits, and training digits through the VAE"}


def real_result(models: Path) -> dict:
    """What no model can be better than: real digits, judged like samples."""
    vae = PixArtAlphaPipeline.from_pretrained(model_folder(models, DENSE, SEEDS[0])).vae
    with torch.no_grad():
        decoded = vae.decode(vae.encode(digits(True).images[drawn()]).latent_dist.mean).sample
    held_out = (digits(False).images + 1) / 2
    return {
        "held out": judged(held_out, list(range(len(held_out))), digits(False)),
        "through the VAE": judged((decoded / 2 + 0.5).clamp(0, 1), drawn(), digits(True)),
    }


def run_arms(names: list[str], seeds: tuple[int, ...], records: Records) -> None:
    models = records.path.with_suffix("")
    for seed in seeds:
        for name in names:
            records.get(run_of(ARMS[name], seed), partial(result_of, models, name, seed))
    records.get(REAL, partial(real_result, models))


MAIN = [name for name in ARMS if name not in (LONG, CONTROL)]
PARTS = {f"seed {seed}": partial(run_arms, MAIN, (seed,)) for seed in SEEDS}
PARTS["controls"] = partial(run_arms, [LONG, CONTROL], SEEDS)


# --- page ---


def found_in(records: Records) -> dict[str, dict]:
    """Arms with the seeds that have results."""
    found = {}
    for name, arm in ARMS.items():
        results = [records.find(run_of(arm, seed)) for seed in SEEDS]
        if any(results):
            found[name] = {"seeds": [result for result in results if result]}
    return found


def number(outcome: dict, key: str, digits: int, factor: float = 1.0) -> str:
    """Mean ± standard deviation of the seeds; the figure alone where there is one."""
    numbers = [factor * value for value in values(outcome, key)]
    return cell(numbers, digits) if len(numbers) > 1 else f"{numbers[0]:.{digits}f}"


def arm_row(name: str, outcome: dict) -> list[str]:
    arm = ARMS[name]
    steps = f"{DENSE_STEPS} + {arm.steps}" if arm.start else str(arm.steps)
    return [
        name,
        steps,
        f"{mean(values(outcome, 'file_bytes')) / 1000:.0f}",
        number(outcome, "frechet_distance", 2),
        *(number(outcome, key, 0, 100) for key in ("digit", "ink", "slant", "all three")),
        number(outcome, "noise_error_held_out", 3),
    ]


HEADER = ["model", "steps", "transformer, kB", "Fréchet distance", "digit, %", "ink, %", "slant, %", "all three, %"]


def real_rows(result: dict | None) -> list[list[str]]:
    rows = []
    for name, found in (result or {}).items():
        label = "training digits through the VAE" if name == "through the VAE" else "held-out digits"
        shares = [f"{100 * found[key]:.0f}" for key in ("digit", "ink", "slant", "all three")]
        rows.append([label, "", "", f"{found['frechet_distance']:.2f}", *shares, ""])
    return rows


QUESTIONS = [
    ("Ternarizing without training ruins the model", UNTRAINED, DENSE, 1),
    (f"{FEW_STEPS} steps of training on recover it", FEW, UNTRAINED, -1),
    ("... to full precision", FEW, DENSE, -1),
    ("Distillation helps them", FEW_DISTILLED, FEW, -1),
    (f"{TUNE_STEPS} steps are better than {FEW_STEPS}", TUNED, FEW, -1),
    ("Distillation helps them, too", DISTILLED, TUNED, -1),
    ("They are better than the full precision they began with", TUNED, DENSE, -1),
    ("... than full precision trained on for as long", TUNED, CONTROL, -1),
    ("Starting from full precision is better than from scratch, at equal ternary steps", TUNED, SCRATCH, -1),
    ("... at equal steps in all", TUNED, LONG, -1),
    ("Distilled is better than from scratch, at equal steps in all", DISTILLED, LONG, -1),
]


def answer(found: dict[str, dict], first: str, second: str, direction: int, key: str) -> str:
    """Whether the first model's figure, lower being better, is above (1) or below (-1) the second's."""
    if not {first, second} <= set(found):
        return "not run"
    a, b = values(found[first], key), values(found[second], key)
    change = f"{mean(a):.3g} against {mean(b):.3g}"
    if len(a) < 2 or len(b) < 2:
        return f"{change}; one seed"
    if overlap(a, b):
        return f"within the spread ({change})"
    return f"**{'yes' if (mean(a) - mean(b)) * direction > 0 else 'no, the opposite'}** ({change})"


def draw(found: dict[str, dict], path: Path) -> None:
    """One row per model, one column per caption, seed 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from common import save_figure

    names = [name for name in (DENSE, UNTRAINED, FEW, FEW_DISTILLED, TUNED, SCRATCH) if name in found]
    figure, axes = plt.subplots(len(names), len(SHOWN), figsize=(12, 1.25 * len(names) + 0.5), dpi=75, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        pixels = base64.b64decode(found[name]["seeds"][0]["shown"])
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(len(SHOWN), 8, 8).numpy()
        for axis, image, caption in zip(row, images, SHOWN, strict=True):
            axis.imshow(Image.fromarray(image), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            if name == names[0]:
                axis.set_title(caption.replace("a ", "", 1).replace(" slanted", "\nslanted"), fontsize=9)
        label = textwrap.fill(name.replace("... a little and distilled", "the same, distilled"), 16)
        row[0].set_ylabel(label, fontsize=8)
    figure.tight_layout(pad=0.4)
    save_figure(figure, path)
    plt.close(figure)


PAGE = """# A text-to-image model made ternary

Asked: what is left of a trained text-to-image model of diffusers when `TernaryConfig` makes its layers ternary, how
much of it comes back when it is trained on, and does its full-precision self help as a teacher?

{made}

```bash
OMP_NUM_THREADS=1 python examples/experiments/text_to_image.py --list   # a rerun goes on
OMP_NUM_THREADS=1 python examples/experiments/text_to_image.py --render docs/results  # this page
```

![Models below each other, ten captions beside each other](text_to_image.png)

*The same captions and start noise in every row, seed {seed}; 8x8 pixels, enlarged.*

{table}

Mean ± standard deviation of seeds {seeds}; a figure without ± is of seed {seed} alone.

| asked | Fréchet distance | noise error |
| --- | --- | --- |
{answers}

## What was done

The model is a `PixArtTransformer2DModel` of 968,452 weights (3 layers, width 128), trained by
[train_text_to_image.py](../../examples/train_text_to_image.py) on scikit-learn's 8x8 digits: 1,497 to train on, 300
held out. Captions come from the pictures: the digit's name, *bold* or *thin* for the highest or lowest third of ink in
its class, *slanted left* or *right* for the outer thirds of slant (second moments). That makes 90, such as "a thin
three slanted left". The text encoder is a `T5EncoderModel` with random weights that stay as they are, one token per
word: it gives every word its vectors, and the model's caption projection and cross-attention learn what they mean. The
VAE is an `AutoencoderKL` from 8x8 pixels to 4x4x4 latents, trained first, {vae_steps} steps, and shared by all (its
time is not in the CPU-minutes above).

1. *{dense}*: {dense_steps} steps of 64 digits, learning rate {dense_rate:g}.
2. *{untrained}*: `TernaryConfig(scale_granularity=...)` on the result. The 30 linear layers of the blocks, 786,432
   weights, four fifths of the model. No training.
3. *{tuned}*: `TernaryConfig(weight_format="float")` on the result of 1, {few_steps} (*a little*) or
   {tune_steps} steps, learning rate {tune_rate:g}, one scale per matrix. *distilled*: to the loss is added the squared
   difference to the noise that model 1 predicts.
4. *{scratch}*: ternary from the first step, learning rate {scratch_rate:g}; as long as 3, or as 1 and 3 together.
5. *{control}*: what 3 does, without ternary weights.

Captions dropped 0.1, AdamW without decay, gradients clipped at 2, 50 steps of warm-up (20 of {few_steps}), linear
decay over the last fifth, average of the weights with decay 0.99. What is measured is the saved folder: the average,
packed where it is ternary, other weights float32. Samples: {images} captions as they occur in training,
{inference_steps} steps of DPM-Solver++ through `PixArtAlphaPipeline`, guidance {guidance}. *Fréchet distance*: of the
64 features of the package's digits classifier to the training digits, lower is better; no FID. *digit*: the classifier
reads the caption's. *ink*, *slant*: the sample lies in the caption's third of its class; by chance a third would.
*noise error*: squared error of the predicted noise on the held-out digits, in latents, lower is better. Models whose
seeds' ranges overlap are called within the spread.

By hand:

```python
from diffusers import PixArtTransformer2DModel
from diffusers_terdit import TernaryConfig, quantization

model = PixArtTransformer2DModel(
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=32,
    cross_attention_dim=128,
    in_channels=4,
    out_channels=4,
    sample_size=4,
    patch_size=1,
    caption_channels=64,
    use_additional_conditions=False,
)
TernaryConfig(weight_format="float").quantize(model)  # train it; then
quantization.pack(model)
model.save_pretrained("pixart-packed")
```

## What this does not show

- One million weights, 8x8 pixels, 90 captions. Whether a published PixArt or FLUX recovers in so small a part of its
  training, nothing here says.
- Learning rates: 0.004 was the better of 0.002 and 0.004 for full precision after 200 steps on another seed; the
  others were not searched.
- New digits: the samples are nearer to the training digits than the held-out digits are, so the Fréchet distance pays
  for memory, too.
- Distillation by the predicted noise alone, at one weight; no features, no other teacher.
- A text encoder that understands: captions are a code of known words; all unknown words are one token.
"""


def render(folder: Path, plot: bool = False) -> str:
    """The page of the records in a folder; with `plot`, the picture beside it."""
    records = Records(folder / "text_to_image.jsonl")
    found = found_in(records)
    if not found:
        raise SystemExit(f"{records.path} has no results of these models; run the parts first.")
    if plot:
        draw(found, folder / "text_to_image.png")
    rows = [arm_row(name, outcome) for name, outcome in found.items()]
    most = max(len(outcome["seeds"]) for outcome in found.values())
    keys = ("frechet_distance", "noise_error_held_out")
    return PAGE.format(
        made=made_on(records),
        table=table([*HEADER, "noise error"], rows + real_rows(records.find(REAL))),
        seed=SEEDS[0],
        seeds=", ".join(str(seed) for seed in SEEDS[:most]),
        answers="\n".join(
            f"| {text} | {' | '.join(answer(found, first, second, direction, key) for key in keys)} |"
            for text, first, second, direction in QUESTIONS
        ),
        vae_steps=script.VAE_STEPS,
        dense=DENSE,
        untrained=UNTRAINED,
        tuned=TUNED,
        scratch=SCRATCH,
        control=CONTROL,
        dense_steps=DENSE_STEPS,
        tune_steps=TUNE_STEPS,
        few_steps=FEW_STEPS,
        dense_rate=ARMS[DENSE].learning_rate,
        tune_rate=ARMS[TUNED].learning_rate,
        scratch_rate=ARMS[SCRATCH].learning_rate,
        images=NUM_IMAGES,
        inference_steps=NUM_INFERENCE_STEPS,
        guidance=GUIDANCE_SCALE,
    )


if __name__ == "__main__":
    main(__doc__, "text_to_image", PARTS, render)
