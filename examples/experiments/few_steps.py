"""One checkpoint, the same labels and initial noise, many samplers: few steps and step caches against 250 steps.

    OMP_NUM_THREADS=1 python examples/experiments/few_steps.py --real_images faces   # of emoji_faces.py
    OMP_NUM_THREADS=1 python examples/experiments/few_steps.py --model digits
    OMP_NUM_THREADS=1 python examples/experiments/few_steps.py --model org/my-model --labels 207 360 387
    python examples/experiments/few_steps.py --render outputs/results    # page and pictures again, from the records

`--output_dir` gets `few_steps.jsonl` (a run that is there is not repeated), `few_steps.md`, and a picture per model
with a row per sampler and a column per label.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import re
import shlex
import statistics
import time
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass, field
from functools import partial
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
from PIL import Image, ImageChops
from torch import Tensor

from common import Records, cell, draw_pictures, judge, made_on, read_arguments, root_mean_square, write_page
from common import sample as sample_digits
from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import resolve_model
from diffusers_terdit.training.data import ImageSamples


REFERENCE_STEPS = 250
SEEDS = (0, 1, 2)  # the digits' measures
DIGITS = 100  # images of each
UNSEEN_SEED = 7  # calibration and timing
SHOWN = 10  # columns of the picture; caches are tried on these labels alone
COLOR_COLUMNS = 6  # columns of a picture in color, to keep it below 150 kB

# Scheduler, and changes of the pipeline's own configuration, by what the model predicts.
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
        changes (`dict`): Changes of the scheduler's configuration, on top of those in `SAMPLERS`.
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
    def plain(self) -> "Row":
        """The same sampler without changes and cache."""
        return Row(self.sampler, self.steps)

    @property
    def adds_noise(self) -> bool:
        """Whether two runs from one initial noise can differ."""
        return self.sampler == "DDPM" or "sde" in self.changes.get("algorithm_type", "")


def rows(*pairs: tuple[str, int]) -> list[Row]:
    return [Row(*pair) for pair in pairs]


# The first row is what all others are compared with.
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

# Near the solution of the differential equation that all samplers follow, except those that add noise.
SOLUTION = {"noise": Row("DPM-Solver++", REFERENCE_STEPS), "velocity": Row("Euler", REFERENCE_STEPS)}

# Rows of the figure: pictures of a sampler, or their difference from another's.
DRAWN: dict[str, list[tuple[str, str | None]]] = {
    "noise": [
        ("DDPM 250", None), ("DPM-Solver++ 25", None), ("DPM-Solver++ 10", None),
        ("DPM-Solver++ 10", "DPM-Solver++ 25"), ("Heun 10", None), ("Heun 10", "DPM-Solver++ 25"),
    ],
    "velocity": [
        ("Euler 250", None), ("Euler 10", None), ("Euler 10", "Euler 250"),
        ("Heun 10", None), ("Heun 10", "Euler 250"),
    ],
}  # fmt: skip
AMPLIFIED = 8

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


def noise_share(scheduler: Any, timestep: float) -> float:
    """Noise over noise plus signal, 0 to 1, at a timestep: sigma as SeaCache means it."""
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        return min(timestep / scheduler.config.num_train_timesteps, 1.0)
    signal = float(scheduler.alphas_cumprod[int(timestep)])
    return (1 - signal) ** 0.5 / ((1 - signal) ** 0.5 + signal**0.5)


@contextlib.contextmanager
def step_information(pipe: TerDiTPipeline) -> Iterator[None]:
    """Pass the step and its share of noise to `cache_context`, as SeaCache asks for."""
    plain, calls = pipe.transformer.cache_context, itertools.count()

    def with_step(name: str):
        steps = len(pipe.scheduler.timesteps)
        share = noise_share(pipe.scheduler, float(pipe.current_timestep))
        return plain(name, step_index=next(calls) % steps, num_inference_steps=steps, sigma=share)

    pipe.transformer.cache_context = with_step
    try:
        yield
    finally:
        del pipe.transformer.cache_context


def raw_vision(module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Latents as SeaCache wants them: one (C, 1, h, w) per image."""
    return list(args[0].unsqueeze(2))


def mag_ratios(pipe: TerDiTPipeline, steps: int, call: dict[str, Any]) -> list[float]:
    """Run MagCache's calibration, which prints how the blocks' summed residual changes from step to step."""
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
    "FirstBlockCache 0.05": lambda pipe, ratios: FirstBlockCacheConfig(threshold=0.05),
    "FirstBlockCache 0.2": lambda pipe, ratios: FirstBlockCacheConfig(threshold=0.2),
    "MagCache": lambda pipe, ratios: MagCacheConfig(mag_ratios=ratios, num_inference_steps=len(ratios)),
    "TaylorSeer, attention": lambda pipe, ratios: TaylorSeerCacheConfig(**TAYLORSEER),
    "TaylorSeer, lite": lambda pipe, ratios: TaylorSeerCacheConfig(use_lite_mode=True, **TAYLORSEER),
    "PyramidAttentionBroadcast": lambda pipe, ratios: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=LATE,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "FasterCache, attention": lambda pipe, ratios: FasterCacheConfig(
        is_guidance_distilled=True,  # leaves the guided batch whole
        spatial_attention_timestep_skip_range=LATE,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "SeaCache": lambda pipe, ratios: SeaCacheConfig(raw_vision_callback=raw_vision),
}
CACHE_STEPS = (REFERENCE_STEPS, 25)
CACHED_SAMPLER = {
    "noise": {REFERENCE_STEPS: "DDPM", 25: "DPM-Solver++"},
    "velocity": {REFERENCE_STEPS: "Euler", 25: "Euler"},
}


# --- runs ---


@contextlib.contextmanager
def counted(pipe: TerDiTPipeline) -> Iterator[dict[str, int]]:
    """Count forward passes of the network and, over all blocks, of attention and feed-forward that were computed."""
    counts = {"evaluations": 0, "attention": 0, "feed_forward": 0}

    def count(key: str, module, args) -> None:
        counts[key] += 1

    blocks = pipe.transformer.transformer_blocks
    parts = [(pipe.transformer.proj_in, "evaluations")]
    parts += [(block.attn.to_q, "attention") for block in blocks]
    parts += [(block.ff.down_proj, "feed_forward") for block in blocks]
    handles = [part.register_forward_pre_hook(partial(count, key)) for part, key in parts]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def nearest(images: Tensor, labels: list[int], real: Tensor) -> dict[str, float]:
    """Share of images whose nearest real one is its label's, and the median distance to that one.

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
    """Indices of those that a picture shows: all, or `SHOWN` at even distances."""
    return torch.linspace(0, len(things) - 1, min(len(things), SHOWN)).round().int().tolist()


def strip(images: Tensor) -> str:
    """Encode a row of images as PNG, base64."""
    pixels = (255 * images).round().to(torch.uint8).permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (h, N * w, C)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def real_images(folder: Path, pipe: TerDiTPipeline) -> Tensor:
    """Read one picture per class, the classes being the model's: (num_classes, C, h, w) in [0, 1]."""
    samples = ImageSamples.from_folder(folder, resolution=pipe.transformer.config.sample_size)
    names = {int(key): name for key, name in (pipe.config.id2label or {}).items()}
    if samples.id2label != names or sorted(samples.labels) != sorted(names):
        raise ValueError(f"{folder} must hold one picture of each of the model's {len(names)} classes and no others.")
    order = sorted(range(len(samples)), key=lambda index: samples.labels[index])
    return torch.stack([samples[index][0] for index in order]) / 2 + 0.5


@dataclass
class Study:
    """A model, and what is the same for all ways to sample it."""

    pipe: TerDiTPipeline
    model: str
    labels: list[int]
    guidance_scale: float
    real: Tensor | None = None

    def __post_init__(self):
        self.pipe.set_progress_bar_config(disable=True)
        self.config = dict(self.pipe.scheduler.config)
        self.kind = "velocity" if isinstance(self.pipe.scheduler, FlowMatchEulerDiscreteScheduler) else "noise"
        self.kept: dict[tuple, Tensor] = {}
        self.ratios: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def set(self, row: Row) -> Iterator[None]:
        """Set the row's scheduler and cache. MagCache is calibrated on four images, once per sampler."""
        scheduler, changes = SAMPLERS[self.kind][row.sampler]
        changes = {**changes, **row.changes}
        if changes.get("use_flow_sigmas"):
            changes = {"flow_shift": self.config["shift"], **changes}
        self.pipe.scheduler = scheduler.from_config(self.config, **changes)
        if row.cache is None:
            yield
            return
        name = row.plain.name
        if row.cache == "MagCache" and name not in self.ratios:
            self.ratios[name] = mag_ratios(self.pipe, row.steps, self.call(self.labels[:4], row.steps, UNSEEN_SEED))
        with step_information(self.pipe):
            self.pipe.transformer.enable_cache(CACHES[row.cache](self.pipe, self.ratios.get(name, [])))
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
        """All labels; for a cache only those that a picture shows."""
        return [self.labels[index] for index in shown(self.labels)] if row.cache else self.labels

    def images(self, row: Row, labels: list[int]) -> tuple[Tensor, dict[str, float]]:
        """Images (N, C, h, w) in [0, 1], evaluations, and the share of attention and feed-forward computed in them."""
        with self.set(row), counted(self.pipe) as counts:
            images = self.pipe(**self.call(labels, row.steps, 0), output_type="pt").images
        possible = counts["evaluations"] * len(self.pipe.transformer.transformer_blocks)
        return images, {key: count if key == "evaluations" else count / possible for key, count in counts.items()}

    def plain(self, row: Row, labels: list[int]) -> Tensor:
        """Images of a row without its cache; computed once."""
        key = (row.plain.name, *labels)
        if key not in self.kept:
            self.kept[key] = self.images(row.plain, labels)[0]
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
            result["strip"] = strip(images[columns if images.shape[1] == 1 else columns[:COLOR_COLUMNS]])
        if self.real is not None:
            result |= nearest(images, labels, self.real)
        if self.model == "digits" and not row.cache:
            with self.set(row):
                draw = partial(sample_digits, self.pipe, DIGITS, row.steps, self.guidance_scale)
                result["seeds"] = [judge(draw(seed)) for seed in SEEDS]
        return result

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
    """Run what the records do not have of one model."""
    few, caches, settings = FEW[study.kind], cache_rows(study.kind), settings_rows(study.kind)
    for row in [*few, *settings, *caches]:
        records.get(definition(study, row), lambda row=row: study.look(row))
    timed = [*few, *caches]
    run = {"timing": study.model, "kind": study.kind, "rounds": rounds, "rows": [row.name for row in timed]}
    records.get(run, lambda: study.time(timed, rounds))


# --- page ---


def ratio_cell(times: dict[str, list[float]], row: Row, over: Row) -> str:
    """Time of a row over that of another, round by round: median and range."""
    if not {row.name, over.name} <= times.keys():
        return "not timed"
    ratios = [a / b for a, b in zip(times[row.name], times[over.name], strict=True)]
    digits = 3 if statistics.median(ratios) < 0.2 else 2
    return f"{statistics.median(ratios):.{digits}f} ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"


def difference_cell(result: dict, digits: int = 1) -> str:
    return f"{result['difference']:.{digits}f}" if "difference" in result else "-"


def quality_cells(result: dict) -> list[str]:
    cells = []
    if "seeds" in result:
        cells.append(cell([seed["frechet_distance"] for seed in result["seeds"]], 2))
        cells.append(cell([100 * seed["recognised"] for seed in result["seeds"]], 1))
    if "nearest_is_own" in result:
        cells += [f"{100 * result['nearest_is_own']:.0f}", f"{result['distance_to_own']:.1f}"]
    return [*cells, difference_cell(result)]


def draw(few: list[tuple[Row, dict]], kind: str, path: Path) -> None:
    """Draw pictures of some samplers, and how far those of fewer steps are from those of more."""
    pictures = {}
    for row, result in few:
        strip = Image.open(io.BytesIO(base64.b64decode(result["strip"])))
        width = strip.height  # pictures are square
        pictures[row.name] = [strip.crop((x, 0, x + width, width)) for x in range(0, strip.width, width)]
    rows = {}
    for name, base in DRAWN[kind]:
        if not {name, base or name} <= set(pictures):
            continue  # a study that is not complete yet
        if base is None:
            rows[f"{name} steps"] = pictures[name]
        else:
            pairs = zip(pictures[name], pictures[base], strict=True)
            differences = [ImageChops.difference(picture, other) for picture, other in pairs]
            rows[f"{name.split()[0]}: difference\nfrom {base},\n{AMPLIFIED} times"] = [
                difference.point(lambda level: min(255, AMPLIFIED * level)) for difference in differences
            ]
    if rows:
        draw_pictures(rows, path, colors=256)


def section(records: Records, model: str, runs: list[dict], picture: Path | None) -> dict[str, Any]:
    """Parts of the page about one model; draws its picture, too."""
    kind = runs[0]["run"]["kind"]
    results = {Row(**record["run"]["row"]).name: record["result"] for record in runs}
    timing = next((record for record in records.records if record["run"].get("timing") == model), None)
    times = timing["result"] if timing else {}

    def found(rows: list[Row]) -> list[tuple[Row, dict]]:
        return [(row, results[row.name]) for row in rows if row.name in results]

    if picture is not None:
        draw(found(FEW[kind]), kind, picture)
    reference = FEW[kind][0]
    quality = ["Fréchet distance", "recognized, %"] if "seeds" in results[reference.name] else []
    quality += (
        ["own picture nearest, %", "distance to it, levels"] if "nearest_is_own" in results[reference.name] else []
    )
    return {
        "name": Path(model).name,
        "kind": kind,
        "reference": reference.name,
        "command": shlex.quote(model) + (" --real_images faces" if any(r["run"]["real_images"] for r in runs) else ""),
        "quality": [*quality, f"from {SOLUTION[kind].name}, levels"],
        "few": [
            [row.name, str(result["evaluations"]), ratio_cell(times, row, reference), *quality_cells(result)]
            for row, result in found(FEW[kind])
        ],
        "settings": [
            [
                ", ".join(f"`{key}={value!r}`" for key, value in row.changes.items()) or "as in the table above",
                *quality_cells(result),
            ]
            for row, result in found(settings_rows(kind))
        ],
        "caches": [
            [
                row.plain.name,
                row.cache,
                *(f"{100 * result[key]:.0f}" for key in ("attention", "feed_forward")),
                ratio_cell(times, row, row.plain),
                difference_cell(result, 2),
            ]
            for row, result in found(cache_rows(kind))
        ],
    }


def render(folder: Path, plot: bool = False) -> str:
    """Page of the records in a folder; with `plot`, write the pictures, too."""
    records = Records(folder / "few_steps.jsonl")
    models: dict[str, list[dict]] = {}
    for record in records.records:
        if "model" in record["run"]:
            models.setdefault(record["run"]["model"], []).append(record)
    scales = {record["run"]["guidance_scale"] for runs in models.values() for record in runs}
    rounds = {record["run"]["rounds"] for record in records.records if "timing" in record["run"]}
    pictures = {model: folder / f"few_steps.{Path(model).name}.png" if plot else None for model in models}
    return write_page(
        "few_steps",
        made=made_on(records),
        models=[section(records, model, runs, pictures[model]) for model, runs in models.items()],
        guidance=", ".join(f"{scale:g}" for scale in sorted(scales)),
        rounds=" or ".join(map(str, sorted(rounds))) or "no",
        digits=DIGITS,
        seeds=len(SEEDS),
        shown=SHOWN,
        steps=SETTING_STEPS,
    )


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="folder or Hub id of a pipeline, or a bundled one's name")
    parser.add_argument("--labels", nargs="+", help="names or ids; default up to 26, evenly spaced")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3, help="how often each row is timed, at least 1")
    parser.add_argument("--real_images", type=Path, help="class folders, one picture each, to compare with")
    return read_arguments("few_steps", parser, argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    folder = args.render or args.output_dir
    if not args.render:
        pipe = TerDiTPipeline.from_pretrained(resolve_model(args.model))
        classes = pipe.transformer.config.num_classes
        labels = [int(name) if name.isdecimal() else pipe.get_label_ids(name)[0] for name in args.labels or []]
        labels = labels or list(range(0, classes, -(-classes // 26)))
        real = real_images(args.real_images, pipe) if args.real_images else None
        study = Study(pipe, args.model, labels, args.guidance_scale, real)
        run_study(study, Records(folder / "few_steps.jsonl"), args.rounds)
    (folder / "few_steps.md").write_text(render(folder, plot=True), encoding="utf-8")
    print(f"Wrote {folder / 'few_steps.md'}")


if __name__ == "__main__":
    main()
