"""Teach a trained TerDiT new classes, or its old ones a new look, with a LoRA adapter on its packed weights.

    OMP_NUM_THREADS=1 python examples/train_lora.py --demo --output_dir outputs/lora   # two minutes
    python examples/train_lora.py --model me/my-terdit --train_data_dir pictures --output_dir outputs/lora

`--train_data_dir` holds class folders of images. A folder whose name the model knows trains that label; another name
becomes a new class with its own row in the label table. The ternary weights stay packed and are never written.
So that the old classes stay as they are, the model also learns to give its own answers for them, on its own pictures.
`--output_dir` gets the adapter, a `README.md` with the lines that load it, pictures (`before.png`, `after.png`,
`samples/`), `log.jsonl`, and each `checkpoint-N/`, from which `--resume_from_checkpoint latest` goes on bit for bit.
"""

import argparse
import itertools
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"train_lora: interrupted\n") and os._exit(130))

import torch
from peft import LoraConfig
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_terdit import TerDiTPipeline, cli, losses, training
from diffusers_terdit.arguments import Parser, at_least, color, keep_limit, not_negative, seed, share
from diffusers_terdit.checkpoints import resolve_model
from diffusers_terdit.evaluation.digits import digits_classifier
from diffusers_terdit.pipelines.schedulers import training_scheduler
from diffusers_terdit.storage.saving import new_file, output_folder, writing


logger = logging.getLogger(__name__)

# Every ternary layer; the dense layers around them stay as they are.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj", "adaln.linear"]
NEW_CLASS = "mirrored three"
COLUMNS = 10


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--demo", action="store_true", help=f"Teach the bundled digits a new class, {NEW_CLASS!r}.")
    add("--train_data_dir", help="Read the pictures from this folder of class folders.")
    add("--background", type=color, default="white", help="Show this color where images are transparent.")
    add("--model", default="digits", help="Teach this model: a folder, a Hub id, or the name of a bundled checkpoint.")
    add("--rank", type=at_least(1), default=8, help="Rank of the adapter's matrices. A higher one can learn more.")
    add("--learning_rate", type=not_negative, default=2e-3, help="The highest learning rate of AdamW; it falls to 0.")
    add(
        "--max_train_steps",
        type=at_least(1),
        help="The run has this many optimizer steps; if not set: 400, or 800 in --demo.",
    )
    add("--train_batch_size", type=at_least(1), default=8, help="A step takes this many pictures.")
    add(
        "--class_dropout_prob",
        type=share,
        default=0.1,
        help="Train this share of the pictures without their label, for guidance.",
    )
    add(
        "--prior_loss_weight",
        type=not_negative,
        default=1.0,
        help="Weight of the frozen model's answers for the old classes. With 0 the model forgets them.",
    )
    add(
        "--num_class_images",
        type=at_least(1),
        default=128,
        help="Draw this many pictures of old classes with the frozen model, to keep its answers on them.",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="Save memory: keep fewer activations, and compute the others twice.",
    )
    add("--seed", type=seed, default=0, help="All random numbers of the run follow from this one.")
    add("--output_dir", type=Path, default=Path("terdit-lora"), help="Write everything into this folder.")
    add("--checkpointing_steps", type=at_least(1), default=100, help="Save a checkpoint every this many steps.")
    add("--checkpoints_total_limit", type=keep_limit, default=2, help="Keep this many checkpoints; -1 keeps all.")
    add("--resume_from_checkpoint", help='Resume from this folder, or from the "latest" checkpoint in --output_dir.')
    add("--validation_steps", type=at_least(1), default=200, help="Draw a grid of samples every this many steps.")
    add("--logging_steps", type=at_least(1), default=10, help="Write to log.jsonl every this many steps.")
    add("--guidance_scale", type=not_negative, help="Draw with this guidance; if not set, what the model recommends.")
    add("--num_inference_steps", type=at_least(1), help="Draw in this many steps; if not set, as recommended.")
    args = parser.parse_args(argv)
    if args.demo == bool(args.train_data_dir):
        parser.error("pass one of --demo, --train_data_dir")
    if args.demo and args.model != "digits":
        parser.error("--demo teaches digits; leave out --model, or pass --train_data_dir")
    args.max_train_steps = args.max_train_steps or (800 if args.demo else 400)
    return args


class Pictures(Dataset):
    """(tensor, label) by index, of tensors that are there: the demo's, and what the frozen model draws."""

    flip = False

    def __init__(self, images: torch.Tensor, labels: list[int], id2label: dict[int, str] | None = None):
        self.images, self.labels, self.id2label = images, labels, id2label or {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


def mirrored_threes() -> Pictures:
    """Return the threes of the training digits in the mirror, as class 10."""
    digits = training.data.Digits(train=True)
    threes = digits.images[torch.tensor(digits.labels) == 3].flip(-1)
    return Pictures(threes, [10] * len(threes), {10: NEW_CLASS})


def open_samples(args: argparse.Namespace, pipe: TerDiTPipeline):
    """Return training samples with the model's label ids; names that it does not know get the ids after its last."""
    if args.demo:
        return mirrored_threes()
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


def class_images(pipe: TerDiTPipeline, trained: set[int], args: argparse.Namespace) -> Pictures | None:
    """Draw pictures of the classes that are not trained, as latents; there may be none."""
    old = [label for label in range(pipe.transformer.config.num_classes) if label not in trained]
    if not old or not args.prior_loss_weight:
        return None
    order = training.random.permutation(len(old), args.seed, "class_images", 0)
    labels = [old[order[i % len(old)]] for i in range(args.num_class_images)]
    latents = [
        draw(pipe, labels[i : i + args.train_batch_size], args, args.seed + i, "latent").cpu()
        for i in tqdm(range(0, len(labels), args.train_batch_size), desc="pictures of old classes")
    ]
    return Pictures(torch.cat(latents), labels)


def draw(pipe: TerDiTPipeline, labels: list[int], args: argparse.Namespace, first_seed: int, output_type: str):
    """Draw one image per label, each from its own seed."""
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(labels))]
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return pipe(labels, generator=generators, output_type=output_type, **options).images


class Trainer:
    """A run that trains the active adapter of a pipeline in its folder."""

    def __init__(self, pipe: TerDiTPipeline, samples, prior: Pictures | None, shown: list[int], args):
        self.pipe, self.args, self.shown, self.step = pipe, args, shown, 0
        self.transformer = pipe.transformer
        config, self.device = self.transformer.config, self.transformer.device
        if args.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.codec = training.data.LatentCodec(pipe.vae)
        self.flow = pipe.prediction_type == "flow_prediction"
        if pipe.prediction_type not in (None, "epsilon", "flow_prediction"):
            raise SystemExit(
                f"{args.model} predicts {pipe.prediction_type}. Pass a model of noise or of rectified flow."
            )
        self.scheduler = training_scheduler(config.learn_sigma, self.flow)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        options = (config.num_classes, args.class_dropout_prob, self.flow)
        self.examples = training.data.TrainingExamples(samples, args.seed, shape, *options)
        self.prior = prior and training.data.TrainingExamples(prior, args.seed + 1, shape, *options)
        weights = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
        self.log_path = args.output_dir / "log.jsonl"
        self.state = {"seed": args.seed, "batch_size": args.train_batch_size, "model": args.model}
        self.state |= {"images": len(samples), "num_class_images": prior and len(prior), "id2label": samples.id2label}

    def resume(self, folder: Path) -> None:
        """Restore a checkpoint; the position in the data follows from its step."""
        state = training.checkpointing.load(folder, self.transformer, None, self.optimizer)
        own = json.loads(json.dumps(self.state))
        if wrong := [
            f"{key} was {state.get(key)!r:.80}, is {own[key]!r:.80}" for key in own if state.get(key) != own[key]
        ]:
            raise SystemExit(
                f"{folder} is of another run: {'; '.join(wrong)}. Pass its flags, or another --output_dir."
            )
        self.step = state["step"]
        logger.info(f"resumed {folder} at step {self.step}")

    def batches(self, examples):
        args = self.args
        positions = training.random.run_positions(self.step, args.max_train_steps, args.train_batch_size, 1, 0, 1)
        for batch in DataLoader(examples, batch_sampler=positions):
            yield self.codec.encode({key: value.to(self.device) for key, value in batch.items()})

    def train(self) -> bool:
        """Train to the last step; return False where a signal ended the run earlier, after saving."""
        args, stop = self.args, training.stopping.StopRequest()
        self.transformer.train()
        prior = self.batches(self.prior) if self.prior else itertools.repeat(None)
        batches = zip(self.batches(self.examples), prior, strict=False)
        progress = tqdm(total=args.max_train_steps, initial=self.step)
        recent, started = [], time.perf_counter()
        for pair in batches:
            shares = self.train_step(*pair)
            recent.append(shares)
            progress.update()
            progress.set_postfix(**{name: f"{value:.4f}" for name, value in shares.items()})
            done = self.step == args.max_train_steps
            if self.step % args.logging_steps == 0 or done:
                seconds = time.perf_counter() - started
                means = {name: sum(s[name] for s in recent) / len(recent) for name in shares}
                self.log(**means, images_per_second=len(recent) * args.train_batch_size / seconds)
                recent, started = [], time.perf_counter()
            if self.step % args.checkpointing_steps == 0 or done or stop:
                self.save()
            if stop and not done:
                progress.close()
                logger.info("stopped by a signal; go on with --resume_from_checkpoint latest")
                if stop.interrupted:
                    raise KeyboardInterrupt
                return False
            if self.step % args.validation_steps == 0 and not done:
                self.validate()
        progress.close()
        self.transformer.eval()
        return True

    def train_step(self, batch: dict, prior: dict | None) -> dict[str, float]:
        """Take one optimizer step; return the loss, and its share of the old classes."""
        args = self.args
        clean, noise, when, labels = (batch[key] for key in ("samples", "noise", "time", "class_labels"))
        noisy, target, timesteps = losses.training_target(self.scheduler, clean, noise, when)
        inputs = (noisy, timesteps, labels)
        if prior:
            old, _, old_timesteps = losses.training_target(
                self.scheduler, prior["samples"], prior["noise"], prior["time"]
            )
            old_inputs = (old, old_timesteps, prior["class_labels"])
            self.transformer.disable_adapters()
            with torch.no_grad():
                wanted = self.predict(*old_inputs)
            self.transformer.enable_adapters()
            inputs = tuple(torch.cat(pair) for pair in zip(inputs, old_inputs, strict=True))
        output = self.predict(*inputs)
        own = output[: len(clean)]
        if self.flow:
            loss = losses.mean_squared_error(own, target).mean()
        else:
            alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)
            loss = losses.diffusion_loss(own, clean, noise, when, alphas_cumprod).mean()
        shares = {"loss": loss.item()}
        if prior:
            kept = losses.mean_squared_error(output[len(clean) :], wanted).mean()
            shares["prior_loss"] = kept.item()
            loss = loss + args.prior_loss_weight * kept
        if not loss.isfinite():
            raise FloatingPointError(f"The loss is {loss.item()} at step {self.step}. Lower --learning_rate.")
        loss.backward()
        factor = training.recipes.learning_rate_factor(
            self.step, "wsd", args.max_train_steps, min(20, args.max_train_steps // 10), args.max_train_steps // 3
        )
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return shares

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.transformer(noisy.to(self.transformer.dtype), timesteps, labels).sample.float()

    def log(self, **record) -> None:
        with writing(self.log_path), self.log_path.open("a") as file:
            file.write(json.dumps({"step": self.step, **record}) + "\n")

    def save(self) -> None:
        args, state = self.args, {"step": self.step, **self.state}
        folder = args.output_dir / f"checkpoint-{self.step}"
        training.checkpointing.save(folder, self.transformer, None, self.optimizer, state)
        training.checkpointing.rotate(args.output_dir, args.checkpoints_total_limit)

    def validate(self) -> None:
        """Save a grid of samples of this step."""
        self.transformer.eval()
        path = self.args.output_dir / "samples" / f"step-{self.step}.png"
        path.parent.mkdir(exist_ok=True)
        save_grid(path, self.pipe, self.shown, self.args)
        self.transformer.train()


def save_grid(path: Path, pipe: TerDiTPipeline, labels: list[int], args: argparse.Namespace) -> None:
    """Draw a row of each label, always from the same initial noise."""
    images = draw(pipe, [label for label in labels for _ in range(COLUMNS)], args, args.seed, "pil")
    with new_file(path) as partial:
        training.export.image_grid(images, COLUMNS).save(partial, format="PNG")


def recognized(pipe: TerDiTPipeline, args: argparse.Namespace, count: int = 200) -> dict[str, float]:
    """Return the shares that the digits classifier reads as their label: old classes, and the new one mirrored."""
    classifier, shares = digits_classifier(), {}
    for name, labels in (("old", [i % 10 for i in range(count)]), ("new", [10] * count)):
        images = draw(pipe, labels, args, args.seed, "pt")
        meant = torch.tensor(labels) if name == "old" else torch.full((count,), 3)
        images = images if name == "old" else images.flip(-1)
        shares[name] = (classifier(images)["logits"].argmax(1) == meant).float().mean().item()
    return shares


CARD = """# LoRA adapter for {model}

{numbers} trained weights, rank {rank}, {steps} steps.

```python
import torch
from diffusers_terdit import TerDiTPipeline
{imports}
pipe = TerDiTPipeline.from_pretrained({source})
pipe.load_lora_weights({folder!r})
images = pipe({label!r}, generator=torch.Generator().manual_seed(0)).images
```
"""


def card(pipe: TerDiTPipeline, args: argparse.Namespace, label: str | int) -> str:
    """Write the README of the adapter."""
    trained = sum(parameter.numel() for parameter in pipe.transformer.parameters() if parameter.requires_grad)
    is_bundled = resolve_model(args.model) != args.model
    return CARD.format(
        model=args.model,
        numbers=f"{trained:,}",
        rank=args.rank,
        steps=args.max_train_steps,
        imports="from diffusers_terdit.checkpoints import bundled\n" if is_bundled else "",
        source=f"bundled({args.model!r})" if is_bundled else repr(args.model),
        folder=str(args.output_dir),
        label=label,
    )


def run(args: argparse.Namespace) -> None:
    """Train and save an adapter, and report what it changed."""
    found = training.checkpointing.find(args.output_dir)
    if found and not args.resume_from_checkpoint:
        raise SystemExit(
            f"{args.output_dir} holds {found[-1].name}. Pass --resume_from_checkpoint latest to go on, or another"
            " --output_dir."
        )
    torch.manual_seed(args.seed)  # initializes the adapter's first matrices
    pipe = cli.load_pipeline(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    samples, first = open_samples(args, pipe), pipe.transformer.config.num_classes
    new = {number: name for number, name in sorted(samples.id2label.items()) if number >= first}
    trained = set(samples.labels)
    old = [label for label in range(first) if label not in trained]
    shown = [*new, *sorted(label for label in trained if label < first)][:4] + old[:2]
    if args.demo:
        shown = [10, 3, 8, 2]
    logger.info(
        f"{len(samples)} pictures, {len(new)} new classes, {args.max_train_steps} steps of {args.train_batch_size}:"
        f" {args.max_train_steps * args.train_batch_size / len(samples):.0f} epochs"
    )
    prior = class_images(pipe, trained, args)
    if new:
        add_classes(pipe, list(new.values()))
    judged = old[:: max(1, len(old) // 20)]  # about 20 old classes
    before = draw(pipe, judged, args, args.seed, "pt") if judged else None
    report = {"before": recognized(pipe, args)} if args.demo else {}
    save_grid(args.output_dir / "before.png", pipe, shown, args)

    pipe.transformer.add_adapter(lora_config(args.rank, list(new)))
    trainer = Trainer(pipe, samples, prior, shown, args)
    if args.resume_from_checkpoint:
        latest = found[-1] if found else None
        folder = latest if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
        if folder:
            trainer.resume(folder)
    training.checkpointing.cut_log(trainer.log_path, trainer.step)
    started = time.perf_counter()
    if not trainer.train():
        return
    report["seconds"] = round(time.perf_counter() - started, 1)
    pipe.save_lora_weights(args.output_dir)
    save_grid(args.output_dir / "after.png", pipe, shown, args)
    if judged:  # root of the mean square, pixels in [0, 1]
        moved = (draw(pipe, judged, args, args.seed, "pt") - before).square().mean().sqrt().item()
        report["old classes moved by"] = round(moved, 4)
    if args.demo:
        report["after"] = recognized(pipe, args)
        pipe.disable_lora()
        report["after, adapter disabled"] = recognized(pipe, args)
        pipe.enable_lora()
    label = samples.id2label.get(shown[0], shown[0])
    files = {"README.md": card(pipe, args, label), "report.json": json.dumps(report, indent=2) + "\n"}
    for name, text in files.items():
        with new_file(args.output_dir / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(json.dumps(report, indent=2))


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with output_folder(args.output_dir):  # no other run writes there
        run(args)


if __name__ == "__main__":
    sys.exit(cli.run_program(Path(__file__).stem, main))
