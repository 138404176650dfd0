"""Teach a trained TerDiT new classes, or its old ones a new look, with a LoRA adapter on its packed weights.

    OMP_NUM_THREADS=1 python examples/train_lora.py --demo --output_dir outputs/lora   # a minute on one CPU core
    python examples/train_lora.py --model me/my-terdit --train_data_dir pictures --output_dir outputs/lora

`--train_data_dir` holds class folders of images. A folder whose name the model knows trains that label; another name
becomes a new class with its own row in the label table. The ternary weights stay packed and are never written.
`--output_dir` gets the adapter, a `README.md` with the lines that load it, and pictures: `before.png`, `after.png`.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"train_lora: interrupted\n") and os._exit(130))

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_terdit import TerDiTPipeline, losses, training
from diffusers_terdit.arguments import Parser, at_least, color, not_negative, seed, share
from diffusers_terdit.checkpoints import resolve_model
from diffusers_terdit.cli import run_program
from diffusers_terdit.evaluation.digits import digits_classifier
from diffusers_terdit.pipelines.schedulers import training_scheduler
from diffusers_terdit.storage.saving import new_file


# Every ternary layer; the dense layers around them stay as they are.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj", "adaln.linear"]
NEW_CLASS = "mirrored three"
COLUMNS = 10


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--demo", action="store_true", help=f"the bundled digits learn a new class, {NEW_CLASS!r}")
    add("--train_data_dir", help="folder of class folders of images")
    add("--background", type=color, default="white", help="Show this color where images are transparent.")
    add("--model", default="digits", help="folder, Hub id, or the name of a bundled checkpoint")
    add("--output_dir", type=Path, default=Path("terdit-lora"))
    add(
        "--rehearsal",
        type=at_least(0),
        default=16,
        help="--demo: pictures of each old class in the training set; 0 forgets",
    )
    add("--rank", type=at_least(1), default=8)
    add("--learning_rate", type=not_negative, default=2e-3)
    add("--max_train_steps", type=at_least(1), default=600)
    add("--train_batch_size", type=at_least(1), default=64)
    add("--class_dropout_prob", type=share, default=0.1)
    add("--gradient_checkpointing", action="store_true")
    add("--seed", type=seed, default=0)
    add("--guidance_scale", type=not_negative, default=1.5)
    add("--num_inference_steps", type=at_least(1), default=50)
    args = parser.parse_args(argv)
    if args.demo == bool(args.train_data_dir):
        parser.error("pass one of --demo, --train_data_dir")
    return args


class MirroredThrees:
    """Training digits: the threes mirrored, as class 10, and the first `rehearsal` pictures of each digit."""

    flip = False

    def __init__(self, rehearsal: int):
        digits = training.data.Digits(train=True)
        labels = torch.tensor(digits.labels)
        rows = [torch.nonzero(labels == digit)[:rehearsal, 0] for digit in range(10)]
        threes = digits.images[labels == 3].flip(-1)
        self.images = torch.cat([digits.images[torch.cat(rows)], threes])
        self.labels = [*labels[torch.cat(rows)].tolist(), *[10] * len(threes)]
        self.id2label = {**digits.id2label, 10: NEW_CLASS}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


def open_samples(args: argparse.Namespace, pipe: TerDiTPipeline):
    """Return training samples with the model's label ids; names that it does not know get the ids after its last."""
    if args.demo:
        return MirroredThrees(args.rehearsal)
    config = pipe.transformer.config
    resolution = config.sample_size * pipe.vae_scale_factor
    channels = config.in_channels if pipe.vae is None else 3
    options = {"resolution": resolution, "channels": channels, "background": args.background}
    samples = training.data.ImageSamples.from_folder(args.train_data_dir, **options)
    if not samples.id2label:
        if config.num_classes > 1:
            raise SystemExit(
                f"{args.train_data_dir} holds images without classes, and {args.model} draws {config.num_classes}"
                " classes. Move them into a folder named after their label."
            )
        args.class_dropout_prob, args.guidance_scale = 0.0, 1.0  # without classes there is no null label
        return samples
    known, ids = pipe.labels, {}
    for name in samples.id2label.values():
        ids[name] = known[name] if name in known else config.num_classes + len(set(ids) - set(known))
    samples.labels = [ids[samples.id2label[label]] for label in samples.labels]
    samples.id2label = {number: name for name, number in ids.items()}
    return samples


def add_classes(pipe: TerDiTPipeline, names: list[str]) -> None:
    """Add rows for new labels to the model's table, and their names to the pipeline."""
    first = pipe.transformer.config.num_classes
    pipe.transformer.add_classes(len(names))
    new = {str(first + i): name for i, name in enumerate(names)}
    pipe.register_to_config(id2label={**(pipe.config.id2label or {}), **new})


def lora_config(rank: int, rows: list[int] | None = None) -> LoraConfig:
    """Configure LoRA on every ternary layer, and training of whole `rows` of the label table."""
    tokens = {"class_embed": rows} if rows else None
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, trainable_token_indices=tokens)


def train(pipe: TerDiTPipeline, samples, args: argparse.Namespace) -> float:
    """Train the active adapter; return the mean loss of the last tenth of the steps."""
    transformer = pipe.transformer.train()
    config, device = transformer.config, transformer.device
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    codec = training.data.LatentCodec(pipe.vae)
    flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler = training_scheduler(config.learn_sigma, flow)
    latent_shape = (config.in_channels, config.sample_size, config.sample_size)
    dropout = (config.num_classes, args.class_dropout_prob)
    examples = training.data.TrainingExamples(samples, args.seed, latent_shape, *dropout, continuous_time=flow)
    weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    positions = training.random.run_positions(0, args.max_train_steps, args.train_batch_size, 1, 0, 1)
    recent, tenth = [], max(1, args.max_train_steps // 10)
    for step, batch in enumerate(tqdm(DataLoader(examples, batch_sampler=positions), total=args.max_train_steps)):
        batch = codec.encode({key: value.to(device) for key, value in batch.items()})
        clean, noise, when, labels = (batch[key] for key in ("samples", "noise", "time", "class_labels"))
        noisy, target, timesteps = losses.training_target(scheduler, clean, noise, when)
        output = transformer(noisy.to(transformer.dtype), timesteps, labels).sample.float()
        if flow:
            loss = losses.mean_squared_error(output, target).mean()
        else:
            loss = losses.diffusion_loss(output, clean, noise, when, scheduler.alphas_cumprod.to(device)).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"The loss is {loss.item()} at step {step}. Lower --learning_rate.")
        loss.backward()
        factor = training.recipes.learning_rate_factor(
            step, "wsd", args.max_train_steps, min(20, tenth), args.max_train_steps // 3
        )
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent, loss.item()][-tenth:]
    transformer.eval()
    return sum(recent) / len(recent)


def pictures(pipe: TerDiTPipeline, labels: list[int], args: argparse.Namespace) -> Image.Image:
    """Draw a row of each label, always from the same initial noise."""
    rows = [label for label in labels for _ in range(COLUMNS)]
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(rows))]
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return training.export.image_grid(pipe(rows, generator=generators, **options).images, COLUMNS)


def recognized(pipe: TerDiTPipeline, args: argparse.Namespace, count: int = 200) -> dict[str, float]:
    """Return the shares that the digits classifier reads as their label: old classes, and the new one mirrored."""
    classifier, shares = digits_classifier(), {}
    for name, labels in (("old", [i % 10 for i in range(count)]), ("new", [10] * count)):
        options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        generator = torch.Generator().manual_seed(args.seed)
        images = pipe(labels, generator=generator, output_type="pt", **options).images
        meant = torch.tensor(labels) if name == "old" else torch.full((count,), 3)
        images = images if name == "old" else images.flip(-1)
        shares[name] = (classifier(images)["logits"].argmax(1) == meant).float().mean().item()
    return shares


CARD = """# LoRA adapter for {model}

{numbers} trained weights, rank {rank}, {steps} steps.

```python
import torch
from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled

pipe = TerDiTPipeline.from_pretrained({source})
{classes}pipe.transformer.load_lora_adapter({folder!r})
images = pipe({label!r}, guidance_scale={guidance}, generator=torch.Generator().manual_seed(0)).images
```
"""

CLASSES = """pipe.transformer.add_classes({count})
pipe.register_to_config(id2label=pipe.config.id2label | {names!r})
"""


def card(pipe: TerDiTPipeline, args: argparse.Namespace, new: dict[str, str], label: str) -> str:
    """Write the README of the adapter."""
    trained = sum(parameter.numel() for parameter in pipe.transformer.parameters() if parameter.requires_grad)
    return CARD.format(
        model=args.model,
        numbers=f"{trained:,}",
        rank=args.rank,
        steps=args.max_train_steps,
        source=repr(args.model) if resolve_model(args.model) == args.model else f"bundled({args.model!r})",
        classes=CLASSES.format(count=len(new), names=new) if new else "",
        folder=str(args.output_dir),
        label=label,
        guidance=args.guidance_scale,
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)  # initializes the adapter's first matrices
    pipe = TerDiTPipeline.from_pretrained(resolve_model(args.model))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    samples, first = open_samples(args, pipe), pipe.transformer.config.num_classes
    new = {number: name for number, name in sorted(samples.id2label.items()) if number >= first}
    if new:
        add_classes(pipe, list(new.values()))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shown = [*new, *(label for label in sorted(set(samples.labels)) if label < first)][:4]
    if args.demo:
        shown = [10, 3, 8, 2]
    with new_file(args.output_dir / "before.png") as partial:
        pictures(pipe, shown, args).save(partial)
    report = {"before": recognized(pipe, args)} if args.demo else {}

    pipe.transformer.add_adapter(lora_config(args.rank, list(new)))
    started = time.perf_counter()
    report["loss"] = train(pipe, samples, args)
    report["seconds"] = round(time.perf_counter() - started, 1)
    pipe.transformer.save_lora_adapter(args.output_dir)

    with new_file(args.output_dir / "after.png") as partial:
        pictures(pipe, shown, args).save(partial)
    if args.demo:
        report["after"] = recognized(pipe, args)
        pipe.transformer.disable_adapters()
        report["after, adapter disabled"] = recognized(pipe, args)
        pipe.transformer.enable_adapters()
    new_names = {str(number): name for number, name in new.items()}
    label = samples.id2label.get(shown[0], shown[0])
    files = {"README.md": card(pipe, args, new_names, label), "report.json": json.dumps(report, indent=2) + "\n"}
    for name, text in files.items():
        with new_file(args.output_dir / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(run_program(Path(__file__).stem, main))
