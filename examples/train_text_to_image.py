"""Train a text-to-image diffusion transformer of diffusers (PixArt), or make a trained one ternary and train on.

    python examples/train_text_to_image.py --demo --output_dir outputs/dense
    python examples/train_text_to_image.py --demo --pretrained_model_name_or_path outputs/dense --ternary \\
        --teacher outputs/dense --output_dir outputs/ternary

`--demo` draws scikit-learn's 8x8 digits from captions such as "a bold three slanted left". Text encoder and VAE stay
frozen. `--output_dir` becomes a folder for `PixArtAlphaPipeline.from_pretrained`, after `import diffusers_terdit`,
with the average of the weights, packed where they are ternary. Each `checkpoint-N/` in it holds float weights and
optimizer; `--resume_from_checkpoint latest` goes on in the same bits as a run that never stopped.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"train_text_to_image: interrupted\n") and os._exit(130))

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusers_terdit import TernaryConfig, losses, training
from diffusers_terdit.arguments import (
    Parser,
    at_least,
    color,
    granularity,
    keep_limit,
    not_negative,
    positive,
    seed,
    share,
)
from diffusers_terdit.cli import run_program
from diffusers_terdit.storage.saving import new_file, new_folder


MODEL = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128}
VAE_STEPS = 1500
LOG_NAME = "log.jsonl"


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("data, one of the first two").add_argument
    add(
        "--demo",
        action="store_true",
        help="Train on captioned 8x8 digits, without a pretrained model one of 950,000 weights.",
    )
    add(
        "--train_data_dir",
        type=Path,
        help="Train on this folder of images, with a metadata.jsonl that has file_name and text of each.",
    )
    add("--resolution", type=at_least(1), default=8, help="Scale images to squares of this many pixels.")
    add("--background", type=color, default="white", help="Show this color where images are transparent.")
    add("--dataloader_num_workers", type=at_least(0), default=0, help="Read images in this many more processes.")
    add(
        "--caption_dropout_prob",
        type=share,
        default=0.1,
        help="Train this share of the images with an empty caption, for guidance.",
    )

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="Start from this PixArt-alpha pipeline, a folder or Hub id.")
    add(
        "--pretrained_vae_model_name_or_path",
        help="Take this AutoencoderKL, such as that of a finished run of --demo, and train none.",
    )
    add("--ternary", action="store_true", help="Make the linear layers of the blocks ternary, then train.")
    add(
        "--scale_granularity",
        type=granularity,
        default="tensor",
        help='A ternary scale covers a matrix ("tensor"), a row ("row"), or this many inputs of a row.',
    )
    add(
        "--teacher",
        help="Learn the noise prediction of this pipeline, too, such as the model before it became ternary.",
    )
    add(
        "--distillation_weight",
        type=not_negative,
        default=1.0,
        help="The teacher's part of the loss has this weight, and the data's 1 minus it, at least 0.",
    )

    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=seed, default=0, help="All random numbers of the run follow from this one.")
    add("--max_train_steps", type=at_least(1), default=2000, help="The run has this many optimizer steps.")
    add("--train_batch_size", type=at_least(1), default=64, help="Each process takes this many samples per step.")
    add("--learning_rate", type=not_negative, default=2e-3, help="The highest learning rate of AdamW.")
    add(
        "--lr_scheduler",
        default="wsd",
        choices=["constant", "cosine", "wsd"],
        help="How the learning rate goes on: wsd is constant, then falls to 0 over the last fifth.",
    )
    add("--lr_warmup_steps", type=at_least(0), default=50, help="The learning rate rises from 0 over this many steps.")
    add("--adam_weight_decay", type=not_negative, default=0.0, help="AdamW shrinks matrices by this.")
    add(
        "--max_grad_norm", type=positive, default=2.0, help="A gradient with a larger norm is scaled down to this one."
    )
    add("--ema_decay", type=share, default=0.99, help="The average of the weights, which is exported, has this decay.")
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        help="bf16 computes in bfloat16; weights and average stay float32. If not set, accelerate's setting.",
    )
    add("--gradient_checkpointing", action="store_true", help="Compute activations twice, to keep fewer in memory.")

    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=Path,
        default=Path("text-to-image-model"),
        help="Write pipeline, checkpoints, samples and log into this folder.",
    )
    add(
        "--checkpointing_steps",
        type=at_least(1),
        default=500,
        help="Save a checkpoint to resume from every this many steps.",
    )
    add("--checkpoints_total_limit", type=keep_limit, default=2, help="Keep this many checkpoints; -1 keeps all.")
    add("--resume_from_checkpoint", help='Go on from this folder, or from the "latest" checkpoint in --output_dir.')
    add("--logging_steps", type=at_least(1), default=50, help="Write log.jsonl every this many steps.")
    add("--num_validation_images", type=at_least(1), default=16, help="The grid at the end has this many samples.")
    add("--num_inference_steps", type=at_least(1), default=20, help="Samples take this many steps.")
    add("--guidance_scale", type=not_negative, default=1.5, help="Samples are drawn with this guidance.")

    args = parser.parse_args(argv)
    if args.demo == bool(args.train_data_dir):
        parser.error("pass one of --demo, --train_data_dir")
    if not (args.demo or args.pretrained_model_name_or_path):
        parser.error(
            "--train_data_dir goes with --pretrained_model_name_or_path: text encoder and VAE are not trained"
        )
    return args


# --- data ---


def ink(images: Tensor) -> Tensor:
    """Measure mean brightness: (B, 1, 8, 8) in [0, 1] -> (B,)."""
    return images.flatten(1).mean(1)


def slant(images: Tensor) -> Tensor:
    """Measure columns to the right per row upwards: (B, 1, 8, 8) in [0, 1] -> (B,); 0 is upright."""
    images, place = images[:, 0], torch.arange(8.0) - 3.5  # second moments
    total = images.sum((1, 2)).clamp_min(1e-6)
    right = place - ((images.sum(1) * place).sum(1) / total)[:, None]  # (B, 8)
    down = place - ((images.sum(2) * place).sum(1) / total)[:, None]
    covariance = torch.einsum("bij,bi,bj->b", images, down, right) / total
    variance = torch.einsum("bij,bi->b", images, down.square()) / total
    return -covariance / variance.clamp_min(1e-6)


WORDS = {"ink": (ink, ("thin ", "", "bold ")), "slant": (slant, (" slanted left", "", " slanted right"))}


class CaptionedDigits(Dataset):
    """Captioned digits of scikit-learn: a caption is the digit's name, and words for its ink and slant in its class.

    The lowest and the highest third of the training digits of a class get a word, the middle third none.
    """

    flip = False

    def __init__(self, train: bool):
        digits = training.data.Digits(train)
        self.images, self.digits, self.names = (
            digits.images,
            torch.tensor(digits.labels),
            list(digits.id2label.values()),
        )
        reference = training.data.Digits(train=True)
        classes = torch.tensor(reference.labels)
        thirds = torch.tensor([1 / 3, 2 / 3])
        self.limits = {}  # property -> (10, 2)
        for name, (measure, _) in WORDS.items():
            values = measure((reference.images + 1) / 2)
            self.limits[name] = torch.stack([values[classes == digit].quantile(thirds) for digit in range(10)])
        self.properties = self.measure((self.images + 1) / 2, self.digits)
        numbers = [self.caption(i) for i in range(len(self.digits))]
        self.captions = sorted(
            f"a {bold}{name}{slanted}"
            for name in self.names
            for bold in WORDS["ink"][1]
            for slanted in WORDS["slant"][1]
        )
        self.labels = [self.captions.index(caption) for caption in numbers]

    def measure(self, images: Tensor, digits: Tensor) -> dict[str, Tensor]:
        """Thirds 0, 1 or 2 of ink and slant in a digit's class: images (B, 1, 8, 8) in [0, 1], digits (B,) -> (B,)."""
        return {
            name: (measure(images)[:, None] > self.limits[name][digits]).sum(1) for name, (measure, _) in WORDS.items()
        }

    def caption(self, index: int) -> str:
        """Caption of one digit."""
        bold, slanted = (words[int(self.properties[name][index])] for name, (_, words) in WORDS.items())
        return f"a {bold}{self.names[int(self.digits[index])]}{slanted}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def open_images(folder: Path, channels: int, **options) -> training.data.ImageSamples:
    """Images of a folder, with the captions of its metadata.jsonl: label i means `captions[i]`."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise SystemExit(f'{folder} has no metadata.jsonl; each of its lines is {{"file_name": ..., "text": ...}}.')
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, start=1):
        if not {"file_name", "text"} <= row.keys():
            raise SystemExit(f"{path}, line {number} has no file_name or no text: {row}. Add or remove it.")
    captions = sorted({row["text"] for row in rows})
    numbers = {caption: i for i, caption in enumerate(captions)}
    paths, labels = [folder / row["file_name"] for row in rows], [numbers[row["text"]] for row in rows]
    samples = training.data.ImageSamples(paths, labels, dict(enumerate(captions)), channels=channels, **options)
    samples.captions = captions
    return samples


# --- the demo's model ---


def word_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """One token per word of the captions."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    longest = max(len(caption.split()) for caption in captions) + 1
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **special)


def train_vae(images: Tensor, steps: int = VAE_STEPS) -> AutoencoderKL:
    """An AutoencoderKL for 8x8 pixels, (4, 4, 4) latents, trained on images (N, 1, 8, 8) in [-1, 1]."""
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    for step in tqdm(range(steps), desc="VAE"):
        order = training.random.sample_order(len(images), 0, step * 64 // len(images))
        rows = torch.from_numpy(order[step * 64 % len(images) :][:64])
        distribution = vae.encode(images[rows]).latent_dist
        noise = training.random.normal(0, "posterior", range(step * 64, step * 64 + len(rows)), (4, 4, 4))
        decoded = vae.decode(distribution.mean + distribution.std * noise).sample
        loss = (decoded - images[rows]).square().mean() + 1e-5 * distribution.kl().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * training.recipes.learning_rate_factor(step, "cosine", steps, warmup_steps=20)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        deviation = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    return vae.eval().requires_grad_(False)


def new_transformer(latents: tuple[int, int, int], caption_channels: int) -> PixArtTransformer2DModel:
    """A fresh PixArt whose output begins at zero, as DiT's does."""
    transformer = PixArtTransformer2DModel(
        **MODEL, in_channels=latents[0], out_channels=latents[0], sample_size=latents[1], patch_size=1,
        caption_channels=caption_channels, use_additional_conditions=False,
    )  # fmt: skip
    for layer in (transformer.proj_out, transformer.adaln_single.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def demo_pipeline(vae: AutoencoderKL, captions: list[str]) -> PixArtAlphaPipeline:
    """A pipeline around a fresh transformer; its T5 stays as random as it is, so that words are fixed vectors."""
    tokenizer = word_tokenizer(captions)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae,
        transformer=new_transformer((4, 4, 4), config.d_model),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def open_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> PixArtAlphaPipeline:
    """Open the pipeline that training starts from, or make that of the demo."""
    if args.pretrained_model_name_or_path:
        pipe = PixArtAlphaPipeline.from_pretrained(args.pretrained_model_name_or_path)
    else:
        digits = CaptionedDigits(train=True)
        saved = Path(args.pretrained_vae_model_name_or_path or args.output_dir / "vae")
        set_seed(0)  # every run has the same frozen parts
        with accelerator.main_process_first():
            if not (args.pretrained_vae_model_name_or_path or saved.is_dir()):
                vae = train_vae(digits.images)
                with new_folder(saved) as partial_folder:
                    vae.save_pretrained(partial_folder)
        vae = AutoencoderKL.from_pretrained(saved)
        set_seed(0)
        pipe = demo_pipeline(vae, digits.captions)
        set_seed(args.seed)
        pipe.transformer = new_transformer((4, 4, 4), pipe.text_encoder.config.d_model)
    config = pipe.transformer.config
    if config.use_additional_conditions:
        raise SystemExit(
            f"{args.pretrained_model_name_or_path} is told size and aspect ratio, which this script has not; take one"
            " of 512 px."
        )
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise SystemExit(
            f"This script trains the prediction of noise, not {pipe.scheduler.config.prediction_type!r}. Pass another"
            " --pretrained_model_name_or_path."
        )
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).to(accelerator.device)
    return pipe


# --- training ---


def sequence_length(pipe: PixArtAlphaPipeline) -> int:
    return min(pipe.tokenizer.model_max_length, 120)  # 120: PixArt's


@torch.no_grad()
def encode(pipe: PixArtAlphaPipeline, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """Turn captions into the text arguments of the transformer."""
    options = {"device": device, "max_sequence_length": sequence_length(pipe)}
    embeds, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, **options)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> Tensor:
    conditions = {"resolution": None, "aspect_ratio": None}
    return model(noisy, timestep=timesteps, added_cond_kwargs=conditions, return_dict=False, **text)[0].float()


def compute_loss(model, scheduler, args, batch: dict[str, Tensor], text: dict[str, Tensor], teacher=None) -> Tensor:
    """Mean loss of a batch of latents."""
    clean = batch["samples"]
    noisy, noise, when = losses.training_target(scheduler, clean, batch["noise"], batch["time"])
    output = predict(model, noisy, when, text)
    loss = losses.diffusion_loss(output, clean, noise, when, scheduler.alphas_cumprod)
    if teacher is not None:
        with torch.no_grad():
            wanted = predict(teacher, noisy, when, text)
        loss = loss + args.distillation_weight * losses.mean_squared_error(output, wanted)
    return loss.mean()


def sample_images(pipe: PixArtAlphaPipeline, captions: list[str], seeds: list[int], args, output_type: str = "pt"):
    """One image per caption, each from its own seed."""
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return pipe(
        captions,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=side,
        width=side,
        output_type=output_type,
        max_sequence_length=sequence_length(pipe),
        use_resolution_binning=False,
        clean_caption=False,
    ).images


def open_samples(args: argparse.Namespace, pipe: PixArtAlphaPipeline) -> Dataset:
    """Return training pictures with `captions`, the text of each label."""
    channels = pipe.vae.config.in_channels
    if not args.demo:
        options = {"resolution": args.resolution, "background": args.background}
        return open_images(args.train_data_dir, channels, **options)
    if channels != 1:
        raise SystemExit(f"--demo has pictures of 1 channel, this VAE takes {channels}; pass --train_data_dir.")
    return CaptionedDigits(train=True)


def resume(folder: Path, args: argparse.Namespace, batch_size: int, *state: nn.Module | torch.optim.Optimizer) -> int:
    """Load model, average and optimizer from a checkpoint; return its step."""
    saved = training.checkpointing.load(folder, *state)
    if (saved["batch_size"], saved["seed"]) != (batch_size, args.seed):
        raise SystemExit(
            f"{folder} was trained with {saved['batch_size']} samples per step and seed {saved['seed']}, this run"
            f" has {batch_size} and {args.seed}. Pass the same, or another --output_dir."
        )
    return saved["step"]


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: PixArtAlphaPipeline,
    ema_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Dataset,
    step: int,
) -> None:
    """Train from `step` on; write a log, and checkpoints of model, average and optimizer."""
    device, main_process = accelerator.device, accelerator.is_main_process
    batch_size = args.train_batch_size * accelerator.num_processes
    transformer = pipe.transformer
    model = accelerator.prepare(transformer)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    teacher = None
    if args.teacher:
        teacher = PixArtTransformer2DModel.from_pretrained(args.teacher, subfolder="transformer")
        teacher.eval().requires_grad_(False).to(device)
    codec = training.data.LatentCodec(pipe.vae)
    latent_shape = codec.latent_shape(args.resolution, pipe.vae.config.in_channels)
    captions = [*samples.captions, ""]  # the label after the last one means a dropped caption
    dropout = (len(samples.captions), args.caption_dropout_prob)
    examples = training.data.TrainingExamples(samples, args.seed, latent_shape, *dropout)
    positions = training.random.run_positions(
        step, args.max_train_steps, args.train_batch_size, 1, accelerator.process_index, accelerator.num_processes
    )
    batches = iter(DataLoader(examples, batch_sampler=positions, num_workers=args.dataloader_num_workers))
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
    window, started = [], time.perf_counter()
    while step < args.max_train_steps:
        factor = training.recipes.learning_rate_factor(
            step, args.lr_scheduler, args.max_train_steps, args.lr_warmup_steps, args.max_train_steps // 5
        )
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor * group["lr_factor"]
        batch = codec.encode({key: value.to(device) for key, value in next(batches).items()})
        text = encode(pipe, [captions[label] for label in batch["class_labels"].tolist()], device)
        with accelerator.autocast():
            loss = compute_loss(model, scheduler, args, batch, text, teacher)
        accelerator.backward(loss)
        grad_norm = float(training.recipes.clip_grad_norm(transformer, args.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"The gradient is {grad_norm} at step {step}, loss {loss.item()}. Lower --learning_rate or raise"
                " --lr_warmup_steps."
            )
        optimizer.step()
        optimizer.zero_grad()
        training.recipes.update_average(ema_model, transformer, training.recipes.average_decay(step, args.ema_decay))
        step += 1
        window.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        progress.update()
        progress.set_postfix(loss=f"{window[-1]:.4f}")
        done = step == args.max_train_steps
        if main_process and (step % args.logging_steps == 0 or done):
            rate = len(window) * batch_size / (time.perf_counter() - started)
            record = {"step": step, "loss": sum(window) / len(window), "lr": args.learning_rate * factor}
            with (args.output_dir / LOG_NAME).open("a") as file:
                file.write(json.dumps({**record, "grad_norm": grad_norm, "images_per_second": rate}) + "\n")
            window, started = [], time.perf_counter()
        if step % args.checkpointing_steps == 0 or done:
            state = {"step": step, "batch_size": batch_size, "seed": args.seed}
            checkpoint = args.output_dir / f"checkpoint-{step}"
            training.checkpointing.save(checkpoint, transformer, ema_model, optimizer, state, main_process)
            if main_process:
                training.checkpointing.rotate(args.output_dir, args.checkpoints_total_limit)
            accelerator.wait_for_everyone()
    progress.close()


def export(args: argparse.Namespace, pipe: PixArtAlphaPipeline, ema_model: nn.Module, samples: Dataset) -> None:
    """Save a pipeline with the average, packed where it is ternary, and pictures that it draws."""
    transformer = copy.deepcopy(ema_model).cpu()
    if args.ternary:
        transformer.dequantize()  # its weights are scale * T, which `lossless` takes over as they are
        TernaryConfig(scale_granularity=args.scale_granularity, lossless=True).quantize(transformer)
    pipe = pipe.to("cpu")
    pipe.transformer = transformer.eval()
    training.export.save_pipeline(pipe, args.output_dir)
    shown = [samples.captions[samples.labels[i % len(samples)]] for i in range(args.num_validation_images)]
    images = sample_images(pipe, shown, list(range(len(shown))), args, "pil")
    (args.output_dir / "samples").mkdir(exist_ok=True)
    grid = training.export.image_grid(images, labels=shown, min_side=128)
    with new_file(args.output_dir / "samples" / f"step-{args.max_train_steps}.png") as partial:
        grid.save(partial)
    print(f"{args.output_dir} is a pipeline: PixArtAlphaPipeline.from_pretrained({str(args.output_dir)!r})")


def main(argv=None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}, {accelerator.device}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = training.checkpointing.find(args.output_dir)
    if found and not args.resume_from_checkpoint:
        raise SystemExit(
            f"{args.output_dir} holds {found[-1].name}. Pass --resume_from_checkpoint latest to go on, or another"
            " --output_dir."
        )

    # 1. Model, average, optimizer
    pipe = open_pipeline(args, accelerator)
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer.train()
    if args.ternary:
        TernaryConfig(scale_granularity=args.scale_granularity, weight_format="float").quantize(transformer)
    transformer.to(accelerator.device)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ema_model = copy.deepcopy(transformer).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(training.recipes.parameter_groups(transformer, args.adam_weight_decay))
    samples = open_samples(args, pipe)

    # 2. Resume
    step = 0
    if args.resume_from_checkpoint != "latest":
        found = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    if found:
        batch_size = args.train_batch_size * accelerator.num_processes
        step = resume(found[-1], args, batch_size, transformer, ema_model, optimizer)
    if accelerator.is_main_process:
        training.checkpointing.cut_log(args.output_dir / LOG_NAME, step)

    # 3. Train and export
    train(args, accelerator, pipe, ema_model, optimizer, samples, step)
    if accelerator.is_main_process:
        export(args, pipe, ema_model, samples)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_program(Path(__file__).stem, main))
