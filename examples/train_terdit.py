"""Train a class-conditional ternary diffusion transformer (TerDiT, https://arxiv.org/abs/2405.14854).

    python examples/train_terdit.py --demo --output_dir outputs/digits
    accelerate launch examples/train_terdit.py --preset terdit-600m --train_latents_dir latents --output_dir out/600m

`--output_dir` becomes a packed pipeline folder for `TerDiTPipeline.from_pretrained`. Each `checkpoint-N/` in it holds
float weights and optimizer: `--resume_from_checkpoint latest` continues bit for bit as a run that never stopped.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import os
import pkgutil
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from urllib.parse import urlsplit


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"train_terdit: interrupted\n") and os._exit(130))

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, evaluation, losses, training
from diffusers_terdit.arguments import (
    Parser,
    at_least,
    color,
    column,
    granularity,
    keep_limit,
    not_negative,
    number,
    positive,
    seed,
    share,
)
from diffusers_terdit.cli import run_program
from diffusers_terdit.hub.model_card import printable
from diffusers_terdit.hub.push import push_saved
from diffusers_terdit.ops import held_codes
from diffusers_terdit.pipelines.schedulers import training_scheduler
from diffusers_terdit.storage.saving import new_file, output_folder, writing
from diffusers_terdit.storage.weights import read_json


logger = logging.getLogger(__name__)
TIMED_STEPS = 10  # after which a run says how long it will take
# What decides the weights, besides data, model, batch and seed: a resumed run says what is new.
RECIPE = (
    "flow_matching", "weighting_scheme", "logit_mean", "logit_std", "learn_sigma", "snr_gamma", "class_dropout_prob",
    "max_train_steps", "optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps",
    "lr_step_rules", "scale_lr_factor", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "use_8bit_adam", "max_grad_norm", "ema_decay", "mixed_precision",
)  # fmt: skip
COPY_ROOM = 4  # times what a checkpoint holds must be free for a copy of it


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data, one of the first four").add_argument
    add("--demo", action="store_true", help="Train a model of 267 thousand weights on scikit-learn's 8x8 digits.")
    add(
        "--train_data_dir",
        help="Train on the images of this folder: a folder per class, images without classes, or IDX files like"
        " MNIST's. The preset tiny trains on IDX files in gray, at their own size.",
    )
    add(
        "--dataset_name",
        help="Train on this data set: a name on the Hub, a folder (save_to_disk's, too), or a parquet file.",
    )
    add("--train_latents_dir", help="Train on the latents that cache_latents.py wrote to this folder.")
    add("--dataset_config_name", help="Take this configuration of --dataset_name.")
    add("--dataset_split", default="train", help="Take this split of --dataset_name.")
    add("--streaming", action="store_true", help="Read --dataset_name shard by shard; every process reads all of it.")
    add("--image_column", default="image", help="Take the images from this column of --dataset_name.")
    add(
        "--label_column",
        type=column,
        default="label",
        help="Take the classes from this column; none trains without classes.",
    )
    add(
        "--label_order",
        default="value",
        choices=["value", "text"],
        help='Number classes whose names are numbers by value, or as text, "10" before "2".',
    )
    add("--resolution", type=at_least(1), help="Scale images to squares of this many pixels.")
    add("--background", type=color, default="white", help="Show this color where images are transparent.")
    add("--random_flip", action="store_true", help="Mirror half of the images, left to right, at random.")
    add("--dataloader_num_workers", type=at_least(0), default=0, help="Read images in this many extra processes.")
    add("--pretrained_vae_model_name_or_path", help="Train on latents of this AutoencoderKL, not on pixels.")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    presets = [name for name in training.recipes.PRESETS if name != "demo"]
    add(
        "--preset",
        choices=presets,
        help="Take sizes and recipe from this preset. On a laptop: tiny for 32 pixels, small for 64, medium for"
        " latents. The others are for the paper's sizes. Other flags replace single values. If not set: tiny, or"
        " medium for latents.",
    )
    add(
        "--in_channels",
        type=int,
        default=3,
        choices=[1, 3],
        help="Train on gray (1) or color (3) pixels, if no VAE is used.",
    )
    add("--patch_size", type=at_least(1), help="A token is a square with this many pixels or latents on a side.")
    add("--num_layers", type=at_least(1), help="The transformer has this many blocks.")
    add("--num_attention_heads", type=at_least(1), help="Each block has this many attention heads.")
    add(
        "--attention_head_dim",
        type=at_least(1),
        help="Each head has this many channels; heads times this is the width.",
    )
    add(
        "--ffn_dim",
        type=at_least(1),
        help="The feed-forward layers have this width. If neither this nor the preset sets it, or if the"
        " model has another width than the preset's: 8/3 of that, rounded up to a multiple of 256.",
    )
    add(
        "--pos_embed_type",
        choices=["rope", "rope+sincos2d"],
        help="Encode positions by rotation alone, as in the paper, or with a fixed embedding, too, for small models.",
    )
    add("--adaln_norm", type=boolean, default=True, help="false leaves out the RMSNorm that the paper adds to adaLN.")
    add(
        "--initialization",
        choices=["small_gain", "reference"],
        help="Start from positive scales and small gains of adaLN, or as the authors of the paper do.",
    )
    add(
        "--scale_granularity",
        type=granularity,
        default="tensor",
        help='A ternary scale covers a matrix ("tensor"), a row ("row"), or this many inputs of a row.',
    )
    add("--activation_bits", type=int, choices=[8], help="Train with 8-bit inputs of the ternary layers.")
    add(
        "--ternary",
        type=boolean,
        default=True,
        help="false trains full precision, a baseline on the same data and noise.",
    )
    add(
        "--init_from",
        help="Start from this pipeline, model, bundled name or checkpoint-N. Its sizes replace the flags above.",
    )
    add(
        "--ternary_warmup_steps",
        type=at_least(0),
        default=0,
        help="Blend full precision into ternary over this many steps, with --init_from.",
    )
    add("--teacher", help="Also learn the predictions of this pipeline, model or bundled name.")
    add("--distillation_weight", type=not_negative, default=1.0, help="Weight of the teacher's part of the loss.")


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss").add_argument
    add(
        "--flow_matching",
        type=boolean,
        nargs="?",
        const=True,
        help="Train rectified flow instead of the noise of DDPM, as the paper does (false).",
    )
    add(
        "--weighting_scheme",
        choices=["logit_normal", "none"],
        help="Where between picture and noise flow matching trains: more often in the middle (logit_normal), or"
        " everywhere alike (none). If not set: logit_normal.",
    )
    add("--logit_mean", type=number, default=0.0, help="Mean of the logit of the noise's share, for logit_normal.")
    add("--logit_std", type=positive, default=1.0, help="Standard deviation of that logit.")
    add(
        "--learn_sigma",
        type=boolean,
        default=True,
        help="false trains DDPM on the squared error alone, without a learned variance. Flow matching has none.",
    )
    add("--snr_gamma", type=positive, help="Weight the error of DDPM by min-SNR; 5 is usual.")
    add(
        "--class_dropout_prob",
        type=share,
        default=0.1,
        help="Train this share of the examples without their label, for guidance.",
    )


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=seed, default=0, help="All random numbers of the run follow from this one.")
    add("--max_train_steps", type=at_least(1), help="The run has this many optimizer steps.")
    add("--train_batch_size", type=at_least(1), help="Each process takes this many samples per accumulation step.")
    add(
        "--gradient_accumulation_steps",
        type=at_least(1),
        help="Add up the gradients of this many batches. If not set: 1, or what --total_batch_size needs.",
    )
    add(
        "--total_batch_size",
        type=at_least(1),
        help="Take this many samples per optimizer step; this sets the accumulation.",
    )
    add(
        "--optimizer",
        choices=["adamw", "muon"],
        help="muon makes the singular values of a step's matrices about equal; it trains the blocks' matrices, and"
        " AdamW the rest.",
    )
    add("--learning_rate", type=not_negative, help="The highest learning rate.")
    add(
        "--lr_scheduler",
        choices=["constant", "cosine", "wsd", "piecewise_constant"],
        help="How the learning rate changes. wsd keeps it constant, then lowers it to 0 over --lr_decay_steps.",
    )
    add(
        "--lr_warmup_steps",
        type=at_least(0),
        help="The learning rate rises from 0 over this many steps. If neither this nor the preset sets it: a"
        " twentieth of the run.",
    )
    add("--lr_decay_steps", type=at_least(0), help="wsd falls over this many steps. If not set: a fifth of the run.")
    add(
        "--lr_step_rules",
        help='piecewise_constant follows these rules: "1:1550000,0.2" means a fifth from step 1,550,000 on.',
    )
    add("--scale_lr_factor", type=not_negative, help="The ternary scales learn at this multiple of the learning rate.")
    add("--adam_beta1", type=share, default=0.9, help="AdamW averages gradients with this decay.")
    add("--adam_beta2", type=share, help="AdamW averages squared gradients with this decay.")
    add(
        "--adam_weight_decay",
        type=not_negative,
        default=0.0,
        help="AdamW shrinks matrices by this; it never shrinks scales, norms, biases and embeddings.",
    )
    add("--adam_epsilon", type=positive, default=1e-8, help="AdamW adds this to its divisor.")
    add(
        "--use_8bit_adam",
        action="store_true",
        help="Keep AdamW's averages in 8 bits instead of 32. Needs bitsandbytes, and does not work with --fsdp.",
    )
    add(
        "--max_grad_norm", type=positive, default=2.0, help="A gradient with a larger norm is scaled down to this one."
    )
    add(
        "--ema_decay",
        type=share,
        help="The average of the weights, which is exported, has this decay. If neither this nor the preset sets it:"
        " 1 - 15 / --max_train_steps, at most 0.9999.",
    )
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        help="bf16 computes in bfloat16; weights, average and loss stay float32. If not set, accelerate's setting.",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="Save memory: keep fewer activations, and compute the others twice.",
    )
    add(
        "--torch_compile",
        action="store_true",
        help="Compile the transformer blocks, which takes a minute or two. The run then says how much faster it is.",
    )
    add("--fsdp", action="store_true", help="Shard weights, average and optimizer over the processes.")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=Path,
        default=Path("terdit-model"),
        help="Write pipeline, checkpoints, samples and log into this folder.",
    )
    add(
        "--export_dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="Save the weights that are not ternary in this type.",
    )
    add("--checkpointing_steps", type=at_least(1), help="Save a checkpoint to resume from every this many steps.")
    add("--checkpoints_total_limit", type=keep_limit, default=2, help="Keep this many checkpoints; -1 keeps all.")
    add("--resume_from_checkpoint", help='Resume from this folder, or from the "latest" checkpoint in --output_dir.')
    add("--logging_steps", type=at_least(1), default=100, help="Write log.jsonl and trackers every this many steps.")
    add(
        "--report_to",
        help="Also log to this tracker: tensorboard, wandb, trackio, ... With none, only log.jsonl is written.",
    )
    add(
        "--validation_steps",
        type=at_least(1),
        help="Draw a grid of samples, and measure the error at fixed noise, every this many steps.",
    )
    add("--num_validation_images", type=at_least(1), default=40, help="The grid has this many samples.")
    add(
        "--num_inference_steps",
        type=at_least(1),
        help="Draw samples in this many steps, which the saved model then recommends.",
    )
    add(
        "--guidance_scale",
        type=not_negative,
        default=1.5,
        help="Draw samples with this guidance, which the saved model then recommends.",
    )
    add(
        "--feature_network",
        help="A network for --frechet_steps, as module:function. It maps (B, C, H, W) in [0, 1] to (B, D) features.",
    )
    add(
        "--frechet_steps",
        type=at_least(0),
        help="Measure the Frechet distance to the training images every this many steps, with --feature_network.",
    )
    add("--num_frechet_images", type=at_least(1), default=1000, help="Measure it on this many samples.")
    add("--push_to_hub", action="store_true", help="Upload the pipeline to the Hub at the end.")
    add(
        "--hub_push_steps",
        type=at_least(1),
        help="With --push_to_hub, also upload the pipeline every this many steps while training goes on.",
    )
    add("--hub_model_id", help="Upload to this repository. If not set: named like --output_dir.")
    add("--hub_token", help="Upload with this token. If not set: that of `hf auth login`.")
    add("--license", help="Name this license in the model card.")


def parse_args(argv=None) -> argparse.Namespace:
    """Parse the flags; a preset replaces defaults, and what is passed replaces the preset."""
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_loss_arguments(parser)
    add_optimization_arguments(parser)
    add_output_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    latents = known.train_latents_dir or known.pretrained_vae_model_name_or_path
    preset = "demo" if known.demo else known.preset or ("medium" if latents else "tiny")
    parser.set_defaults(**training.recipes.PRESETS[preset])
    if preset == "tiny" and known.train_data_dir and training.idx.holds(known.train_data_dir):
        parser.set_defaults(resolution=training.idx.resolution(known.train_data_dir), in_channels=1)
    args = parser.parse_args(argv)
    of_preset = parser.get_default("num_attention_heads") * parser.get_default("attention_head_dim")
    if not known.ffn_dim and args.num_attention_heads * args.attention_head_dim != of_preset:
        args.ffn_dim = None  # the preset's belongs to another width
    sources = [args.demo, args.train_data_dir, args.dataset_name, args.train_latents_dir]
    if sum(bool(source) for source in sources) != 1:
        parser.error("pass one of --demo, --train_data_dir, --dataset_name, --train_latents_dir")
    if not latents and args.resolution % args.patch_size:
        parser.error(f"--resolution {args.resolution} must be a multiple of --patch_size {args.patch_size}")
    if args.demo and args.preset:
        parser.error("--demo brings its own model; leave out --preset")
    if args.demo and (args.resolution, args.in_channels) != (8, 1):
        parser.error("--demo trains on gray digits of 8 x 8 pixels; leave out --resolution and --in_channels")
    if args.gradient_accumulation_steps and known.total_batch_size:
        parser.error("pass one of --gradient_accumulation_steps, --total_batch_size")
    if args.gradient_accumulation_steps:  # instead of a preset's batch
        args.total_batch_size = None
    args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1
    if args.streaming and (not args.dataset_name or args.dataloader_num_workers):
        parser.error("--streaming goes with --dataset_name and --dataloader_num_workers 0")
    if args.frechet_steps and (args.streaming or not args.feature_network):
        parser.error("--frechet_steps needs --feature_network, and data that is not streamed (0 switches it off)")
    if args.use_8bit_adam and args.fsdp:
        parser.error("--use_8bit_adam cannot be sharded: leave out --fsdp, or take the AdamW of 32 bits")
    if args.use_8bit_adam and known.optimizer == "muon":
        parser.error("--use_8bit_adam is for AdamW alone: leave it out, or pass --optimizer adamw")
    if args.use_8bit_adam:  # instead of a preset's optimizer
        args.optimizer = "adamw"
    if args.activation_bits and not args.ternary:
        parser.error("--activation_bits is for ternary models, not --ternary false")
    if args.flow_matching and args.snr_gamma:
        parser.error("--snr_gamma is for DDPM: pass --flow_matching false, too")
    if args.weighting_scheme == "logit_normal" and not args.flow_matching:
        parser.error("--weighting_scheme logit_normal is for flow matching: pass --flow_matching, too")
    args.weighting_scheme = args.weighting_scheme or ("logit_normal" if args.flow_matching else "none")
    if args.ternary_warmup_steps and not (args.ternary and args.init_from):
        parser.error(
            "--ternary_warmup_steps goes with --init_from a full-precision model, and not with --ternary false"
        )
    if args.hub_push_steps and not args.push_to_hub:
        parser.error("--hub_push_steps goes with --push_to_hub")
    args.report_to = None if args.report_to == "none" else args.report_to
    if args.lr_decay_steps is None:
        args.lr_decay_steps = args.max_train_steps // 5
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = args.max_train_steps // 20
    if args.ema_decay is None:
        args.ema_decay = training.recipes.decay_for(args.max_train_steps)
    args.learn_sigma = args.learn_sigma and not args.flow_matching
    return args


def prediction_type(args: argparse.Namespace) -> str:
    """Return what the model is trained to predict, in diffusers' words."""
    return "flow_prediction" if args.flow_matching else "epsilon"


def checkpoint_folder(args: argparse.Namespace, found: list[Path]) -> Path | None:
    """Return what --resume_from_checkpoint means: the newest of the checkpoints found, a folder, or one of them."""
    name = args.resume_from_checkpoint
    if not name or name == "latest":
        return found[-1] if name and found else None
    path = Path(name)
    for folder in (args.output_dir / path, path) if len(path.parts) == 1 else (path,):
        if training.checkpointing.is_checkpoint(folder):
            return folder
    held = ", ".join(path.name for path in found) or "none"
    raise SystemExit(f"--resume_from_checkpoint {name}: that is no checkpoint. {args.output_dir} holds {held}.")


def open_samples(args: argparse.Namespace, channels: int):
    """Open the training data: (tensor, label) by index; or, streaming, the `datasets` stream itself."""
    options = {"resolution": args.resolution, "channels": channels, "flip": args.random_flip}
    options["background"] = args.background
    if args.demo:
        return training.data.Digits(train=True)
    if args.train_latents_dir:
        return training.data.LatentSamples(args.train_latents_dir)
    if args.train_data_dir and training.idx.holds(args.train_data_dir):
        return training.data.ImageSamples.from_idx(args.train_data_dir, **options)
    if args.train_data_dir:
        for name in ("metadata.jsonl", "metadata.csv"):
            if (Path(args.train_data_dir) / name).exists():
                logger.warning(
                    f"{Path(args.train_data_dir) / name} is not read. To train on a column of it, pass --dataset_name"
                    f" {args.train_data_dir} --label_column NAME instead of --train_data_dir."
                )
        return training.data.ImageSamples.from_folder(args.train_data_dir, args.label_order, **options)
    dataset = training.data.open_dataset(
        args.dataset_name, args.dataset_config_name, args.dataset_split, args.streaming
    )
    if args.streaming:
        columns = (args.image_column, args.label_column, args.seed)
        return training.data.ShardedStream(dataset, *columns, args.dataset_name, **options)
    columns = (args.image_column, args.label_column)
    return training.data.ImageSamples.from_dataset(dataset, *columns, args.dataset_name, args.label_order, **options)


def open_held_out(args: argparse.Namespace, channels: int):
    """Open the images that come with the training data to measure errors on, or return `None`."""
    if args.demo:
        return training.data.Digits(train=False)
    if args.train_data_dir and training.idx.holds(args.train_data_dir, "t10k"):
        options = {"resolution": args.resolution, "channels": channels}
        return training.data.ImageSamples.from_idx(args.train_data_dir, "t10k", **options)
    return None


def build_transformer(
    args: argparse.Namespace,
    sample_size: int,
    in_channels: int,
    num_classes: int,
    check_memory: Callable[[TerDiTTransformer2DModel], None],
) -> TerDiTTransformer2DModel:
    """Return a fresh model, or one that starts from `--init_from`; `check_memory` sees it before it takes memory."""
    config = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "class_dropout_prob": args.class_dropout_prob,
        "learn_sigma": args.learn_sigma,
        "prediction_type": prediction_type(args),
        "ternary": args.ternary,
        "activation_bits": args.activation_bits,
    }
    if not args.init_from:
        names = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "pos_embed_type")
        names += ("adaln_norm", "initialization", "scale_granularity")
        build = partial(TerDiTTransformer2DModel, **config, **{name: getattr(args, name) for name in names})
    else:
        source = training.initialize.load_transformer(args.init_from)
        if source.config.prediction_type not in (None, prediction_type(args)):
            logger.warning(
                f"{args.init_from} predicts {source.config.prediction_type}, this run {prediction_type(args)}"
            )
        build = partial(TerDiTTransformer2DModel.from_config, source.config, **config, weight_format="float")
    with torch.device("meta"):
        check_memory(build())
    set_seed(args.seed)
    transformer = build()
    if args.init_from:
        fresh = training.initialize.transfer_weights(source, transformer)
        logger.info(f"started from {args.init_from}" + (f", but for {', '.join(fresh)}" if fresh else ""))
    return transformer


def tokens_of(model: TerDiTTransformer2DModel) -> int:
    return (model.config.sample_size // model.config.patch_size) ** 2


class Trainer:
    """A training run in its folder: data, model, average, optimizer, and how many steps they have taken."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.device, self.is_main_process = accelerator.device, accelerator.is_main_process
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.step, self.stop_request = 0, None
        self.reports: list[tuple[int, Tensor]] = []  # of steps: loss, norm of the gradient, request to stop
        self.upload: Thread | None = None
        self.writer = training.checkpointing.Writer()
        self.log_path, self.draws_log = args.output_dir / "log.jsonl", True
        found = training.checkpointing.find(args.output_dir)
        if found and not args.resume_from_checkpoint:
            raise SystemExit(
                f"{args.output_dir} holds {found[-1].name}. Pass --resume_from_checkpoint latest to go on, or another"
                " --output_dir."
            )
        self.open_data()
        self.build_models()
        self.changes: list[str] = []  # of the recipe, since the run began
        self.resumed_from = checkpoint_folder(args, found)
        if self.resumed_from:
            self.resume(self.resumed_from)
        self.last_checkpoint = self.step
        if self.is_main_process:
            training.checkpointing.cut_log(self.log_path, self.step)  # a killed run writes on after its last save
            training.checkpointing.rotate(args.output_dir, args.checkpoints_total_limit)  # or ends before it removes
        if args.report_to:
            accelerator.init_trackers("train_terdit", config=tracked(args))

    def open_data(self) -> None:
        """Open the data (pixels, images to encode, or cached latents), and say which example is at each position."""
        args, self.vae = self.args, None
        if args.pretrained_vae_model_name_or_path:
            vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path)
            self.vae = vae.requires_grad_(False).to(self.device)
        channels = 3 if self.vae is not None else args.in_channels
        self.samples, self.held_out = open_samples(args, channels), open_held_out(args, channels)
        self.codec = training.data.LatentCodec(self.vae, getattr(self.samples, "info", None))
        if args.frechet_steps and not self.codec.decodes:
            raise SystemExit(
                "--frechet_steps shows images to a network: pass --pretrained_vae_model_name_or_path, too."
            )
        self.latent_shape = self.codec.latent_shape(args.resolution, args.in_channels)
        self.num_classes = max(1, len(self.samples.id2label))
        if note := training.data.numbering_note(self.samples.id2label):
            logger.info(note)
        if not self.samples.id2label:
            logger.info("no classes: the model is unconditional, without label dropout and guidance")
            args.class_dropout_prob = 0.0
        if not args.class_dropout_prob:  # guidance compares with a label that was never trained
            args.guidance_scale = 1.0
        self.examples = training.data.TrainingExamples(
            self.samples,
            args.seed,
            self.latent_shape,
            self.num_classes,
            args.class_dropout_prob,
            continuous_time=args.flow_matching,
            logit_normal=(args.logit_mean, args.logit_std) if args.weighting_scheme == "logit_normal" else None,
        )

    def build_models(self) -> None:
        """Build the model, its average, its optimizer, and the networks that judge it."""
        args, device = self.args, self.device
        self.teacher = None
        if args.teacher:
            self.teacher = training.initialize.load_transformer(args.teacher).requires_grad_(False).to(device)
            if self.teacher.config.num_classes != self.num_classes:
                raise SystemExit(
                    f"--teacher knows {self.teacher.config.num_classes} classes, the data has {self.num_classes}. Pass"
                    " a teacher of these."
                )
            if self.teacher.config.prediction_type not in (None, prediction_type(args)):
                raise SystemExit(
                    f"--teacher predicts {self.teacher.config.prediction_type}, this run {prediction_type(args)}. Pass"
                    f" --flow_matching {'false' if args.flow_matching else 'true'}, or another teacher."
                )
        channels, _, size = self.latent_shape
        transformer = build_transformer(args, size, channels, self.num_classes, self.check_memory)
        self.transformer = transformer.train().to(device)
        if args.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.ema_model = copy.deepcopy(self.transformer).requires_grad_(False).eval()
        self.set_strength = None
        if args.ternary_warmup_steps:
            self.set_strength = training.initialize.gradual_ternarization(self.transformer)
        compilers = {"win32": "cl", "darwin": "clang++"}
        compiler = os.environ.get("CXX", compilers.get(sys.platform, "g++"))
        if args.torch_compile and device.type == "cpu" and not shutil.which(compiler.split()[0]):
            raise SystemExit(
                f"--torch_compile needs a C++ compiler on a CPU, and there is no {compiler}. Install it, or leave the"
                " flag out."
            )
        if args.fsdp:
            if args.torch_compile:
                self.transformer.compile_repeated_blocks()
            training.sharding.shard_model(self.transformer, device.type)
            training.sharding.shard_model(self.ema_model, device.type)
        muon = args.optimizer == "muon"
        self.optimizer = self.optimizer_class()(
            training.recipes.parameter_groups(self.transformer, args.adam_weight_decay, args.scale_lr_factor, muon),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        # `model` is what runs, with DDP around it; `transformer` is what is saved.
        self.model = self.transformer if args.fsdp else self.accelerator.prepare(self.transformer)
        self.scheduler = training_scheduler(args.learn_sigma, args.flow_matching)
        self.network = None
        if args.feature_network:
            self.network = pkgutil.resolve_name(args.feature_network)().eval().to(device)

    def optimizer_class(self) -> Callable[..., torch.optim.Optimizer]:
        """Return the class of the optimizer."""
        if not self.args.use_8bit_adam:
            kind = training.muon.Muon if self.args.optimizer == "muon" else torch.optim.AdamW
            return partial(kind, fused=self.device.type in ("cpu", "cuda"))
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise SystemExit(f"--use_8bit_adam needs bitsandbytes: pip install bitsandbytes ({error})") from error
        return AdamW8bit

    def check_memory(self, model: TerDiTTransformer2DModel) -> None:
        """Estimate the memory that this run needs; refuse it if that is more than 80 % of what is free."""
        args, processes = self.args, self.accelerator.num_processes
        needed = training.memory.training_bytes(
            model,
            args.train_batch_size,
            args.mixed_precision == "bf16",
            args.gradient_checkpointing,
            processes if args.fsdp else 1,
            2 if args.use_8bit_adam else 4 if args.optimizer == "muon" else 8,
        )
        if self.vae is not None and not self.codec.cache:
            needed += training.memory.encoder_bytes(self.vae, args.train_batch_size, args.resolution)
        needed += getattr(self.samples, "kept_bytes", 0) * max(1, args.dataloader_num_workers)
        if self.device.type == "cpu":
            needed *= processes
        self.memory, free = needed, training.memory.free_bytes(self.device)
        if free is not None and needed > 0.8 * free:
            raise SystemExit(
                f"This run would take about {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free, and it may"
                f" take 80 % of them. It has {args.train_batch_size} samples of {tokens_of(model):,} tokens at once,"
                f" in {model.config.num_layers} blocks. Lower --train_batch_size and raise"
                " --gradient_accumulation_steps, raise --patch_size, pass --gradient_checkpointing, or take a smaller"
                " --resolution or model, such as --preset tiny."
            )

    def log_start(self) -> None:
        """Say what is about to be trained, in the form of diffusers' scripts."""
        args, config = self.args, self.transformer.config
        weights = sum(parameter.numel() for parameter in self.transformer.parameters())
        ternary = sum(layer.weight.numel() for layer in self.transformer.ternary_layers().values()) * config.ternary
        images = args.max_train_steps * self.batch_size
        size = "streamed" if args.streaming else f"{len(self.samples):,}"
        free = training.memory.free_bytes(self.device)
        logger.info("***** Running training *****")
        for name, value in {
            "Num examples": size,
            "Num classes": f"{len(self.samples.id2label):,}",
            "Num epochs": "unknown" if args.streaming else f"{images / len(self.samples):,.1f}",
            "Num processes": f"{self.accelerator.num_processes}, on {self.device.type}",
            "Instantaneous batch size per device": f"{args.train_batch_size:,}",
            "Total train batch size (w. parallel, distributed & accumulation)": f"{self.batch_size:,}",
            "Gradient accumulation steps": f"{args.gradient_accumulation_steps:,}",
            "Total optimization steps": f"{args.max_train_steps:,}",
            "Weights": f"{weights:,}, of them {ternary:,} ternary",
            "Tokens per picture": f"{tokens_of(self.transformer):,}",
            "Expected memory": f"{self.memory / 1e9:.1f} GB" + (f", {free / 1e9:.1f} GB are free" if free else ""),
            "Expected time": f"follows after {TIMED_STEPS} steps",
        }.items():
            logger.info(f"  {name} = {value}")

    def resume(self, folder: Path) -> None:
        """Restore a checkpoint; the position in the data follows from its step."""
        classes = {str(key): name for key, name in self.samples.id2label.items()}
        trained = read_json(folder / training.checkpointing.STATE_NAME).get("id2label", classes)
        if isinstance(trained, dict) and trained != classes:
            keys = [key for key in {**trained, **classes} if trained.get(key) != classes.get(key)]
            shown = "; ".join(f"{key} was {trained.get(key)!r}, is {classes.get(key)!r}" for key in keys[:5])
            fitting = {tuple(training.data.ordered_labels(classes.values(), o)): o for o in ("value", "text")}
            order = fitting.get(tuple(trained.values()))
            fits = order not in (None, self.args.label_order)
            advice = f"--label_order {order}, with which it was trained" if fits else "that data"
            raise SystemExit(
                f"{folder} was trained with other classes: {shown}. Pass {advice}, or another --output_dir."
            )
        options = read_json(folder / training.checkpointing.STATE_NAME).get("options")
        options = options if isinstance(options, dict) else {}  # of a checkpoint from before they were kept
        if options.get("optimizer") in ("adamw", "muon") and options["optimizer"] != self.args.optimizer:
            raise SystemExit(
                f"{folder} was trained with --optimizer {options['optimizer']}, this run has {self.args.optimizer}."
                f" Pass --optimizer {options['optimizer']}, or another --output_dir."
            )
        state = training.checkpointing.load(folder, self.transformer, self.ema_model, self.optimizer)
        if (state["batch_size"], state["seed"]) != (self.batch_size, self.args.seed):
            raise SystemExit(
                f"{folder} was trained with {state['batch_size']} samples per step and seed {state['seed']}, this run"
                f" has {self.batch_size} and {self.args.seed}. Pass --total_batch_size {state['batch_size']} --seed"
                f" {state['seed']}."
            )
        self.step = state["step"]
        if self.args.streaming:
            self.samples.shard_sizes.update({int(key): size for key, size in state["shard_sizes"].items()})
        logger.info(f"resumed {folder} at step {self.step}")
        new = [
            f"--{name} {printable(str(options[name])):.80}, from step {self.step} on {getattr(self.args, name)}"
            for name in RECIPE
            if name in options and options[name] != getattr(self.args, name)
        ]
        before = state.get("changes")
        self.changes = [*map(str, before if isinstance(before, list) else []), *new]
        if new and self.step >= self.args.max_train_steps:
            raise SystemExit(
                f"{folder} has reached step {self.step}: nothing is left to train with another recipe"
                f" ({'; '.join(new)}). Pass a larger --max_train_steps, or the options that it was trained with."
            )
        if new:
            logger.warning(f"The recipe has changed since {folder}: {'; '.join(new)}")

    def train(self) -> bool:
        """Train to the last step; return False where SIGTERM or Ctrl-C ended the run earlier, after saving."""
        args = self.args
        self.stop_request = training.stopping.StopRequest()
        if self.resumed_from:
            self.make_up_validation()
        if self.step >= args.max_train_steps:
            logger.info(f"{self.resumed_from} has reached --max_train_steps {args.max_train_steps}: nothing to train")
            return True
        self.log_start()
        batches, first, began = self.show_first(self.batches()), self.step, 0.0
        if args.torch_compile and not args.fsdp:
            batches = self.compile(batches)
        progress = tqdm(  # on a terminal alone; elsewhere each validation says how far the run is
            total=args.max_train_steps, initial=self.step, disable=None if self.is_main_process else True
        )
        codes, logged = training.statistics.packed_codes(self.transformer), self.step
        window, started = [], time.perf_counter()  # (loss, norm of the gradient) of each step since the last record
        while self.step < args.max_train_steps:
            self.train_step(batches)
            done, taken = self.step == args.max_train_steps, self.step - logged
            recorded = self.step % args.logging_steps == 0 or self.step % args.checkpointing_steps == 0 or done
            # A GPU is one step ahead of what is read, so that it need not wait for the reading.
            found, stop = self.read_reports(all_of_them=recorded or self.device.type != "cuda")
            window += found
            images_per_second = taken * self.batch_size / (time.perf_counter() - started)
            progress.update()
            if window:
                progress.set_postfix(loss=f"{window[-1][0]:.4f}", images_s=f"{images_per_second:.0f}")
            if self.step == first + 1:
                began = time.perf_counter()  # the first step takes longer
            if self.step == first + TIMED_STEPS and not done:
                seconds = (time.perf_counter() - began) / (TIMED_STEPS - 1)
                left = time_left(seconds * (args.max_train_steps - self.step))
                logger.info(f"  Expected time = {left} more, at {seconds:.2g} s a step, besides validation")
            if self.step % args.logging_steps == 0 or done:
                self.log_window(window, images_per_second, codes)
                codes, window, started = training.statistics.packed_codes(self.transformer), [], time.perf_counter()
                logged = self.step
            if self.step % args.checkpointing_steps == 0 or done or stop:
                window += self.read_reports()[0]
                self.save()
            if stop and not done:
                self.writer.wait()
                logger.info("stopped by a signal; go on with --resume_from_checkpoint latest")
                return False
            if self.validation_due or self.frechet_due:
                self.validate()
                if self.step > first + 1 and not done:
                    seconds = (time.perf_counter() - began) / (self.step - first - 1)
                    left = time_left(seconds * (args.max_train_steps - self.step))
                    logger.info(f"step {self.step:,} of {args.max_train_steps:,}, about {left} left")
            if args.hub_push_steps and self.step % args.hub_push_steps == 0 and not done:
                self.push_meanwhile()
        progress.close()
        return True

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Return the micro-batches of this process from the present step on."""
        args = self.args
        positions = training.random.run_positions(
            self.step,
            args.max_train_steps,
            args.train_batch_size,
            args.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if args.streaming:
            return self.examples.stream(positions)
        workers, pin_memory = args.dataloader_num_workers, self.device.type == "cuda"
        return iter(DataLoader(self.examples, batch_sampler=positions, num_workers=workers, pin_memory=pin_memory))

    def show_first(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Save a picture of the first samples of the run as the model sees them; return the batches with the first."""
        for first in itertools.islice(batches, 1):
            batches = itertools.chain([first], batches)
            if self.step == 0 and self.is_main_process and self.codec.decodes:
                shown = self.codec.encode({key: value[:40].to(self.device) for key, value in first.items()})
                images = torch.cat([self.codec.decode(part) for part in shown["samples"].split(4)])
                pictures = TerDiTPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy())
                names = self.samples.id2label
                labels = [names.get(label, "(no label)") for label in shown["class_labels"].tolist()]
                path = self.args.output_dir / "first-batch.png"
                with new_file(path) as partial_file:
                    grid = training.export.image_grid(pictures, labels=labels if names else None, min_side=128)
                    grid.save(partial_file, format="PNG")
                logger.info(f"{path} shows what the model sees")
        return batches

    def compile(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Compile the blocks, and say what that gains on the first batch; return the batches with it."""
        for first in itertools.islice(batches, 1):
            batches = itertools.chain([first], batches)
            batch = self.codec.encode({key: value.to(self.device) for key, value in first.items()})
            before = min(self.seconds_of_a_pass(batch) for _ in range(3))
            self.transformer.compile_repeated_blocks()
            compiling = self.seconds_of_a_pass(batch)
            after = min(self.seconds_of_a_pass(batch) for _ in range(3))
            logger.info(
                f"  torch.compile = {before / after:.2f} times as fast: a forward and a backward pass take"
                f" {after:.2g} s instead of {before:.2g} s; compiling took {compiling:.0f} s"
            )
        return batches

    def seconds_of_a_pass(self, batch: dict[str, Tensor]) -> float:
        """Time a forward and a backward pass, which leave no trace in the run."""
        start = time.perf_counter()
        with self.accelerator.no_sync(self.model), self.accelerator.autocast():
            loss = self.loss(**batch)
        with self.accelerator.no_sync(self.model):
            loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Take one optimizer step, and leave its report for `read_reports`."""
        args, accelerator = self.args, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["lr_factor"]
        if self.set_strength is not None:
            self.set_strength(min(self.step / args.ternary_warmup_steps, 1.0))

        step_loss = torch.zeros((), device=self.device)
        with held_codes():
            for i, batch in enumerate(itertools.islice(batches, args.gradient_accumulation_steps), start=1):
                batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
                batch = self.codec.encode(batch)
                last = i == args.gradient_accumulation_steps
                with nullcontext() if last or args.fsdp else accelerator.no_sync(self.model):
                    with accelerator.autocast():
                        loss = self.loss(**batch)
                    loss = loss / args.gradient_accumulation_steps
                    accelerator.backward(loss)
                step_loss += loss.detach()
        grad_norm = training.recipes.clip_grad_norm(self.transformer, args.max_grad_norm)
        if self.device.type != "cuda":
            self.check_finite(self.step, step_loss.item(), grad_norm.item())  # before it changes a weight
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = training.recipes.average_decay(self.step, args.ema_decay)
        training.recipes.update_average(self.ema_model, self.transformer, decay)
        # One reduction: the mean loss, and whether any process was asked to stop.
        report = torch.stack([step_loss, grad_norm.to(step_loss), step_loss.new_tensor(bool(self.stop_request))])
        self.reports.append((self.step, accelerator.reduce(report, reduction="mean")))
        self.step += 1

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise a `FloatingPointError` where the gradient of a step is not finite."""
        if not math.isfinite(grad_norm):
            self.writer.wait()  # what is being written counts
            last = self.last_checkpoint
            saved = f"The last checkpoint is of step {last}" if last else "There is no checkpoint yet"
            raise FloatingPointError(
                f"The gradient is {grad_norm} at step {step}, loss {loss}. {saved}. Lower --learning_rate, raise"
                " --lr_warmup_steps, or look at the data."
            )

    def read_reports(self, all_of_them: bool = True) -> tuple[list[tuple[float, float]], bool]:
        """Return loss and norm of the gradient of the steps since, and whether any process was asked to stop."""
        found, stopped = [], False
        while len(self.reports) > (0 if all_of_them else 1):
            step, report = self.reports.pop(0)
            loss, grad_norm, stop = report.tolist()
            self.check_finite(step, loss, grad_norm)
            found.append((loss, grad_norm))
            stopped |= bool(stop)
        return found, stopped

    def learning_rate(self, step: int) -> float:
        args = self.args
        return args.learning_rate * training.recipes.learning_rate_factor(
            step,
            args.lr_scheduler,
            args.max_train_steps,
            args.lr_warmup_steps,
            args.lr_decay_steps,
            args.lr_step_rules,
        )

    def loss(self, samples: Tensor, noise: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        """Return the mean loss of a batch: latents (B, C, h, w), noise like them, time (B,), labels (B,)."""
        args = self.args
        output, target, inputs = self.predict(self.model, samples, noise, time, class_labels)
        if args.flow_matching:
            loss = losses.mean_squared_error(output, target)
        else:
            alphas_cumprod = self.scheduler.alphas_cumprod
            loss = losses.diffusion_loss(output, samples, noise, time, alphas_cumprod, args.snr_gamma)
        if self.teacher is not None:
            channels = noise.shape[1]
            with torch.no_grad():
                wanted = self.teacher(*inputs, return_dict=False)[0][:, :channels]
            loss = loss + args.distillation_weight * losses.mean_squared_error(output[:, :channels], wanted)
        return loss.mean()

    def predict(self, model, samples: Tensor, noise: Tensor, time: Tensor, class_labels: Tensor):
        """Return the model's output on noisy latents, the target of its first channels, and its inputs."""
        noisy, target, timesteps = losses.training_target(self.scheduler, samples, noise, time)
        inputs = (noisy, timesteps, class_labels)
        return model(*inputs, return_dict=False)[0].float(), target, inputs

    def log(self, **record) -> None:
        record = {"step": self.step, **record}
        if self.is_main_process:
            with writing(self.log_path), self.log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
        self.accelerator.log(numbers, step=self.step)

    def log_window(self, window: list[tuple[float, float]], images_per_second: float, codes: dict) -> None:
        """Log the means since the last record, and how the ternary weights changed from `codes`."""
        window_losses, norms = zip(*window, strict=True)
        self.log(
            images_seen=self.step * self.batch_size,
            loss=sum(window_losses) / len(window),
            lr=self.learning_rate(self.step - 1),
            grad_norm=sum(norms) / len(norms),
            grad_norm_max=max(norms),
            images_per_second=images_per_second,
            **training.statistics.ternary_statistics(self.transformer, codes),
            **training.statistics.gate_sizes(self.transformer),
        )

    def save(self) -> None:
        """Save a checkpoint, whole or not at all, and remove the oldest beyond the limit."""
        args, step = self.args, self.step
        state = {"step": step, "images_seen": step * self.batch_size, "batch_size": self.batch_size, "seed": args.seed}
        state["id2label"] = self.samples.id2label
        state["sampling_defaults"] = self.sampling_defaults
        state["options"] = {name: getattr(args, name) for name in RECIPE}
        state["changes"] = self.changes
        vae = args.pretrained_vae_model_name_or_path
        state["vae"] = os.path.abspath(vae) if vae and os.path.isdir(vae) else vae
        state["shard_sizes"] = getattr(self.samples, "shard_sizes", {})
        folder = args.output_dir / f"checkpoint-{step}"
        weights = sum(parameter.numel() for parameter in self.transformer.parameters())
        free = training.memory.free_bytes(torch.device("cpu"))
        copy = free is not None and free > COPY_ROOM * 16 * weights
        self.writer.wait()
        write = training.checkpointing.snapshot(
            self.transformer, self.ema_model, self.optimizer, state, self.is_main_process, copy
        )

        def save() -> None:
            write(folder)
            if self.is_main_process:
                training.checkpointing.rotate(args.output_dir, args.checkpoints_total_limit)
            self.last_checkpoint = step
            logger.info(f"saved {folder}")

        self.writer.start(save)
        if not copy:
            self.writer.wait()

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The steps and the guidance that the model is validated with, which its pipelines recommend."""
        return {key: getattr(self.args, key) for key in ("num_inference_steps", "guidance_scale")}

    def pipeline(self) -> TerDiTPipeline:
        """Return a pipeline of the average; every process must call this."""
        return training.export.to_pipeline(
            self.ema_model, self.scheduler, self.vae, self.samples.id2label, self.sampling_defaults
        )

    @property
    def validation_due(self) -> bool:
        return self.step % self.args.validation_steps == 0 or self.step == self.args.max_train_steps

    @property
    def frechet_due(self) -> bool:
        return bool(self.args.frechet_steps) and self.step % self.args.frechet_steps == 0

    def make_up_validation(self) -> None:
        """Validate if the run that is resumed ended between saving and validating: no record without a loss."""
        if not (self.validation_due or self.frechet_due):
            return
        lines = self.log_path.read_text("utf-8").splitlines() if self.log_path.exists() else []
        records = map(json.loads, lines if self.is_main_process else [])
        missing = self.is_main_process and not any(r["step"] == self.step and "loss" not in r for r in records)
        if self.accelerator.reduce(torch.tensor(float(missing), device=self.device)).item():
            self.validate()

    def validate(self) -> None:
        """Log errors of the average at fixed noise, and its Frechet distance; save a grid of its samples."""
        args, record = self.args, {}
        pipe = self.pipeline()
        pipe.to(self.device).set_progress_bar_config(disable=True)
        if self.validation_due and self.is_main_process:
            if not args.streaming:
                record["noise_error"] = self.noise_error(pipe.transformer, self.samples)
            if self.held_out is not None:
                record["noise_error_held_out"] = self.noise_error(pipe.transformer, self.held_out)
            if self.codec.decodes:
                columns = min(self.num_classes, 10) if self.num_classes > 1 else 10
                first = (math.ceil(self.step / args.validation_steps) - 1) * columns  # the next ten classes in turn
                indices = range(args.num_validation_images)
                classes = [(first + i % columns) % self.num_classes for i in indices]
                images = self.sample_images(pipe, classes, indices, "pil")
                names = self.samples.id2label and [self.samples.id2label[i].split(",")[0] for i in classes]
                path = args.output_dir / "samples" / f"step-{self.step}.png"
                path.parent.mkdir(exist_ok=True)
                with new_file(path) as partial_file:
                    training.export.image_grid(images, columns, names or None).save(partial_file, format="PNG")
        if self.frechet_due:
            record["frechet_distance"] = self.frechet_distance(pipe)
        self.log(**record)
        if self.is_main_process and self.draws_log:
            try:
                training.log.draw(self.log_path, args.output_dir / "log.png")
            except ImportError as error:
                self.draws_log = False
                logger.info(f"no log.png: {error}")
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def noise_error(self, model: TerDiTTransformer2DModel, samples: Dataset, draws: int = 4) -> float:
        """Return the squared error of the prediction on the first 300 samples, at fixed noise and timesteps."""
        errors, count = [], min(300, len(samples))
        for start in range(0, count, self.args.train_batch_size):
            batch = []
            for index in range(start, min(start + self.args.train_batch_size, count)):
                sample, label = samples[index]
                positions = range(draws * index, draws * (index + 1))
                batch += [{**self.examples.example(p, sample, label), "class_labels": label} for p in positions]
            batch = {key: value.to(model.device) for key, value in default_collate(batch).items()}
            output, target, _ = self.predict(model, **self.codec.encode(batch))
            errors.append(losses.mean_squared_error(output[:, : target.shape[1]], target))
        return torch.cat(errors).mean().item()

    def sample_images(self, pipe: TerDiTPipeline, labels: list[int], seeds, output_type: str):
        """Sample one image per label, each from its own seed, so that no other image matters."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(labels, generator=generators, output_type=output_type).images

    @torch.no_grad()
    def frechet_distance(self, pipe: TerDiTPipeline) -> float:
        """Return the distance between features of samples and of as many training images; the processes share it."""
        features, processes = [], self.accelerator.num_processes
        count = -(-self.args.num_frechet_images // processes)  # the same for each process
        indices = [i * processes + self.accelerator.process_index for i in range(count)]
        for start in range(0, count, self.args.train_batch_size):
            part = indices[start : start + self.args.train_batch_size]
            batch = default_collate([self.examples[i] for i in part])
            batch = self.codec.encode({key: value.to(self.device) for key, value in batch.items()})
            real = self.codec.decode(batch["samples"])
            fake = self.sample_images(pipe, [i % self.num_classes for i in part], part, "pt").to(real)
            features.append(torch.stack([self.network(real), self.network(fake)], dim=1))  # (B, 2, D)
        gathered = self.accelerator.gather(torch.cat(features))
        return evaluation.frechet_distance(gathered[:, 0], gathered[:, 1])

    def save_exported(self, pipe: TerDiTPipeline, folder: Path) -> Callable[[], None]:
        """Save the average as a packed pipeline with a card into a folder; return what uploads the folder."""
        args = self.args
        if args.export_dtype != "float32":
            pipe.transformer.to(getattr(torch, args.export_dtype))
        training.export.save_pipeline(pipe, folder)
        grids = sorted((args.output_dir / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime)[-1:]
        for path in grids:
            if folder != args.output_dir:
                (folder / "samples").mkdir()
                shutil.copy(path, folder / "samples")
        name = args.hub_model_id or args.output_dir.resolve().name
        images = [f"samples/{path.name}" for path in grids]
        options = training.export.card_options(pipe, self.facts(), images, args.license)
        training.export.save_card(pipe, folder, name, options)

        def push() -> None:
            commit = push_saved(pipe, folder, options, name, commit_message=message, token=args.hub_token)
            logger.info(f"pushed step {step:,} to {commit.repo_url.repo_id}")

        step, message = self.step, f"Step {self.step:,} of {args.max_train_steps:,}"
        return push

    def push_meanwhile(self) -> None:
        """Upload the average in a thread, while training goes on; where the Hub is away, a later upload will do."""
        pipe = self.pipeline()
        if not self.is_main_process:
            return
        if self.upload is not None and self.upload.is_alive():
            logger.warning(f"step {self.step:,} is not pushed: the upload before it goes on")
            return
        folder = TemporaryDirectory()
        try:
            push = self.save_exported(pipe, Path(folder.name))
        except OSError as error:  # such as a full disk
            logger.warning(f"step {self.step:,} is not pushed, training goes on: {error}")
            return

        def upload() -> None:
            with folder:
                try:
                    push()
                except (OSError, ValueError) as error:
                    logger.warning(f"not pushed, training goes on: {error}")

        self.upload = Thread(target=upload, daemon=True)
        self.upload.start()

    def export(self) -> None:
        """Save the average as a packed pipeline with a card, and push it if asked to."""
        args = self.args
        pipe = self.pipeline()
        if self.is_main_process:
            push = self.save_exported(pipe, args.output_dir)
            if self.upload is not None:
                self.upload.join()
            if args.push_to_hub:
                push()
            folder = str(args.output_dir)
            logger.info(f"{folder} is a pipeline: TerDiTPipeline.from_pretrained({folder!r})")
        self.accelerator.wait_for_everyone()

    def facts(self) -> dict:
        """Return how the model was trained, for its card."""
        args = self.args
        data = args.train_data_dir or args.dataset_name or args.train_latents_dir or "scikit-learn digits"
        size = ", streamed" if args.streaming else f", {len(self.samples):,} samples"
        loss = "flow matching" if args.flow_matching else "MSE + variational bound" if args.learn_sigma else "MSE"
        images_seen = self.step * self.batch_size
        adam = "AdamW of 8 bits" if args.use_8bit_adam else "AdamW"
        adam = f"Muon for the matrices of the blocks, for the rest {adam}" if args.optimizer == "muon" else adam
        return {
            "data": without_place(data) + size,
            "steps": f"{self.step:,} of {self.batch_size} samples, {images_seen:,} images seen",
            "loss": loss + (f", min-SNR {args.snr_gamma}" if args.snr_gamma else ""),
            "label dropout": args.class_dropout_prob,
            "learning rate": f"{args.learning_rate}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
            "optimizer": f"{adam}, betas {args.adam_beta1} {args.adam_beta2}, weight decay {args.adam_weight_decay}",
            "exported weights": f"average with decay {args.ema_decay}",
            "precision while training": "bfloat16, float32 weights" if args.mixed_precision == "bf16" else "float32",
            "seed": args.seed,
            **({"changed while training": "; ".join(self.changes)} if self.changes else {}),
        }


def time_left(seconds: float) -> str:
    """Return a time in words: "90 seconds", "12 minutes"."""
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def without_place(value: object) -> str:
    """Return a setting as others may see it: of a path or an address its last part, the rest unchanged."""
    text = str(value)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not os.path.exists(text)
    return text if is_hub_id else Path(urlsplit(text).path).name if "/" in text or os.path.exists(text) else text


def tracked(args: argparse.Namespace) -> dict[str, str]:
    """Return the settings for trackers, whose files may be pushed: no token, and only the names of local paths."""
    return {key: without_place(value) for key, value in vars(args).items() if key != "hub_token"}


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Return the accelerator; `args` gets its precision, and the accumulation that --total_batch_size asks for."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        # Otherwise DDP regroups gradients after its first step, and 3 processes that resume sum in another order.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    args.mixed_precision = accelerator.mixed_precision
    engine, processes = accelerator.distributed_type.value, accelerator.num_processes
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    if processes < 3:  # a sum of two is the same in any order
        accelerator.ddp_handler.find_unused_parameters = False
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or accelerator.mixed_precision not in ("no", "bf16"):
        raise SystemExit(
            f"accelerate is configured for {engine} in {accelerator.mixed_precision}. Ternary weights need float32"
            " masters: use MULTI_GPU, with --fsdp to shard, and bf16 or no."
        )
    if args.report_to and not accelerator.log_with:
        raise SystemExit(f"--report_to {args.report_to}: this tracker is not installed. log.jsonl needs none.")
    if args.total_batch_size:
        per_pass = args.train_batch_size * processes
        if args.total_batch_size % per_pass:
            raise SystemExit(
                f"--total_batch_size {args.total_batch_size} is no multiple of {processes} process(es) x"
                f" --train_batch_size {args.train_batch_size}. Change one of the two."
            )
        args.gradient_accumulation_steps = args.total_batch_size // per_pass
    return accelerator


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    accelerator, existed = start_accelerator(args), args.output_dir.exists()
    try:
        with output_folder(args.output_dir, accelerator.is_main_process):  # no other run writes there
            trainer = Trainer(args, accelerator)
            try:
                complete = trainer.train()
            finally:
                trainer.writer.wait()
            accelerator.wait_for_everyone()
            if complete:
                trainer.export()
            accelerator.end_training()
    finally:
        if accelerator.is_main_process and not existed:
            with suppress(OSError):  # what could not start leaves no empty folder
                args.output_dir.rmdir()
    if trainer.stop_request.interrupted and not complete:
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_program(Path(__file__).stem, main))
