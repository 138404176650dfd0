"""Shared by the experiments: sizes and variants of a model, its training, records that a rerun skips, pages.

The data are scikit-learn's 8x8 digits: 1,497 to train on, 300 held out. All variants with one seed see the same
samples, noise, timesteps and dropped labels. A run is one line of a JSONL file, stored with all that defines it.
"""

import argparse
import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev, variance

import torch
from diffusers import DDIMScheduler
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear, evaluation, losses, training
from diffusers_terdit.evaluation.digits import digits_classifier
from diffusers_terdit.evaluation.measured import machine, measured, now, stamp
from diffusers_terdit.pipelines.schedulers import training_scheduler


SEEDS = (0, 1, 2)
SCREEN_SEED = 100  # learning rates are compared on a seed that no result uses
EMA_DECAY = 0.98
EVAL_SEED = 7  # noise and timesteps of the noise error
EVAL_DRAWS = 4  # per sample
SAMPLES = "Fréchet distance"
MEASURES = {"noise_error_held_out": "noise error", "frechet_distance": SAMPLES}  # lower is better


@dataclass(frozen=True)
class Size:
    """Shape of the network, length of a run, and how often it is measured."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    every: int
    num_images: int  # for a Frechet distance
    sampling_steps: int


RATES = (2e-3, 4e-3, 8e-3)
SIZES = {
    "32": Size(3, 4, 8, 96, 600, 64, RATES, 100, 500, 25),
    "32, ffn 72": Size(3, 4, 8, 72, 600, 64, RATES, 100, 500, 25),  # bfloat16 file as large as the ternary one of 64
    "64": Size(3, 4, 16, 192, 600, 64, RATES, 100, 500, 25),
    "128": Size(3, 4, 32, 384, 600, 64, (1e-3, 2e-3, 4e-3), 300, 500, 25),
    "384": Size(2, 6, 64, 1024, 120, 32, (5e-4, 1e-3, 2e-3), 40, 250, 20),
}


@dataclass(frozen=True)
class Variant:
    """A model and its training, except for learning rate and seed.

    Args:
        size (`str`): Key of `SIZES`.
        weights (`str`): `"ternary"`, `"full"`, or `"four levels"`: two bits without a zero.
        initialization (`str`): `"small_gain"` or `"reference"`.
        adaln (`str`): `"norm"`: ternary, then RMSNorm (TerDiT); `"plain"`: without it; `"full"`: full precision,
            without it (DiT); `"bitnet"`: an RMSNorm before every ternary layer instead.
        scale (`str`): `"tensor"`, `"row"`, or `"absmean"`: not learned, the mean of |W| as in BitNet b1.58.
        full_share (`float`): Share of the steps that come first, in full precision.
        blend_share (`float`): Share of the ternary steps in which the weights become ternary by degrees.
        steps_factor (`float`): Factor on the steps of the size.
    """

    size: str
    weights: str = "ternary"
    initialization: str = "small_gain"
    adaln: str = "norm"
    scale: str = "tensor"
    full_share: float = 0.0
    blend_share: float = 0.0
    steps_factor: float = 1.0

    @property
    def steps(self) -> int:
        """Optimizer steps, all phases together."""
        return round(SIZES[self.size].steps * self.steps_factor)


# --- models ---


class FourLevelLinear(TernaryLinear):
    """Two bits without a zero: levels -1.5, -0.5, 0.5, 1.5 times the mean of |W|, and a learned scale per matrix."""

    def levels(self) -> Tensor:
        step = self.weight.abs().mean().clamp(min=1e-6)
        return (self.weight / step).floor().clamp(-2, 1) + 0.5

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():  # a uniform weight takes the four levels equally often: mean square 1.25
            self.weight_scale.fill_(1 / math.sqrt(1.25 * self.in_features))

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight + (self.levels() - self.weight).detach()
        output = nn.functional.linear(hidden_states, weight) * self.weight_scale
        return output if self.bias is None else output + self.bias

    def dequantize(self) -> Tensor:
        return (self.levels() * self.weight_scale).detach()


class AbsmeanLinear(TernaryLinear):
    """Ternary with the scale of BitNet b1.58: the mean of |W|, not a parameter."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight_scale.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight + (self.dequantize() - self.weight).detach()
        return nn.functional.linear(hidden_states, weight, self.bias)

    def dequantize(self) -> Tensor:
        return self.ternary_weight() * self.weight.detach().abs().mean()


def replace_ternary(model: nn.Module, replacement: Callable[[TernaryLinear], nn.Module]) -> None:
    """Replace every ternary layer by `replacement(layer)`."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, TernaryLinear)]:
        model.set_submodule(name, replacement(layer))


def like(layer: TernaryLinear, cls: type[TernaryLinear]) -> TernaryLinear:
    """Make a layer of another class with the same weight and bias, and its own scale."""
    new = cls(layer.in_features, layer.out_features, layer.bias is not None)
    weights = {name: value for name, value in layer.state_dict().items() if name != "weight_scale"}
    new.load_state_dict(weights, strict=False)
    return new


def dense(layer: TernaryLinear) -> nn.Linear:
    """Write a layer's quantized weight out in an ordinary layer."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.dequantize())
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


def model_config(size: str) -> dict:
    shape = {k: v for k, v in asdict(SIZES[size]).items() if k.startswith(("num_layers", "num_att", "att", "ffn"))}
    return {**shape, "sample_size": 8, "in_channels": 1, "num_classes": 10, "pos_embed_type": "rope+sincos2d"}


def build(variant: Variant, seed: int) -> TerDiTTransformer2DModel:
    """Make a fresh model; all variants of one size, initialization and seed have the same float weights."""
    torch.manual_seed(seed)
    model = TerDiTTransformer2DModel(
        **model_config(variant.size),
        ternary=variant.weights != "full",
        adaln_norm=variant.adaln == "norm",
        scale_granularity="row" if variant.scale == "row" else "tensor",
        initialization=variant.initialization,
    )
    if variant.adaln == "full" and variant.weights != "full":
        for block in model.transformer_blocks:
            ternary = block.adaln.linear
            block.adaln.linear = nn.Linear(ternary.in_features, ternary.out_features)
            nn.init.zeros_(block.adaln.linear.weight)
            nn.init.zeros_(block.adaln.linear.bias)
    if variant.adaln == "bitnet":
        replace_ternary(model, lambda layer: nn.Sequential(nn.RMSNorm(layer.in_features, eps=1e-5), layer))
    if variant.weights == "four levels":
        replace_ternary(model, lambda layer: like(layer, FourLevelLinear))
    if variant.scale == "absmean":
        replace_ternary(model, lambda layer: like(layer, AbsmeanLinear))
    return model.train()


@torch.no_grad()
def exported(model: TerDiTTransformer2DModel) -> TerDiTTransformer2DModel:
    """Write out densely what would be published: ternary weights as they are, the others rounded to bfloat16."""
    model = copy.deepcopy(model).eval()
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, TernaryLinear) or name.endswith("bias"):
            parameter.copy_(parameter.bfloat16())
    replace_ternary(model, dense)
    return model


def file_bytes(variant: Variant) -> int:
    """Bytes of the packed weights file of a variant whose layout the package can save, other weights bfloat16."""
    weights = "full" if variant.weights == "full" else "ternary"
    model = build(Variant(variant.size, weights, adaln=variant.adaln, scale=variant.scale), 0)
    if weights == "ternary":
        model.pack()
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@cache
def training_flops(size: str) -> int:
    """Floating-point operations of the matrix products of one image, forward and backward, in every precision."""
    model = TerDiTTransformer2DModel(**model_config(size), ternary=False)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 1, 8, 8), torch.tensor([1]), torch.tensor([1]), return_dict=False)[0].sum().backward()
    return counter.get_total_flops()


# --- measures ---


@cache
def digits(train: bool) -> training.data.Digits:
    return training.data.Digits(train=train)


@cache
def classifier() -> nn.Module:
    return digits_classifier()


@cache
def real_features(train: bool = True) -> Tensor:
    return classifier()((digits(train).images + 1) / 2)["features"]


def fixed_examples(examples: training.data.TrainingExamples, count: int) -> dict[str, Tensor]:
    """First samples with their labels, each with `EVAL_DRAWS` draws of noise and time, the same for every model."""
    batch = []
    for index in range(count):
        sample, label = examples.samples[index]
        positions = range(EVAL_DRAWS * index, EVAL_DRAWS * (index + 1))
        batch += [{**examples.example(p, sample, label), "class_labels": label} for p in positions]
    return default_collate(batch)


@cache
def fixed_noise(train: bool, count: int) -> dict[str, Tensor]:
    """`fixed_examples` of the digits."""
    samples = digits(train)
    return fixed_examples(training.data.TrainingExamples(samples, EVAL_SEED, (1, 8, 8), len(samples.id2label)), count)


@torch.no_grad()
def noise_error(model: TerDiTTransformer2DModel, train: bool, count: int = 300) -> float:
    """Mean squared error of the predicted noise, at fixed noise and timesteps."""
    batch, scheduler, errors = fixed_noise(train, count), training_scheduler(), []
    for rows in torch.arange(len(batch["time"])).split(300):
        clean, noise, when, labels = (batch[key][rows] for key in ("samples", "noise", "time", "class_labels"))
        noisy, noise, when = losses.training_target(scheduler, clean, noise, when)
        output = model(noisy, when, labels, return_dict=False)[0]
        errors.append(losses.mean_squared_error(output[:, :1], noise))
    return torch.cat(errors).mean().item()


def sample(pipe: TerDiTPipeline, count: int, steps: int, guidance_scale: float = 1.0, seed: int = 0) -> Tensor:
    """Draw images (count, 1, 8, 8) in [0, 1] of all labels in turn."""
    pipe.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(seed), []
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    for start in range(0, count, 250):
        labels = [i % 10 for i in range(start, min(start + 250, count))]
        images.append(pipe(labels, generator=generator, **options).images)
    return torch.cat(images)


def root_mean_square(images: Tensor, others: Tensor) -> list[float]:
    """Root mean square of the difference of each pair, in levels of 0 to 255."""
    return (255 * (images - others).square().flatten(1).mean(1).sqrt()).tolist()


def judge(images: Tensor) -> dict[str, float]:
    """Frechet distance of features to the training digits, and the share recognized as their label."""
    if not images.isfinite().all():
        return {"frechet_distance": math.inf, "recognised": 0.0}
    output = classifier()(images)
    labels = torch.arange(len(images)) % 10
    return {
        "frechet_distance": evaluation.frechet_distance(output["features"], real_features()),
        "recognised": (output["logits"].argmax(1) == labels).float().mean().item(),
    }


def sampled_quality(model: TerDiTTransformer2DModel, size: Size) -> dict[str, float]:
    """`judge` samples of a dense model, drawn by DDIM without guidance."""
    scheduler = DDIMScheduler.from_config(training_scheduler().config)
    pipe = TerDiTPipeline(transformer=model, scheduler=scheduler)
    return judge(sample(pipe, size.num_images, size.sampling_steps))


# --- training ---


def start(model: nn.Module, learning_rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Average and optimizer of a model."""
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    return ema, torch.optim.AdamW(training.recipes.parameter_groups(model), lr=learning_rate)


def train(variant: Variant, learning_rate: float, seed: int, curve: bool) -> dict:
    """Train one model. With `curve`, measure it every `Size.every` steps, else only at the end, without sampling.

    Returns:
        `dict`: `curve` (list of step, loss, noise error on held-out digits, Frechet distance), final
        `noise_error` and `noise_error_held_out`, the largest gradient norm, CPU seconds of the training steps.
    """
    size, steps = SIZES[variant.size], variant.steps
    full_steps = round(variant.full_share * steps)
    examples = training.data.TrainingExamples(digits(True), seed, (1, 8, 8), 10, class_dropout_prob=0.1)
    scheduler = training_scheduler()
    warmup, decay = steps // 20, steps // 5
    points, window, seconds, max_norm = [], [], 0.0, 0.0
    full = Variant(variant.size, "full", variant.initialization, variant.adaln)
    model = build(full if full_steps else variant, seed)
    ema_model, optimizer = start(model, learning_rate)
    set_strength, phase_start = None, 0
    for step in range(steps):
        if full_steps and step == full_steps:
            model = build(variant, seed)
            training.initialize.transfer_weights(ema_model, model)
            ema_model, optimizer = start(model, learning_rate)
            phase_start = step
            set_strength = training.initialize.gradual_ternarization(model) if variant.blend_share else None
        if set_strength is not None:
            set_strength(min((step - phase_start) / (variant.blend_share * (steps - full_steps)), 1.0))
        batch = default_collate([examples[i] for i in range(step * size.batch_size, (step + 1) * size.batch_size)])
        started = time.process_time()
        factor = training.recipes.learning_rate_factor(step, "wsd", steps, warmup, decay)
        if phase_start:
            factor = min(factor, (step - phase_start + 1) / (warmup + 1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        clean = batch["samples"]
        noisy, noise, timesteps = losses.training_target(scheduler, clean, batch["noise"], batch["time"])
        output = model(noisy, timesteps, batch["class_labels"], return_dict=False)[0]
        loss = losses.diffusion_loss(output, clean, noise, timesteps, scheduler.alphas_cumprod).mean()
        loss.backward()
        norm = float(training.recipes.clip_grad_norm(model, 2.0))
        if not math.isfinite(norm):
            return {"diverged_at": step, "noise_error": math.inf, "noise_error_held_out": math.inf, "curve": points}
        optimizer.step()
        optimizer.zero_grad()
        training.recipes.update_average(
            ema_model, model, training.recipes.average_decay(step - phase_start, EMA_DECAY)
        )
        seconds += time.process_time() - started
        max_norm = max(max_norm, norm)
        window.append(loss.item())
        if curve and (step + 1) % size.every == 0:
            out = exported(ema_model)
            point = {"step": step + 1, "loss": mean(window), "noise_error_held_out": noise_error(out, train=False)}
            points.append({**point, **sampled_quality(out, size)})
            window = []
    out = exported(ema_model)
    result = {
        "noise_error": noise_error(out, train=True),
        "noise_error_held_out": noise_error(out, train=False),
        "max_grad_norm": max_norm,
        "cpu_seconds": round(seconds, 1),
    }
    if curve:
        last = points[-1] if points and points[-1]["step"] == steps else sampled_quality(out, size)
        result |= {"curve": points, **{key: last[key] for key in ("frechet_distance", "recognised")}}
    return result


# --- records ---


class Records:
    """An append-only JSONL file; each line has `run`, all that defines a run, and `result`.

    Args:
        path (`Path`): Written to. A run that a file next to it has is copied, not repeated.
    """

    def __init__(self, path: Path):
        self.path, self.records = path, self.read(path)
        others = (other for other in sorted(path.parent.glob("*.jsonl")) if other != path)
        self.others = [record for other in others for record in self.read(other)]

    @staticmethod
    def read(path: Path) -> list[dict]:
        """Read all whole lines; a killed run may have torn the last one."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"{path}, line {number} is not JSON. Remove it to repeat its run.") from None
        return records

    def find(self, run: dict) -> dict | None:
        """Return the result of a run, or `None`."""
        return next((record["result"] for record in self.records if record.get("run") == run), None)

    def get(self, run: dict, make: Callable[[], dict]) -> dict:
        """Return the result of a run; make and write it where no file has it."""
        result = self.find(run)
        if result is not None:
            return result
        record = next((record for record in self.others if record.get("run") == run), None)
        if record is None:
            started = time.process_time()
            result = make()
            total = round(time.process_time() - started, 1)
            print(f"{total:7.1f} s  {json.dumps(run)}", flush=True)
            record = {"run": run, "result": result, "total_cpu_seconds": total, "machine": machine(), **now()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if text and not text.endswith("\n"):  # torn by a kill
            self.path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        stamp(self.path)
        self.records.append(record)
        return record["result"]


def definition(variant: Variant, learning_rate: float, seed: int, curve: bool) -> dict:
    """All that defines a training run, as JSON; records call the variant an arm."""
    size = {**asdict(SIZES[variant.size]), "learning_rates": None}  # the other rates that were tried do not matter
    run = {"arm": asdict(variant), "size": size, "learning_rate": learning_rate, "seed": seed, "curve": curve}
    return json.loads(json.dumps({**run, "ema_decay": EMA_DECAY, "digits": 1}))


def run_variant(records: Records, variant: Variant, find_only: bool = False) -> dict | None:
    """Screen learning rates on one seed, then train three other seeds at the best.

    The best rate has the lowest noise error on held-out digits; where it is the lowest or highest of those tried,
    half or twice of it is tried, too, at most twice.

    Returns:
        `dict`: `learning_rate`, `screened` (noise error by rate) and `seeds` (results); `None` with `find_only` where
        the records do not have all of it.
    """

    def result(rate: float, seed: int, curve: bool) -> dict | None:
        run = definition(variant, rate, seed, curve)
        return records.find(run) if find_only else records.get(run, lambda: train(variant, rate, seed, curve))

    screened: dict[float, float] = {}
    rates, extensions = list(SIZES[variant.size].learning_rates), 0
    while True:
        for rate in rates:
            found = result(rate, SCREEN_SEED, False)
            if found is None:
                return None
            screened[rate] = found["noise_error_held_out"]
        best = min(screened, key=screened.get)
        if best not in (min(screened), max(screened)) or extensions == 2:
            break
        rates, extensions = [best / 2 if best == min(screened) else best * 2], extensions + 1
    seeds = [result(best, seed, True) for seed in SEEDS]
    if None in seeds:
        return None
    return {"learning_rate": best, "screened": dict(sorted(screened.items())), "seeds": seeds}


# --- pages ---


def values(outcome: dict, key: str) -> list[float]:
    return [result.get(key, math.inf) for result in outcome["seeds"]]


def cell(numbers: list[float], digits: int = 4) -> str:
    """Mean ± standard deviation of seeds."""
    if not all(map(math.isfinite, numbers)):
        return f"{sum(map(math.isfinite, numbers))} of {len(numbers)} seeds finite"
    return f"{mean(numbers):.{digits}f} ± {stdev(numbers):.{digits}f}"


def tie(first: list[float], second: list[float]) -> bool:
    """Whether the means of two variants' seeds differ by no more than chance does in 95 % of cases (Welch)."""
    t = {2: 4.30, 3: 3.18, 4: 2.78}[len(first) + len(second) - 2]  # Student's, by degrees of freedom
    error = math.sqrt(variance(first) / len(first) + variance(second) / len(second))
    return abs(mean(first) - mean(second)) <= t * error


def draws_noise(outcome: dict) -> bool:
    """Whether the classifier recognizes fewer than a quarter of a model's samples; by chance it is a tenth."""
    return mean(values(outcome, "recognised")) < 0.25


def verdict(first: list[float], second: list[float]) -> str:
    """Say how the first mean differs from the second, lower being better, or that it may be chance."""
    if not all(map(math.isfinite, first + second)):
        return "not every seed finite"
    change = mean(first) / mean(second) - 1
    if tie(first, second):
        return f"tie ({change:+.1%})"
    return f"**{'better' if change < 0 else 'worse'}** ({change:+.1%})"


def verdicts(found: dict[str, dict], first: str, second: str) -> dict[str, str]:
    """Return the verdict by measure; samples of noise have a Fréchet distance that says nothing."""
    pair = [found[first], found[second]]
    words = {name: verdict(*(values(outcome, key) for outcome in pair)) for key, name in MEASURES.items()}
    return {**words, SAMPLES: "none, noise is drawn"} if any(map(draws_noise, pair)) else words


def claim(found: dict[str, dict], first: str, second: str) -> str:
    """Say whether the first variant is better than the second, by both measures."""
    if not {first, second} <= set(found):
        return "not run"
    text = "; ".join(f"{name}: {words}" for name, words in verdicts(found, first, second).items())
    return text.replace("**better**", "**held**").replace("**worse**", "**refuted**")


def comparisons(found: dict[str, dict], pairs: list[tuple[str, str]]) -> str:
    """Table of verdicts; pairs that lack a variant are named below it."""
    rows = [
        [first, second, *verdicts(found, first, second).values()]
        for first, second in pairs
        if {first, second} <= set(found)
    ]
    missing = sorted({name for pair in pairs for name in pair} - set(found))
    text = table(["variant", "against", "held-out noise error", "Fréchet distance"], rows)
    return text + (f"\n\nNot run: {'; '.join(missing)}." if missing else "")


def rate_cell(outcome: dict) -> str:
    """Learning rate that was taken, and those that were tried."""
    return f"{outcome['learning_rate']:g} of " + ", ".join(f"{rate:g}" for rate in outcome["screened"])


def pyplot():
    """Return matplotlib's pyplot in the style of all figures."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    plt.style.use(Path(__file__).parents[1] / "figures.mplstyle")
    return plt


def draw_seeds(axis, x: list[float], seeds: list[list[float]], color: str, **style) -> None:
    """Plot a line through the mean of the seeds at each x, shaded from the lowest to the highest."""
    axis.plot(x, [mean(at) for at in seeds], marker="o", markersize=3, color=color, **style)
    axis.fill_between(x, [min(at) for at in seeds], [max(at) for at in seeds], color=color, alpha=0.12, linewidth=0)


def draw_variants(axis, variants: dict[str, list[float]], colors: dict[str, str]) -> None:
    """Plot the seeds of each variant as dots, their mean as a line and in figures, the lowest on top.

    `colors` has those of names by their beginnings; all others are gray.
    """
    names = sorted(variants, key=lambda name: mean(variants[name]), reverse=True)
    for row, name in enumerate(names):
        color = next((color for start, color in colors.items() if name.startswith(start)), "C1")
        axis.plot(variants[name], [row] * len(variants[name]), ".", color=color, alpha=0.6)
        axis.plot(mean(variants[name]), row, "|", markersize=16, color=color)
        axis.annotate(f"{mean(variants[name]):.4f}", (max(variants[name]), row), textcoords="offset points",
                      xytext=(7, -3), fontsize=8)  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=8)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.25 * (high - low))  # for the last number


def draw_pictures(
    rows: dict[str, list[Image.Image]], path: Path, titles: Sequence[str] = (), colors: int = 64
) -> None:
    """Draw a row of pictures per label, with the label at its left, and titles over the first row."""
    plt = pyplot()
    columns = max(map(len, rows.values()))
    side = 7 / columns  # inches; labels take two more
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(9, (side + 0.05) * len(rows) + 0.3), squeeze=False, layout="none"
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        row[0].text(-0.15, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=10)
        for axis, picture in zip(row, pictures, strict=False):
            axis.imshow(picture.convert("RGB"), interpolation="nearest")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    lines = 1 + max((title.count("\n") for title in titles), default=-1)
    top = 1 - (0.05 + 0.19 * lines) / figure.get_figheight()
    figure.subplots_adjust(left=0.22, right=0.995, top=top, bottom=0.01, hspace=0.06, wspace=0.06)
    save_figure(figure, path, colors)
    plt.close(figure)


def save_figure(figure, path: Path, colors: int = 64, **options) -> None:
    """Write a matplotlib figure as a small PNG with one palette."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(colors, dither=Image.Dither.NONE, **options).save(path, optimize=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_on(records: Records) -> str:
    """Where the records were made, and how much processor time they took."""
    machines = list(dict.fromkeys(record["machine"] for record in records.records))
    minutes = sum(record["total_cpu_seconds"] for record in records.records) / 60
    made = f"Made on {'; '.join(machines)}: {len(records.records)} records, {minutes:.0f} CPU-minutes."
    return f"{made}\n{measured(records.path)}".strip()


def write_page(name: str, **parts) -> str:
    """Fill in the template pages/NAME.md.j2."""
    loader = FileSystemLoader(Path(__file__).parent / "pages")
    pages = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return pages.get_template(f"{name}.md.j2").render(table=table, **parts)


def read_arguments(name: str, parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the options that every experiment has, besides those of the parser."""
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"), help="folder of records and page")
    parser.add_argument("--render", type=Path, help="folder with records: write the page again, run nothing")
    args = parser.parse_args(argv)
    if args.render and not (args.render / f"{name}.jsonl").exists():
        parser.error(f"{args.render} has no {name}.jsonl; run it first, with --output_dir {args.render}")
    return args


def main(
    description: str, name: str, parts: dict[str, Callable[[Records], None]], render: Callable[..., str], argv=None
) -> None:
    """Run the parts of an experiment and write its page and plot, or list the parts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(parts), action="append", help="default: all, in the order of --list")
    parser.add_argument("--list", action="store_true", help="print the parts")
    args = read_arguments(name, parser, argv)
    if args.list:
        print("\n".join(parts))
        return
    folder = args.render or args.output_dir
    records = Records(folder / f"{name}.jsonl")
    for part in [] if args.render else args.part or parts:
        parts[part](records)
    (folder / f"{name}.md").write_text(render(folder, plot=True), encoding="utf-8")
