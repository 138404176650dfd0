"""One checkpoint, the same labels and start noise, many samplers: few steps and step caches beside 250 steps.

    OMP_NUM_THREADS=1 python examples/few_steps.py --real_images faces   # emoji; `faces` is made by emoji_faces.py
    OMP_NUM_THREADS=1 python examples/few_steps.py --model digits
    OMP_NUM_THREADS=1 python examples/few_steps.py --model org/my-model --labels 207 360 387
    python examples/few_steps.py --render outputs/few_steps              # page and pictures again, from the records

`--output_dir` gets `few_steps.jsonl` (a run that is there is not done again), `few_steps.md`, and a picture per model:
samplers below each other, labels beside each other.
"""

import argparse
import base64
import contextlib
import io
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.training.data import ImageSamples
from evaluate import model_folder


sys.path.append(str(Path(__file__).parent / "experiments"))
from common import Records, cell, judge, made_on, table
from common import sample as sample_digits


REFERENCE_STEPS = 250
SEEDS = (0, 1, 2)  # of the digits' measures
DIGITS = 100  # images of each
UNSEEN_SEED = 7  # of calibration and timing
SHOWN = 10  # columns of the picture; caches are tried on these labels alone
COLOUR_COLUMNS = 6  # of the picture, in colour, to keep it below 150 kB

# Scheduler and what is changed in the pipeline's own configuration, by what the model predicts.
SAMPLERS: dict[str, dict[str, tuple[type, dict[str, Any]]]] = {
    "noise": {
        "DDPM": (DDPMScheduler, {}),
        "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing"}),
        "DPM-Solver++": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
        "UniPC": (UniPCMultistepScheduler, {"timestep_spacing": "trailing"}),
        "Heun": (HeunDiscreteScheduler, {}),
    },
    "velocity": {
        "Euler": (FlowMatchEulerDiscreteScheduler, {}),
        "DPM-Solver++": (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        "UniPC": (UniPCMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        "Heun": (FlowMatchHeunDiscreteScheduler, {}),
    },
}


@dataclass(frozen=True)
class Row:
    """A way to sample.

    Args:
        sampler (`str`): Key of `SAMPLERS`.
        steps (`int`): `num_inference_steps`.
        changes (`dict`): Of the scheduler's configuration, on top of those in `SAMPLERS`.
        cache (`str`, *optional*): Key of `CACHES`.
    """

    sampler: str
    steps: int
    changes: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.sampler} {self.steps}", *(f"{key} = {value}" for key, value in self.changes.items())]
        return ", ".join(parts) + (f" + {self.cache}" if self.cache else "")

    @property
    def adds_noise(self) -> bool:
        """Whether two runs from one start noise can differ."""
        return self.sampler == "DDPM" or "sde" in self.changes.get("algorithm_type", "")


def rows(*pairs: tuple[str, int]) -> list[Row]:
    return [Row(*pair) for pair in pairs]


# The first of each is what all others are measured against.
FEW = {
    "noise": rows(
        ("DDPM", REFERENCE_STEPS), ("DDPM", 50), ("DDPM", 25), ("DDIM", 50), ("DDIM", 25),
        ("DPM-Solver++", 25), ("DPM-Solver++", 20), ("DPM-Solver++", 10), ("UniPC", 20), ("UniPC", 10), ("Heun", 10),
    ),
    "velocity": rows(
        ("Euler", REFERENCE_STEPS), ("Euler", 50), ("Euler", 25), ("Euler", 10),
        ("DPM-Solver++", 25), ("DPM-Solver++", 20), ("DPM-Solver++", 10), ("UniPC", 20), ("UniPC", 10), ("Heun", 10),
    ),
}  # fmt: skip

# Near the solution of the differential equation that all samplers follow but those that add noise.
SOLUTION = {"noise": Row("DPM-Solver++", REFERENCE_STEPS), "velocity": Row("Euler", REFERENCE_STEPS)}

# Settings of DPM-Solver++ at 20 steps, one change at a time.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "noise": [
        {},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "leading"},
        {"use_karras_sigmas": True},
        {"use_lu_lambdas": True},
        {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True},
        {"solver_order": 1},
        {"solver_order": 3},
        {"algorithm_type": "sde-dpmsolver++"},
    ],
    "velocity": [
        {},
        {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True},
        {"solver_order": 1},
        {"solver_order": 3},
        {"flow_shift": 3.0},
    ],
}
SETTING_STEPS = 20

# --- step caches ---


class Clock:
    """What the caches want to know and the pipeline does not say: timestep, step, how many, and how much noise."""

    def __init__(self, pipe: TerDiTPipeline):
        self.pipe, self.step, self.timestep = pipe, -1, 0.0

    def tick(self, module, args) -> None:
        """A forward pre-hook of the transformer."""
        self.timestep = float(args[1].reshape(-1)[0])

    @property
    def noise_share(self) -> float:
        """Noise over noise plus signal, 0 to 1, of the step that begins: sigma as SeaCache means it."""
        scheduler = self.pipe.scheduler
        timestep = float(scheduler.timesteps[self.step])
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            return min(timestep / scheduler.config.num_train_timesteps, 1.0)
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        return (1 - signal) ** 0.5 / ((1 - signal) ** 0.5 + signal**0.5)


@contextlib.contextmanager
def step_information(pipe: TerDiTPipeline) -> Iterator[Clock]:
    """The pipeline with a [`Clock`], and `cache_context` called with the step, as SeaCache asks for."""
    clock, transformer = Clock(pipe), pipe.transformer
    plain = transformer.cache_context

    def with_step(name: str):
        clock.step = (clock.step + 1) % len(pipe.scheduler.timesteps)
        known = {"num_inference_steps": len(pipe.scheduler.timesteps), "sigma": clock.noise_share}
        return plain(name, step_index=clock.step, **known)

    handle = transformer.register_forward_pre_hook(clock.tick)
    transformer.cache_context = with_step
    try:
        yield clock
    finally:
        del transformer.cache_context
        handle.remove()


def raw_vision(module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Latents as SeaCache wants them: one (C, 1, h, w) per image."""
    return list(args[0].unsqueeze(2))


def mag_ratios(pipe: TerDiTPipeline, steps: int, call: dict[str, Any]) -> list[float]:
    """How the blocks' summed residual changes from step to step, as MagCache's calibration run prints it."""
    text = io.StringIO()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    try:
        with contextlib.redirect_stdout(text):
            pipe(**call, output_type="latent")
    finally:
        pipe.transformer.disable_cache()
    found = re.search(r"^\[[-\d., e]+\]$", text.getvalue(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"MagCache's calibration of {steps} steps printed no list of ratios. Update diffusers.")
    return json.loads(found.group())


TAYLORSEER = {"taylor_factors_dtype": torch.float32}
LATE = (-1, 800)  # timesteps

CACHES = {
    "FirstBlockCache 0.05": lambda clock, ratios: FirstBlockCacheConfig(threshold=0.05),
    "FirstBlockCache 0.2": lambda clock, ratios: FirstBlockCacheConfig(threshold=0.2),
    "MagCache": lambda clock, ratios: MagCacheConfig(mag_ratios=ratios, num_inference_steps=len(ratios)),
    "TaylorSeer, attention": lambda clock, ratios: TaylorSeerCacheConfig(**TAYLORSEER),
    "TaylorSeer, lite": lambda clock, ratios: TaylorSeerCacheConfig(use_lite_mode=True, **TAYLORSEER),
    "PyramidAttentionBroadcast": lambda clock, ratios: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=LATE,
        current_timestep_callback=lambda: clock.timestep,
    ),
    "FasterCache, attention": lambda clock, ratios: FasterCacheConfig(
        is_guidance_distilled=True,  # leaves the guided batch whole
        spatial_attention_timestep_skip_range=LATE,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: clock.timestep,
    ),
    "SeaCache": lambda clock, ratios: SeaCacheConfig(raw_vision_callback=raw_vision),
}
CACHE_STEPS = (REFERENCE_STEPS, 25)
CACHED_SAMPLER = {
    "noise": {REFERENCE_STEPS: "DDPM", 25: "DPM-Solver++"},
    "velocity": {REFERENCE_STEPS: "Euler", 25: "Euler"},
}


# --- runs ---


def predicts(pipe: TerDiTPipeline) -> str:
    """`"velocity"` of a flow, or `"noise"`."""
    return "velocity" if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) else "noise"


def set_scheduler(pipe: TerDiTPipeline, config: dict, kind: str, row: Row) -> None:
    scheduler, changes = SAMPLERS[kind][row.sampler]
    changes = {**changes, **row.changes}
    if changes.get("use_flow_sigmas") and "flow_shift" not in changes:
        changes["flow_shift"] = config["shift"]
    pipe.scheduler = scheduler.from_config(config, **changes)


@contextlib.contextmanager
def counted(pipe: TerDiTPipeline) -> Iterator[dict[str, int]]:
    """Counts forward passes of the network and, over all blocks, of attention and feed-forward that were computed."""
    counts = {"evaluations": 0, "attention": 0, "feed_forward": 0}

    def counter(key: str):
        def count(module, args) -> None:
            counts[key] += 1

        return count

    blocks = pipe.transformer.transformer_blocks
    parts = [(pipe.transformer.proj_in, "evaluations")]
    parts += [(block.attn.to_q, "attention") for block in blocks]
    parts += [(block.ff.down_proj, "feed_forward") for block in blocks]
    handles = [part.register_forward_pre_hook(counter(key)) for part, key in parts]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def computed(counts: dict[str, int], layers: int) -> dict[str, float]:
    """Evaluations, and the share of them in which a block's attention and feed-forward were computed."""
    evaluations = counts["evaluations"]
    shares = {key: counts[key] / (evaluations * layers) for key in ("attention", "feed_forward")}
    return {"evaluations": evaluations, **shares}


def root_mean_square(images: Tensor, others: Tensor) -> list[float]:
    """Of the difference of each pair, in shades of 0 to 255."""
    return (255 * (images - others).square().flatten(1).mean(1).sqrt()).tolist()


def nearest(images: Tensor, labels: list[int], real: Tensor) -> dict[str, float]:
    """Whether an image's nearest real one is its label's, and the distance to that one.

    Args:
        images (`torch.Tensor`): (N, C, h, w) in [0, 1].
        labels (`list[int]`): N class ids.
        real (`torch.Tensor`): (num_classes, C, h, w) in [0, 1], one per class.
    """
    distances = 255 * torch.cdist(images.flatten(1), real.flatten(1)) / real[0].numel() ** 0.5
    own = distances[range(len(labels)), labels]
    return {
        "nearest_is_own": (distances.argmin(1) == torch.tensor(labels)).float().mean().item(),
        "distance_to_own": own.median().item(),
    }


def shown(things: Sized) -> list[int]:
    """Which of them a picture shows: all, or `SHOWN` at even distances."""
    return torch.linspace(0, len(things) - 1, min(len(things), SHOWN)).round().int().tolist()


def strip(images: Tensor) -> str:
    """A row of images as PNG, base64."""
    pixels = (255 * images).round().to(torch.uint8).permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (h, N * w, C)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def real_images(folder: Path, pipe: TerDiTPipeline) -> Tensor:
    """(num_classes, C, h, w) in [0, 1]: one picture per class, the classes being the model's."""
    samples = ImageSamples.from_folder(folder, resolution=pipe.transformer.config.sample_size)
    names = {int(key): name for key, name in (pipe.config.id2label or {}).items()}
    if samples.id2label != names or sorted(samples.labels) != sorted(names):
        raise ValueError(f"{folder} must hold one picture of each of the model's {len(names)} classes and no others.")
    order = sorted(range(len(samples)), key=lambda index: samples.labels[index])
    return torch.stack([samples[index][0] for index in order]) / 2 + 0.5


@dataclass
class Study:
    """One model, and everything that is the same for all rows."""

    pipe: TerDiTPipeline
    model: str
    labels: list[int]
    guidance_scale: float
    real: Tensor | None = None

    def __post_init__(self):
        self.pipe.set_progress_bar_config(disable=True)
        self.config = dict(self.pipe.scheduler.config)
        self.kind = predicts(self.pipe)
        self.kept: dict[tuple, Tensor] = {}
        self.ratios: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def set(self, row: Row) -> Iterator[None]:
        """The pipeline with the row's scheduler and cache. MagCache is calibrated on four images, once per sampler."""
        set_scheduler(self.pipe, self.config, self.kind, row)
        if row.cache is None:
            yield
            return
        name = Row(row.sampler, row.steps, row.changes).name
        if row.cache == "MagCache" and name not in self.ratios:
            self.ratios[name] = mag_ratios(self.pipe, row.steps, self.call(self.labels[:4], row.steps, UNSEEN_SEED))
        with step_information(self.pipe) as clock:
            self.pipe.transformer.enable_cache(CACHES[row.cache](clock, self.ratios.get(name, [])))
            try:
                yield
            finally:
                self.pipe.transformer.disable_cache()

    def call(self, labels: list[int], steps: int, seed: int) -> dict[str, Any]:
        """Arguments of the pipeline; image i starts from its own noise, whatever the sampler."""
        generators = [torch.Generator().manual_seed(1000 * seed + index) for index in range(len(labels))]
        options = {"num_inference_steps": steps, "guidance_scale": self.guidance_scale}
        return {"class_labels": labels, "generator": generators, **options}

    def row_labels(self, row: Row) -> list[int]:
        """All labels, but for a cache only those that a picture shows."""
        return [self.labels[index] for index in shown(self.labels)] if row.cache else self.labels

    def images(self, row: Row, labels: list[int], seed: int = 0) -> tuple[Tensor, dict[str, float]]:
        """(N, C, h, w) in [0, 1], and what was computed."""
        with self.set(row), counted(self.pipe) as counts:
            images = self.pipe(**self.call(labels, row.steps, seed), output_type="pt").images
        return images, computed(counts, len(self.pipe.transformer.transformer_blocks))

    def plain(self, row: Row, labels: list[int]) -> Tensor:
        """Images of a row without its cache; computed once."""
        key = (Row(row.sampler, row.steps).name, *labels)
        if key not in self.kept:
            self.kept[key] = self.images(Row(row.sampler, row.steps), labels)[0]
        return self.kept[key]

    def look(self, row: Row) -> dict[str, Any]:
        """Pictures and measures of a row; a cache is compared with the same sampler without it."""
        labels = self.row_labels(row)
        images, result = self.images(row, labels)
        if row == SOLUTION[self.kind]:
            self.kept[(row.name, *labels)] = images
        if row.cache or not row.adds_noise:
            difference = root_mean_square(images, self.plain(row if row.cache else SOLUTION[self.kind], labels))
            result["difference"] = statistics.median(difference)
        if row in FEW[self.kind]:
            columns = shown(images)
            result["strip"] = strip(images[columns if images.shape[1] == 1 else columns[:COLOUR_COLUMNS]])
        if self.real is not None:
            result |= nearest(images, labels, self.real)
        if self.model == "digits" and not row.cache:
            result["seeds"] = [self.digits(row, seed) for seed in SEEDS]
        return result

    def digits(self, row: Row, seed: int) -> dict[str, float]:
        """Frechet distance and share recognised."""
        with self.set(row):
            return judge(sample_digits(self.pipe, DIGITS, row.steps, self.guidance_scale, seed))

    def seconds(self, row: Row, label: int) -> float:
        """Processor time of one image."""
        with self.set(row):
            started = time.process_time()
            self.pipe(**self.call([label], row.steps, UNSEEN_SEED))
            return time.process_time() - started

    def time(self, timed: list[Row], rounds: int) -> dict[str, list[float]]:
        """Seconds of each row in each round; a round runs all rows, every other one backwards, after a warm-up."""
        for row in timed[1:]:
            if row.steps != REFERENCE_STEPS:
                self.seconds(row, self.labels[0])
        found: dict[str, list[float]] = {row.name: [] for row in timed}
        for number in range(rounds):
            label = self.labels[number % len(self.labels)]
            for row in timed if number % 2 == 0 else reversed(timed):
                found[row.name].append(round(self.seconds(row, label), 4))
        return found


def cache_rows(kind: str) -> list[Row]:
    return [Row(CACHED_SAMPLER[kind][steps], steps, cache=cache) for steps in CACHE_STEPS for cache in CACHES]


def settings_rows(kind: str) -> list[Row]:
    return [Row("DPM-Solver++", SETTING_STEPS, changes) for changes in SETTINGS[kind]]


def definition(study: Study, row: Row) -> dict:
    shared = {"model": study.model, "guidance_scale": study.guidance_scale, "labels": study.row_labels(row)}
    shared["real_images"] = study.real is not None
    return json.loads(json.dumps({**shared, "kind": study.kind, "row": asdict(row)}))


def run_study(study: Study, records: Records, rounds: int) -> None:
    """Everything about one model that the records do not have."""
    few, caches, settings = FEW[study.kind], cache_rows(study.kind), settings_rows(study.kind)
    for row in [*few, *settings, *caches]:
        records.get(definition(study, row), lambda row=row: study.look(row))
    timed = [*few, *caches]
    run = {"timing": study.model, "kind": study.kind, "rounds": rounds, "rows": [row.name for row in timed]}
    records.get(run, lambda: study.time(timed, rounds))


# --- page ---


def models(records: Records) -> dict[str, str]:
    """What the models in the records predict, by name."""
    return {run["model"]: run["kind"] for run in (record["run"] for record in records.records) if "model" in run}


def looked_at(records: Records, model: str) -> dict[str, dict]:
    """Results by the row's name."""
    found = [record for record in records.records if record["run"].get("model") == model]
    return {Row(**record["run"]["row"]).name: record["result"] for record in found}


def ratios(records: Records, model: str, over: str) -> dict[str, list[float]]:
    """Time of each row over that of row `over`, round by round."""
    found = next((record["result"] for record in records.records if record["run"].get("timing") == model), {})
    return {name: [a / b for a, b in zip(times, found[over], strict=True)] for name, times in found.items()}


def ratio_cell(numbers: list[float] | None) -> str:
    if not numbers:
        return "not timed"
    middle = statistics.median(numbers)
    digits = 3 if middle < 0.2 else 2
    return f"{middle:.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def quality_header(result: dict) -> list[str]:
    header = ["Fréchet distance", "recognised, %"] if "seeds" in result else []
    return header + (["own picture nearest, %", "distance to it, shades"] if "nearest_is_own" in result else [])


def quality_cells(result: dict) -> list[str]:
    cells = []
    if "seeds" in result:
        cells.append(cell([seed["frechet_distance"] for seed in result["seeds"]], 2))
        cells.append(cell([100 * seed["recognised"] for seed in result["seeds"]], 1))
    if "nearest_is_own" in result:
        cells += [f"{100 * result['nearest_is_own']:.0f}", f"{result['distance_to_own']:.1f}"]
    return cells


def difference_cell(result: dict, digits: int = 1) -> str:
    return f"{result['difference']:.{digits}f}" if "difference" in result else "-"


def few_table(records: Records, model: str, kind: str) -> str:
    found, reference = looked_at(records, model), FEW[kind][0].name
    times = ratios(records, model, reference)
    lines = []
    for row in FEW[kind]:
        if result := found.get(row.name):
            cells = [row.name, str(result["evaluations"]), ratio_cell(times.get(row.name))]
            lines.append([*cells, *quality_cells(result), difference_cell(result)])
    header = ["sampler, steps", "network evaluations", f"time / {reference}"]
    return table([*header, *quality_header(found[reference]), f"from {SOLUTION[kind].name}, shades"], lines)


def settings_table(records: Records, model: str, kind: str) -> str:
    found = looked_at(records, model)
    lines = []
    for row in settings_rows(kind):
        if result := found.get(row.name):
            changed = ", ".join(f"`{key}={value!r}`" for key, value in row.changes.items()) or "as in the table above"
            lines.append([changed, *quality_cells(result), difference_cell(result)])
    if not lines:
        return "Not run."
    return table(["change", *quality_header(found[FEW[kind][0].name]), f"from {SOLUTION[kind].name}, shades"], lines)


def cache_table(records: Records, model: str, kind: str) -> str:
    found, lines = looked_at(records, model), []
    for row in cache_rows(kind):
        plain = Row(row.sampler, row.steps).name
        times = ratios(records, model, plain) if plain in ratios(records, model, FEW[kind][0].name) else {}
        if result := found.get(row.name):
            shares = [f"{100 * result[key]:.0f}" for key in ("attention", "feed_forward")]
            cells = [plain, row.cache, *shares, ratio_cell(times.get(row.name))]
            lines.append([*cells, difference_cell(result, 2)])
    if not lines:
        return "Not run."
    header = ["sampler, steps", "cache", "attention computed, %", "feed-forward computed, %", "time / no cache"]
    return table([*header, "from no cache, shades"], lines)


def draw(records: Records, model: str, kind: str, path: Path) -> None:
    """Strips of the samplers below each other, their name and time beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, times = looked_at(records, model), ratios(records, model, FEW[kind][0].name)
    names = [row.name for row in FEW[kind] if row.name in found]
    strips = [Image.open(io.BytesIO(base64.b64decode(found[name]["strip"]))) for name in names]
    mode = "L" if strips[0].mode == "L" else "RGB"
    height = 6.6 * strips[0].height / strips[0].width + 0.06
    figure, axes = plt.subplots(len(names), 1, figsize=(9, height * len(names)), dpi=100, squeeze=False)
    for axis, name, picture in zip(axes[:, 0], names, strips, strict=True):
        colours = {"cmap": "gray", "vmin": 0, "vmax": 255} if mode == "L" else {}
        axis.imshow(picture.convert(mode), interpolation="nearest", **colours)
        evaluations = f"{found[name]['evaluations']} evaluations"
        ratio = f"\ntime {statistics.median(times[name]):.3g}" if name in times else ""
        axis.text(-0.02, 0.5, f"{name}\n{evaluations}{ratio}", transform=axis.transAxes, ha="right", va="center")
        axis.axis("off")
    figure.subplots_adjust(left=0.25, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    with Image.open(buffer) as picture:  # one palette for all rows
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE, kmeans=2).save(path, optimize=True)
    plt.close(figure)


PAGE = """# Few steps and step caches: the figures

What they say, and what to use: [few steps](../few_steps.md). {made}

```bash
{commands}
python examples/few_steps.py --render docs/results  # this page
```

All rows of a model have the same labels, guidance scale ({guidance}) and start noise. *Network evaluations* are guided
ones, two rows of the batch per picture. *Time*: processor time of one picture over that of the other row in the same
round; median (lowest to highest) of {rounds} rounds. *From ..., shades*: root mean square over the pixels of a
picture, in shades of 0 to 255, from the picture that the row named in the head makes of the same noise; median of the
pictures. DDPM and SDE samplers add noise of their own, so they make other pictures and have no such figure.

*Fréchet distance*: of 64 features of the package's digits classifier, {digits} samples to the training digits, mean ±
standard deviation of {seeds} seeds. It is no FID, and it falls with the number of samples: compare within this page.
*Own picture nearest*: of all pictures of the training set, the one of the label is nearest; *distance to it*: root
mean square, median. Caches were compared on {shown} of the labels.

{sections}
"""

SECTION = """## {model}: predicts {kind}

{few}

![samplers below each other, labels beside each other]({picture})

### Settings of DPM-Solver++, {steps} steps

{settings}

### Step caches

{caches}"""


def page(records: Records, folder: Path, plot: bool = True) -> str:
    """The Markdown, from the records alone; with `plot` the pictures are written, too."""
    sections = []
    for model, kind in models(records).items():
        picture = folder / f"few_steps.{Path(model).name}.png"
        if plot:
            draw(records, model, kind, picture)
        sections.append(
            SECTION.format(
                model=Path(model).name,
                kind=kind,
                few=few_table(records, model, kind),
                picture=picture.name,
                steps=SETTING_STEPS,
                settings=settings_table(records, model, kind),
                caches=cache_table(records, model, kind),
            )
        )
    commands = []
    for model in models(records):
        runs = [record["run"] for record in records.records if record["run"].get("model") == model]
        compared = any(run["real_images"] for run in runs)
        command = f"OMP_NUM_THREADS=1 python examples/few_steps.py --model {shlex.quote(model)}"
        commands.append(command + (" --real_images faces" if compared else ""))
    guidance = {record["run"]["guidance_scale"] for record in records.records if "model" in record["run"]}
    rounds = {record["run"]["rounds"] for record in records.records if "timing" in record["run"]}
    return PAGE.format(
        made=made_on(records),
        commands="\n".join(commands),
        guidance=", ".join(f"{scale:g}" for scale in sorted(guidance)),
        rounds=" or ".join(map(str, sorted(rounds))) or "no",
        digits=DIGITS,
        seeds=len(SEEDS),
        shown=SHOWN,
        sections="\n\n".join(sections),
    )


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="folder or Hub id of a pipeline, or a bundled one's name")
    parser.add_argument("--labels", nargs="+", help="names or ids; default up to 26, evenly spaced")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--real_images", type=Path, help="class folders, one picture each, to compare with")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/few_steps"))
    parser.add_argument(
        "--render", type=Path, help="folder with records: write page and pictures there, sample nothing"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.render and not (args.render / "few_steps.jsonl").exists():
        parser.error(f"{args.render} has no few_steps.jsonl; sample first, with --output_dir {args.render}")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    folder = args.render or args.output_dir
    records = Records(folder / "few_steps.jsonl")
    if not args.render:
        pipe = TerDiTPipeline.from_pretrained(model_folder(args.model))
        classes = pipe.transformer.config.num_classes
        labels = [int(name) if name.isdecimal() else pipe.get_label_ids(name)[0] for name in args.labels or []]
        labels = labels or list(range(0, classes, -(-classes // 26)))
        real = real_images(args.real_images, pipe) if args.real_images else None
        run_study(Study(pipe, args.model, labels, args.guidance_scale, real), records, args.rounds)
    (folder / "few_steps.md").write_text(page(records, folder), encoding="utf-8")
    print(f"Wrote {folder / 'few_steps.md'}")


if __name__ == "__main__":
    main()
