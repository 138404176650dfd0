"""Which recipe trains a small ternary model best: one setting changed at a time, on Fashion-MNIST.

    python examples/experiments/fashion.py --data_dir /usr/share/datasets/fashion-mnist
    OMP_NUM_THREADS=1 python examples/experiments/recipe.py --data_dir /usr/share/datasets/fashion-mnist --part screen
    OMP_NUM_THREADS=1 python examples/experiments/recipe.py --render docs/results

An arm is a set of flags of `terdit train`, and it is trained by that program. Runs go on from their last checkpoint in
--runs_dir; records go to outputs/results/recipe.jsonl, and a run that is there is not repeated.
"""

import argparse
import json
import math
import sys
import time
from functools import cache
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import fashion
from common import EVAL_SEED, Records, cell, fixed_examples, made_on, read_arguments, write_page
from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, losses, training
from diffusers_terdit.pipelines.schedulers import scheduler_by_name


sys.path.append(str(Path(__file__).parents[1]))
import train_terdit as script  # the program that this experiment runs


NAME = "recipe"
SEEDS, RATE_SEED = (0, 1, 2), 100
STEPS, LONG_STEPS, RATE_STEPS = 2000, 6000, 1000
EQUAL_COMPUTE = 11_600  # steps of width 48 that take as many multiplications as STEPS of width 128
CEILINGS = {True: 0.9231, False: 0.9221}  # what the judges recognize of the test images: made with AVX-512, without
ANSWER = """\
**In short:** Muon trains a small ternary model better than AdamW: after 2,000 steps, the Fréchet
distance of its pictures to real ones is 5.1 instead of 6.1 (lower is better; three seeds each,
spread .2). After 6,000 steps, a ternary model that learns from a full-precision one of its size has
1.030 times the teacher's loss (1.026 to 1.035, three seeds) and the same distance, 3.0. **At equal
bytes and equal training compute, a smaller full-precision model is better**: 3.1 against 5.1
(three seeds).

After equal steps, ternary and the smaller model tie: 5.1 and 5.5. Ternary with a teacher is as good
as the teacher rounded to int4, at 56 % of the bytes, and better than int3 (three seeds).
The teacher costs as many steps again; full precision itself gains nothing from one (1,000 steps,
one seed). Without a teacher, at the preset's decay, the loss is 1.05 times as high (one seed).
Models this small take 1.6 times as long packed as dense. Muon is the default of the small presets.
A decay over 60 % of a run helped in 1,000 steps, both ternary and in full precision. Logit-normal
times are better than uniform ones, and predicting the velocity is better than predicting noise or
the clean image. This package's initialization is much better than the authors'. Full precision for
the first third made things worse. A Hadamard basis lowered the loss by 1 %, but would change the
file format. A scale per row, the common rate for the scales, beta2 .999, no RMSNorm after adaLN,
weight decay and float32 instead of bfloat16 made no difference that one seed can show."""
NUM_IMAGES, GUIDANCE, SAMPLING_STEPS = 2000, 1.5, 25
HELD_OUT = 1000  # test images

OWN = ("full_share", "patch", "weights", "rounded", "twin")  # settings that are no flags
# What all arms have, besides the defaults of --preset tiny for these data: width 128, six layers, patches of 4.
COMMON = {
    "train_batch_size": 64, "learning_rate": 4e-3, "mixed_precision": "bf16", "flow_matching": "true",
    "weighting_scheme": "logit_normal", "adam_beta2": 0.95, "scale_lr_factor": 0.1, "scale_granularity": "tensor",
    "initialization": "small_gain", "class_dropout_prob": 0.1, "max_grad_norm": 2.0, "ema_decay": 0.98,
}  # fmt: skip
BASE = "recipe of the pilot"
FIRST_THIRD = "full precision for the first third"
TAUGHT = "Muon, full precision as the teacher"
FULL_TAUGHT = "full precision, Muon, another as the teacher"
NARROW = "full precision, width 48, Muon"
BY_TWIN = "Muon, its twin in full precision as the teacher"
NOISE = {"flow_matching": "false", "weighting_scheme": "none", "learn_sigma": "false"}

TEACHER = {
    "optimizer": "muon", "teacher": "full precision, Muon", "distillation_weight": 4, "max_grad_norm": 10.0,
    "mixed_precision": "no",
}  # fmt: skip

# Arm -> the settings that it changes. `full_share`, `teacher`, `patch`, `weights`, `rounded` and `twin` (the teacher
# has this run's learning rate and decay) are this study's own.
ARMS: dict[str, dict] = {
    BASE: {},
    "a scale per row": {"scale_granularity": "row"},
    FIRST_THIRD: {"full_share": 1 / 3},
    "a scale per row, full precision for the first third": {"scale_granularity": "row", "full_share": 1 / 3},
    "beta2 .999": {"adam_beta2": 0.999},
    "scales at the common rate": {"scale_lr_factor": 1.0},
    "uniform times": {"weighting_scheme": "none"},
    "noise prediction": NOISE,
    "noise prediction with the variational bound (TerDiT)": {**NOISE, "learn_sigma": "true"},
    "weight decay .1": {"adam_weight_decay": 0.1},
    "no RMSNorm after adaLN": {"adaln_norm": "false"},
    "the authors' initialization": {"initialization": "reference"},
    "Muon": {"optimizer": "muon"},
    "Muon, a scale per row": {"optimizer": "muon", "scale_granularity": "row"},
    TAUGHT: TEACHER,
    BY_TWIN: {**TEACHER, "twin": True},
    "a Hadamard basis": {"patch": "hadamard"},
    "prediction of the clean image": {"patch": "clean"},
    "raw weights": {"weights": "raw"},
    "full precision": {"ternary": "false"},
    "full precision, Muon": {"ternary": "false", "optimizer": "muon"},
    FULL_TAUGHT: {**TEACHER, "ternary": "false"},
    "full precision, width 48": {"ternary": "false", "attention_head_dim": 12, "ffn_dim": 200},  # as many bytes
    NARROW: {
        "ternary": "false", "attention_head_dim": 12, "ffn_dim": 200, "optimizer": "muon",
    },
    **{
        f"full precision, int{bits} in groups of {group}": {"ternary": "false", "rounded": [bits, group]}
        for bits, group in ((8, 64), (4, 64), (4, 32), (3, 64), (3, 32), (2, 32))
    },
    **{
        f"full precision, Muon, int{bits} in groups of {group}": {
            "ternary": "false", "optimizer": "muon", "rounded": [bits, group]
        }
        for bits, group in ((8, 64), (4, 64), (3, 32))
    },
}  # fmt: skip


# --- what the program does not have ---


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, (size, size) float32, orthogonal and symmetric; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def rotate_inputs(model: TerDiTTransformer2DModel) -> None:
    """Turn the inputs of every ternary layer, 128 at a time: the weights are ternary in the other basis."""

    matrix = hadamard(128)

    def rotated(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        blocks = inputs[0].unflatten(-1, (-1, len(matrix)))
        return ((blocks.float() @ matrix).to(blocks.dtype).flatten(-2),)  # few processors are fast in bfloat16

    for layer in model.ternary_layers().values():
        layer.register_forward_pre_hook(rotated)


def predict_clean(model: TerDiTTransformer2DModel) -> None:
    """Let the network draw the clean image; the model returns the velocity that leads there."""

    def to_velocity(_: nn.Module, inputs: tuple, output: tuple[Tensor]) -> tuple[Tensor]:
        noisy, timestep = inputs[:2]
        sigma = (timestep / 1000).clamp(min=0.05).reshape(-1, 1, 1, 1)
        return ((noisy - output[0]) / sigma,)

    model.register_forward_hook(to_velocity)


PATCHES = {"hadamard": rotate_inputs, "clean": predict_clean}


@torch.no_grad()
def round_weights(model: TerDiTTransformer2DModel, bits: int, group: int) -> None:
    """Round the matrices of the blocks to integers; the scale of each group of inputs is that of least error."""
    for layer in model.transformer_blocks.modules():
        if not isinstance(layer, nn.Linear):
            continue
        groups = layer.weight.unflatten(1, (-1, group))  # (N, K / group, group)
        limit = 2 ** (bits - 1) - 1
        largest, best, rounded = groups.abs().amax(-1, keepdim=True), None, groups
        for share in torch.linspace(0.4, 1, 25):
            scale = (share * largest / limit).clamp(min=1e-12)
            found = (groups / scale).round().clamp(-limit - 1, limit) * scale
            error = (found - groups).square().sum(-1, keepdim=True)
            rounded = found if best is None else torch.where(error < best, found, rounded)
            best = error if best is None else torch.minimum(best, error)
        layer.weight.copy_(rounded.flatten(1))


# --- runs ---


def run_of(arm: str, steps: int, seed: int, **changes) -> dict:
    """All that defines a run, as JSON."""
    settings = {**COMMON, **ARMS[arm], **changes}
    run = {"arm": arm, "settings": settings, "steps": steps, "seed": seed, "guidance": GUIDANCE, "fashion": 1}
    return json.loads(json.dumps(run))


class Study:
    """Trains and judges runs.

    Args:
        args: `data_dir`, `judge`, `runs_dir`, `compile`.
        records ([`Records`]): Of this study.
    """

    def __init__(self, args: argparse.Namespace, records: Records):
        self.args, self.records = args, records

    @cache  # noqa: B019 - one study a process
    def held_out(self) -> dict[str, Tensor]:
        """Test images at fixed noise and times, the same for every model."""
        samples = training.data.ImageSamples.from_idx(self.args.data_dir, "t10k", resolution=28, channels=1)
        examples = training.data.TrainingExamples(
            samples, EVAL_SEED, (1, 28, 28), 10, continuous_time=True, logit_normal=(0.0, 1.0)
        )
        return fixed_examples(examples, HELD_OUT)

    @torch.no_grad()
    def held_out_loss(self, pipe: TerDiTPipeline) -> float | None:
        """Mean squared error of the predicted velocity; `None` for a model of noise."""
        if pipe.transformer.config.prediction_type != "flow_prediction":
            return None
        batch, errors = self.held_out(), []
        for rows in torch.arange(len(batch["time"])).split(250):
            clean, noise, when, labels = (batch[key][rows] for key in ("samples", "noise", "time", "class_labels"))
            noisy, velocity, when = losses.training_target(pipe.scheduler, clean, noise, when)
            output = pipe.transformer(noisy, when, labels, return_dict=False)[0]
            errors.append(losses.mean_squared_error(output, velocity))
        return torch.cat(errors).mean().item()

    def judged(self, pipe: TerDiTPipeline, draw: bool) -> dict:
        """Held-out loss, in float32; distance and share recognized of its pictures, in bfloat16 where that is fast."""
        loss = self.held_out_loss(pipe)
        if not draw:
            return {"held_out_loss": loss}
        if pipe.transformer.config.prediction_type == "epsilon":
            pipe.scheduler = scheduler_by_name("dpm", pipe.scheduler, "epsilon")
        network, test = fashion.load_judge(self.args.judge)
        if pipe.transformer.config.ternary or torch.cpu._is_avx512_bf16_supported():
            pipe.transformer.to(torch.bfloat16)
        if self.args.compile:
            torch._dynamo.reset()
            pipe.transformer.compile_repeated_blocks(dynamic=False)
        settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE}
        drawn = fashion.sample(pipe, NUM_IMAGES, **settings)
        return {"held_out_loss": loss, **fashion.judge(*drawn, network, test)}

    def folder(self, run: dict) -> Path:
        changes = {key: value for key, value in run["settings"].items() if COMMON.get(key) != value}
        words = [f"{key}={value}" for key, value in changes.items() if key not in ("weights", "rounded")] or ["base"]
        return self.args.runs_dir / f"{' '.join(words)} {run['steps']} {run['seed']}".replace("/", "-")

    def program(self, folder: Path, settings: dict, steps: int, seed: int) -> None:
        """Run `terdit train` in this process, from its last checkpoint on."""
        settings = {"optimizer": "adamw", **settings}
        if settings.get("ternary") == "false" and not torch.cpu._is_avx512_bf16_supported():
            settings["mixed_precision"] = "no"  # where dense layers in bfloat16 take six times as long
        flags = {**settings, "max_train_steps": steps, "seed": seed, "validation_steps": steps, "output_dir": folder}
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        words += ["--train_data_dir", str(self.args.data_dir), "--resume_from_checkpoint", "latest"]
        words += ["--torch_compile"] if self.args.compile else []
        torch._dynamo.reset()
        AcceleratorState._reset_state(reset_partial_state=True)  # the run before may have had another precision
        script.main(words)

    def train(self, run: dict) -> Path:
        """Train a run, unless it is; return its pipeline's folder."""
        folder, seed, steps = self.folder(run), run["seed"], run["steps"]
        if (folder / "model_index.json").is_file():
            return folder
        settings = {key: v for key, v in run["settings"].items() if key not in OWN}
        if teacher := settings.pop("teacher", None):
            same = ("learning_rate", "lr_decay_steps") if run["settings"].get("twin") else ()
            changes = {key: settings[key] for key in same if key in settings}
            settings["teacher"] = self.train(run_of(teacher, steps, seed, **changes))
        if share := run["settings"].get("full_share"):
            first = round(share * steps)
            start, steps = folder.with_name(folder.name + " first"), steps - first
            full = {**settings, "ternary": "false", "lr_scheduler": "constant"}
            if not (start / "model_index.json").is_file():
                self.program(start, full, first, seed)
            settings |= {"init_from": start / f"checkpoint-{first}"}
        build = script.build_transformer

        def build_patched(*args):
            model = build(*args)
            PATCHES[run["settings"]["patch"]](model)
            return model

        if "patch" in run["settings"]:
            script.build_transformer = build_patched
        try:
            self.program(folder, settings, steps, seed)
        finally:
            script.build_transformer = build
        return folder

    def result(self, run: dict, draw: bool = True) -> dict:
        """Train and judge, by the loss alone or by pictures as well."""
        started = time.process_time()
        folder = self.train(run)
        seconds = round(time.process_time() - started)
        pipe = TerDiTPipeline.from_pretrained(folder)
        if run["settings"].get("weights") == "raw":
            last = folder / f"checkpoint-{run['steps']}"
            pipe.transformer = training.initialize.load_transformer(last)
        if patch := run["settings"].get("patch"):
            PATCHES[patch](pipe.transformer)
        if rounded := run["settings"].get("rounded"):
            round_weights(pipe.transformer, *rounded)
        return {**self.judged(pipe, draw), "training_seconds": seconds}


# What each part runs: (arm, steps, seed, changed settings).
Plan = list[tuple[str, int, int, dict]]
RATED = ("Muon", "full precision, Muon")
RATES = (2e-3, 4e-3, 8e-3, 16e-3)
RATE = {"learning_rate": 8e-3}
TUNED = {"optimizer": "muon", **RATE}
DECAYED = {steps: {**RATE, "lr_decay_steps": steps} for steps in (600, 950, 3600)}
AROUND = (
    BASE, "a scale per row", "no RMSNorm after adaLN", "uniform times", "scales at the common rate", "beta2 .999",
    "the authors' initialization", FIRST_THIRD, "a Hadamard basis", "weight decay .1", "noise prediction",
    "prediction of the clean image",
)  # fmt: skip
SEEDED = (BASE, "a scale per row", "Muon")  # the arms that went on to more seeds
PLANS: dict[str, Plan] = {
    "screen": [(arm, STEPS, 0, {}) for arm in ARMS],
    "rates": [(arm, RATE_STEPS, RATE_SEED, {"learning_rate": rate}) for arm in RATED for rate in RATES],
    "around": [(arm, RATE_STEPS, RATE_SEED, TUNED) for arm in AROUND],
    "decay": [
        *((arm, RATE_STEPS, RATE_SEED, DECAYED[600]) for arm in (*RATED, TAUGHT, FULL_TAUGHT)),
        ("Muon", RATE_STEPS, RATE_SEED, DECAYED[950]),
    ],
    "long": [
        *((arm, LONG_STEPS, 0, {}) for arm in RATED),
        ("Muon", LONG_STEPS, 0, RATE),
        *((arm, LONG_STEPS, 0, DECAYED[3600]) for arm in ("full precision, Muon", TAUGHT)),
    ],
    "twins": [
        (arm, LONG_STEPS, seed, DECAYED[3600]) for seed in SEEDS[1:] for arm in ("full precision, Muon", BY_TWIN)
    ],
    "compute": [(NARROW, steps, seed, RATE) for steps in (STEPS, EQUAL_COMPUTE) for seed in SEEDS],
    "rounded": [
        (f"full precision, Muon, int{rounding}", LONG_STEPS, seed, DECAYED[3600])
        for seed in SEEDS
        for rounding in ("8 in groups of 64", "4 in groups of 64", "3 in groups of 32")
    ],
    "seeds": [(arm, STEPS, seed, {}) for arm in SEEDED for seed in SEEDS],
}
# The models that the page compares by their bytes, with the seeds of each.
BY_BYTES: list[Plan] = [
    [("Muon", STEPS, seed, {}) for seed in SEEDS],
    [(TAUGHT if seed == 0 else BY_TWIN, LONG_STEPS, seed, DECAYED[3600]) for seed in SEEDS],
    *([(NARROW, steps, seed, RATE) for seed in SEEDS] for steps in (STEPS, EQUAL_COMPUTE)),
    [("full precision, Muon", LONG_STEPS, seed, DECAYED[3600]) for seed in SEEDS],
    *([run for run in PLANS["rounded"] if run[0] == arm] for arm in dict.fromkeys(run[0] for run in PLANS["rounded"])),
]


def cells(results: list[dict]) -> list[str]:
    """Loss, distance and share of the ceiling; with several seeds mean and standard deviation."""
    loss = [result["held_out_loss"] for result in results]
    if "share" not in results[0]:  # judged by the loss alone
        return [f"{loss[0]:.4f}", "-", "-"]
    distance = [result["frechet_distance"] for result in results]
    share = [result["share"] for result in results]
    if len(results) == 1:
        return [f"{loss[0]:.4f}" if loss[0] is not None else "-", f"{distance[0]:.2f}", f"{share[0]:.3f}"]
    return [cell(loss, 4) if None not in loss else "-", cell(distance, 2), cell(share, 3)]


PAIR_DIGITS = (4, 4, 3, 2, 2, 2, 3, 3)


def compared(first: dict, second: dict) -> list[float]:
    """Loss, distance and share of two results, each with the second's over the first's but for the share."""
    found = []
    for key in ("held_out_loss", "frechet_distance", "share"):
        found += [first[key], second[key], second[key] / first[key]]
    return found[:-1]


def named(run: dict) -> str:
    """The arm of a run, and what else it changes, but for the learning rate."""
    words = {"num_layers": "{} layers", "lr_decay_steps": "decay over {:,} steps", "mixed_precision": "float32"}
    fixed = COMMON | ARMS[run["arm"]]
    changes = {key: value for key, value in run["settings"].items() if fixed.get(key) != value}
    arm = "Muon" if run["arm"] == BASE and changes.get("optimizer") == "muon" else run["arm"]
    return ", ".join([arm, *(word.format(changes[key]) for key, word in words.items() if key in changes)])


def weight_bytes(settings: dict) -> int:
    """Bytes of the weights as a run's settings save them: two bits, or `rounded` ones, or else two bytes each."""
    config = {key: settings[key] for key in ("attention_head_dim", "ffn_dim", "num_layers") if key in settings}
    tiny = training.recipes.PRESETS["tiny"]
    names = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "pos_embed_type")
    fixed = {"sample_size": 28, "in_channels": 1, "num_classes": 10, "learn_sigma": False}
    with torch.device("meta"):
        model = TerDiTTransformer2DModel(**fixed, **{name: tiny[name] for name in names} | config)
    blocks = model.ternary_layers().items()
    matrices = sum(layer.weight.numel() for name, layer in blocks if name.startswith("transformer_blocks"))
    total = sum(parameter.numel() for parameter in model.parameters())
    bits, scales = 2.0, 0.0
    if settings.get("ternary") == "false":
        bits, group = settings.get("rounded", (16, math.inf))
        scales = 2 * matrices / group
    return round(matrices * bits / 8 + scales + 2 * (total - matrices))


def render(folder: Path) -> str:
    """Page of the records in a folder."""
    records = Records(folder / f"{NAME}.jsonl")
    for record in records.records:
        if "recognised" in record["result"]:
            record["result"]["share"] = record["result"]["recognised"] / CEILINGS["avx512" in record["machine"]]

    def find(plan: Plan) -> list[dict]:
        return [
            found for arm, steps, seed, changes in plan if (found := records.find(run_of(arm, steps, seed, **changes)))
        ]

    screen = [(arm, found[0]) for arm in ARMS if (found := find([(arm, STEPS, 0, {})]))]
    screen.sort(key=lambda item: item[1]["frechet_distance"])
    seeds: dict[tuple[int, str, str], list[dict]] = {}
    for record in records.records:
        if (run := record["run"])["steps"] != RATE_STEPS:
            key = run["steps"], named(run), f"{run['settings']['learning_rate']:g}"
            seeds.setdefault(key, []).append(record["result"])
    longer = [
        [named(run), f"{run['settings']['learning_rate']:g}", f"{run['steps']:,}", *cells([record["result"]])]
        for record in records.records
        if (run := record["run"])["steps"] > STEPS and run["steps"] != EQUAL_COMPUTE and run["seed"] == 0
    ]
    short = {}  # the record with pictures comes after the one without
    for record in sorted(records.records, key=lambda record: "share" in record["result"]):
        if (run := record["run"])["steps"] == RATE_STEPS:
            short[named(run), run["settings"]["learning_rate"]] = record["result"]
    sizes = [
        (weight_bytes(ARMS[arm]), steps, named(run_of(arm, steps, seed, **changes)), found)
        for plan in BY_BYTES
        if (found := find(plan))
        for arm, steps, seed, changes in plan[:1]
    ]
    by_bytes = {
        (steps, named(run_of(arm, steps, seed, **changes))) for plan in BY_BYTES for arm, steps, seed, changes in plan
    }
    pairs = {}
    for seed in SEEDS:
        full = find([("full precision, Muon", LONG_STEPS, seed, DECAYED[3600])])
        taught = find([(arm, LONG_STEPS, seed, DECAYED[3600]) for arm in (BY_TWIN, TAUGHT)])
        if full and taught:
            pairs[seed] = compared(full[0], taught[0])
    in_pairs = [
        [str(seed), *(f"{number:.{digits}f}" for number, digits in zip(found, PAIR_DIGITS, strict=True))]
        for seed, found in pairs.items()
    ]
    if len(pairs) > 1:
        spread = [cell(list(found), digits) for digits, *found in zip(PAIR_DIGITS, *pairs.values(), strict=True)]
        in_pairs.append(["mean ± standard deviation", *spread])
    tried = {record["run"]["arm"] for record in records.records}
    return write_page(
        NAME,
        answer=ANSWER,
        made=made_on(records),
        steps=f"{STEPS:,}",
        screen=[[f"**{arm}**" if arm == BASE else arm, *cells([result])] for arm, result in screen],
        missing="; ".join(arm for arm in ARMS if arm not in tried),
        short=[
            [name, f"{rate:g}", *cells([result])]
            for (name, rate), result in sorted(short.items(), key=lambda item: item[1]["held_out_loss"] or math.inf)
        ],
        rate_steps=f"{RATE_STEPS:,}",
        longer=longer,
        pairs=in_pairs,
        sizes=[
            [name, f"{size / 1e3:,.0f}", f"{steps:,}", str(len(found)), *cells(found)]
            for size, steps, name, found in sorted(sizes, key=lambda row: row[:3])
        ],
        seeds=[
            [name, rate, f"{steps:,}", str(len(found)), *cells(found)]
            for (steps, name, rate), found in sorted(seeds.items(), key=lambda item: item[0][0])
            if len(found) > 1 and (steps, name) not in by_bytes
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, help="folder of the IDX files of Fashion-MNIST")
    add("--judge", type=Path, default=fashion.JUDGE, help="file that fashion.py wrote")
    add("--runs_dir", type=Path, default=Path("outputs/recipe"), help="folder of the runs and their checkpoints")
    add("--part", choices=list(PLANS), action="append", help="default: all")
    add("--arm", choices=list(ARMS), action="append", help="of these parts, run these arms alone")
    add("--seed", type=int, action="append", help="and these seeds alone")
    add("--compile", action="store_true", help="pass --torch_compile")
    args = read_arguments(NAME, parser, argv)
    folder = args.render or args.output_dir
    records = Records(folder / f"{NAME}.jsonl")
    if not args.render:
        study = Study(args, records)
        for part in args.part or PLANS:
            for arm, steps, seed, changes in PLANS[part]:
                if arm in (args.arm or [arm]) and seed in (args.seed or [seed]):
                    run = run_of(arm, steps, seed, **changes)
                    records.get(run, lambda run=run, part=part: study.result(run, draw=part not in ("rates", "decay")))
    (folder / f"{NAME}.md").write_text(render(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
