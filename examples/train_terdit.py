"""Train a class-conditional ternary diffusion transformer (TerDiT, https://arxiv.org/abs/2405.14854).

    python examples/train_terdit.py --demo --output_dir outputs/digits
    accelerate launch examples/train_terdit.py --preset terdit-600m --train_latents_dir latents --output_dir out/600m

`--output_dir` becomes a packed pipeline folder for `TerDiTPipeline.from_pretrained`; each `checkpoint-N/` in it holds
float weights and optimizer. `--resume_from_checkpoint latest` goes on in the same bits as a run that never stopped.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import os
import pkgutil
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, evaluation, losses, training
from diffusers_terdit.hub.push import push_saved
from diffusers_terdit.pipelines.schedulers import training_scheduler
from diffusers_terdit.storage.saving import new_file, output_folder, writing


logger = get_logger(__name__, log_level="INFO")


def parse_args(argv=None) -> argparse.Namespace:
    def boolean(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
        return text.lower() == "true"

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data, one of the first four").add_argument
    add("--demo", action="store_true", help="scikit-learn's 8x8 digits and a model of 267 thousand weights")
    add("--train_data_dir", help="folder of class folders of images")
    add("--dataset_name", help="data set on the Hub, or a folder or parquet file that `datasets` loads")
    add("--train_latents_dir", help="folder written by cache_latents.py")
    add("--dataset_config_name")
    add("--dataset_split", default="train")
    add("--streaming", action="store_true", help="read --dataset_name shard by shard, every process all of it")
    add("--image_column", default="image")
    add("--label_column", default="label")
    add("--resolution", type=int, default=256, help="pixels")
    add("--random_flip", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)
    add("--pretrained_vae_model_name_or_path", help="an AutoencoderKL; without it, and without latents, pixels")

    add = parser.add_argument_group("model").add_argument
    presets = [name for name in training.recipes.PRESETS if name != "demo"]
    add("--preset", choices=presets, help="model and recipe of the paper")
    add("--in_channels", type=int, default=3, choices=[1, 3], help="of pixels, where there is no VAE")
    add("--patch_size", type=int, default=2)
    add("--num_layers", type=int, default=12)
    add("--num_attention_heads", type=int, default=6)
    add("--attention_head_dim", type=int, default=64)
    add("--ffn_dim", type=int)
    add("--pos_embed_type", default="rope", choices=["rope", "rope+sincos2d"], help="the second for small models")
    add("--adaln_norm", type=boolean, default=True, help="false: without the paper's RMSNorm")
    add("--initialization", default="small_gain", choices=["small_gain", "reference"])
    add("--scale_granularity", default="tensor", help='"tensor", "row", or inputs per group')
    add("--activation_bits", type=int, choices=[8], help="train with 8-bit inputs of the ternary layers")
    add("--ternary", type=boolean, default=True, help="false: the full-precision twin, on the same data and noise")
    add("--init_from", help="pipeline, model or checkpoint-N to start from; its size is taken, too")
    add("--ternary_warmup_steps", type=int, default=0, help="blend from full precision to ternary over so many steps")
    add("--teacher", help="pipeline or model whose noise prediction is learned, too")
    add("--distillation_weight", type=float, default=1.0)

    add = parser.add_argument_group("loss").add_argument
    add("--learn_sigma", type=boolean, default=True, help="false: squared error alone")
    add("--snr_gamma", type=float, help="min-SNR weighting; 5.0 is usual")
    add("--flow_matching", action="store_true", help="rectified flow instead of DDPM; no learned variance")
    add("--class_dropout_prob", type=float, default=0.1)

    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=int, default=0)
    add("--max_train_steps", type=int, default=400_000)
    add("--train_batch_size", type=int, default=32, help="per process and accumulation step")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--total_batch_size", type=int, help="samples per optimizer step; sets the accumulation")
    add("--learning_rate", type=float, default=5e-4)
    add("--lr_scheduler", default="wsd", choices=["constant", "cosine", "wsd", "piecewise_constant"])
    add("--lr_warmup_steps", type=int, default=0)
    add("--lr_decay_steps", type=int, help="wsd: length of the final decay; default a fifth of the run")
    add("--lr_step_rules", help='piecewise_constant: "1:1550000,0.2" is a fifth from step 1,550,000')
    add("--scale_lr_factor", type=float, default=1.0, help="learning rate of the ternary scales, relative")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.0, help="of matrices; never of scales, norms, biases, embeddings")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=2.0)
    add("--ema_decay", type=float, default=0.9999)
    add("--mixed_precision", choices=["no", "bf16"], help="default: accelerate's; weights, average, loss stay float32")
    add("--gradient_checkpointing", action="store_true")
    add("--torch_compile", action="store_true", help="compile the transformer blocks")
    add("--fsdp", action="store_true", help="shard weights, average and optimizer over the processes")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("terdit-model"))
    add("--export_dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of non-ternary weights")
    add("--checkpointing_steps", type=int, default=5000)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--resume_from_checkpoint", help='a folder, or "latest"')
    add("--logging_steps", type=int, default=100, help="log.jsonl and trackers")
    add("--report_to", help="tensorboard, wandb, trackio, ...")
    add("--validation_steps", type=int, default=10_000, help="sample grid, and error of the noise at fixed noise")
    add("--num_validation_images", type=int, default=40)
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=1.5)
    add("--feature_network", help="module:function that returns a network, (B, C, H, W) in [0, 1] -> (B, D)")
    add("--frechet_steps", type=int, help="Frechet distance of samples to training images, with --feature_network")
    add("--num_frechet_images", type=int, default=1000)
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", help="default: the name of --output_dir")
    add("--hub_token")
    add("--license", help="of the trained model, for its card")

    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**training.recipes.PRESETS.get("demo" if known.demo else known.preset, {}))
    args = parser.parse_args(argv)
    sources = [args.demo, args.train_data_dir, args.dataset_name, args.train_latents_dir]
    if sum(bool(source) for source in sources) != 1:
        parser.error("pass one of --demo, --train_data_dir, --dataset_name, --train_latents_dir")
    if args.demo and args.preset:
        parser.error("--demo brings its own model; leave out --preset")
    if args.streaming and (not args.dataset_name or args.dataloader_num_workers):
        parser.error("--streaming goes with --dataset_name and --dataloader_num_workers 0")
    if args.frechet_steps and (args.streaming or not args.feature_network):
        parser.error("--frechet_steps needs --feature_network, and data that is not streamed (0 switches it off)")
    if args.activation_bits and not args.ternary:
        parser.error("--activation_bits is for ternary models, not --ternary false")
    if args.flow_matching and args.snr_gamma:
        parser.error("--snr_gamma is for DDPM, not --flow_matching")
    if args.ternary_warmup_steps and not (args.ternary and args.init_from):
        parser.error(
            "--ternary_warmup_steps goes with --init_from a full-precision model, and not with --ternary false"
        )
    if args.lr_decay_steps is None:
        args.lr_decay_steps = args.max_train_steps // 5
    args.learn_sigma = args.learn_sigma and not args.flow_matching
    if args.scale_granularity.isdigit():
        args.scale_granularity = int(args.scale_granularity)
    return args


def open_samples(args: argparse.Namespace, channels: int):
    """The training samples, (tensor, label) by index; or, streaming, the `datasets` stream itself."""
    options = {"resolution": args.resolution, "channels": channels, "flip": args.random_flip}
    if args.demo:
        return training.data.Digits(train=True)
    if args.train_latents_dir:
        return training.data.LatentSamples(args.train_latents_dir)
    if args.train_data_dir:
        return training.data.ImageSamples.from_folder(args.train_data_dir, **options)
    dataset = training.data.open_dataset(
        args.dataset_name, args.dataset_config_name, args.dataset_split, args.streaming
    )
    if args.streaming:
        return training.data.ShardedStream(dataset, args.image_column, args.label_column, args.seed, **options)
    return training.data.ImageSamples.from_dataset(dataset, args.image_column, args.label_column, **options)


def predict(model, scheduler, samples, noise, time, class_labels):
    """Output of the model on noisy latents, the target of its first channels, and its inputs."""
    noisy, target, timesteps = losses.training_target(scheduler, samples, noise, time)
    inputs = (noisy, timesteps, class_labels)
    return model(*inputs, return_dict=False)[0].float(), target, inputs


def compute_loss(model, scheduler, args, samples, noise, time, class_labels, teacher=None) -> torch.Tensor:
    """Mean loss of a batch of latents."""
    output, target, inputs = predict(model, scheduler, samples, noise, time, class_labels)
    if args.flow_matching:
        loss = losses.mean_squared_error(output, target)
    else:
        loss = losses.diffusion_loss(output, samples, noise, time, scheduler.alphas_cumprod, args.snr_gamma)
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(*inputs, return_dict=False)[0][:, : noise.shape[1]]
        loss = loss + args.distillation_weight * losses.mean_squared_error(output[:, : noise.shape[1]], wanted)
    return loss.mean()


@torch.no_grad()
def noise_error(model, scheduler, args, codec, examples, samples: Dataset, draws: int = 4) -> float:
    """Squared error of the prediction on the first 300 samples, with labels, at fixed noise and timesteps."""
    errors, count = [], min(300, len(samples))
    for start in range(0, count, args.train_batch_size):
        batch = []
        for index in range(start, min(start + args.train_batch_size, count)):
            sample, label = samples[index]
            positions = range(draws * index, draws * (index + 1))
            batch += [{**examples.example(p, sample, label), "class_labels": label} for p in positions]
        batch = codec.encode({key: value.to(model.device) for key, value in default_collate(batch).items()})
        output, target, _ = predict(model, scheduler, **batch)
        errors.append(losses.mean_squared_error(output[:, : target.shape[1]], target))
    return torch.cat(errors).mean().item()


def sample_images(pipe: TerDiTPipeline, args, labels: list[int], seeds: list[int], output_type: str):
    """One image per label, each from its own seed, so that no other image matters."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return pipe(labels, generator=generators, output_type=output_type, **options).images


@torch.no_grad()
def frechet(pipe: TerDiTPipeline, args, accelerator, network, codec, examples) -> float:
    """Frechet distance between features of samples and of as many training images; the processes share the work."""
    features, processes = [], accelerator.num_processes
    count = -(-args.num_frechet_images // processes)  # as many for each process
    indices = [i * processes + accelerator.process_index for i in range(count)]
    for start in range(0, count, args.train_batch_size):
        part = indices[start : start + args.train_batch_size]
        batch = default_collate([examples[i] for i in part])
        batch = codec.encode({key: value.to(accelerator.device) for key, value in batch.items()})
        real = codec.decode(batch["samples"])
        fake = sample_images(pipe, args, [i % examples.num_classes for i in part], part, "pt").to(real)
        features.append(torch.stack([network(real), network(fake)], dim=1))  # (B, 2, D)
    gathered = accelerator.gather(torch.cat(features))
    return evaluation.frechet_distance(gathered[:, 0], gathered[:, 1])


def build_transformer(args: argparse.Namespace, sample_size: int, in_channels: int, num_classes: int):
    """A fresh model, or one that starts from `--init_from`."""
    config = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "class_dropout_prob": args.class_dropout_prob,
        "learn_sigma": args.learn_sigma,
        "ternary": args.ternary,
        "activation_bits": args.activation_bits,
    }
    if not args.init_from:
        names = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "pos_embed_type")
        names += ("adaln_norm", "initialization", "scale_granularity")
        return TerDiTTransformer2DModel(**config, **{name: getattr(args, name) for name in names})
    source = training.initialize.load_transformer(args.init_from)
    transformer = TerDiTTransformer2DModel.from_config(source.config, **config, weight_format="float")
    fresh = training.initialize.transfer_weights(source, transformer)
    logger.info(f"started from {args.init_from}" + (f", but for {', '.join(fresh)}" if fresh else ""))
    return transformer


def facts(args: argparse.Namespace, step: int, batch_size: int, num_samples: int | None) -> dict:
    """How the model was trained, for its card."""
    source = "scikit-learn digits" if args.demo else args.train_data_dir or args.dataset_name or args.train_latents_dir
    loss = "flow matching" if args.flow_matching else "MSE + variational bound" if args.learn_sigma else "MSE"
    return {
        "data": Path(source).name + (f", {num_samples:,} samples" if num_samples else ", streamed"),
        "steps": f"{step:,} of {batch_size} samples, {step * batch_size:,} images seen",
        "loss": loss + (f", min-SNR {args.snr_gamma}" if args.snr_gamma else ""),
        "label dropout": args.class_dropout_prob,
        "learning rate": f"{args.learning_rate}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
        "optimizer": f"AdamW, betas {args.adam_beta1} {args.adam_beta2}, weight decay {args.adam_weight_decay}",
        "exported weights": f"average with decay {args.ema_decay}",
        "precision while training": "bfloat16, float32 weights" if args.mixed_precision == "bf16" else "float32",
        "seed": args.seed,
    }


def tracked(args: argparse.Namespace) -> dict[str, str]:
    """The settings for trackers, whose files may be pushed with the model: no token, and of local paths the name."""
    settings = {key: str(value) for key, value in vars(args).items() if key != "hub_token"}
    return {k: Path(v).name if os.path.isabs(v) or os.path.exists(v) else v for k, v in settings.items()}


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        # Otherwise DDP regroups gradients after its first step, and 3 processes that resume sum in another order.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    args.mixed_precision = accelerator.mixed_precision
    main_process, device = accelerator.is_main_process, accelerator.device
    logger.info(f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}, {device}")
    engine = accelerator.distributed_type.value
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or accelerator.mixed_precision not in ("no", "bf16"):
        raise SystemExit(
            f"accelerate is configured for {engine} in {accelerator.mixed_precision}. Ternary weights need float32"
            " masters: use MULTI_GPU, with --fsdp to shard, and bf16 or no."
        )
    if args.report_to and not accelerator.log_with:
        raise SystemExit(f"--report_to {args.report_to}: this tracker is not installed. log.jsonl needs none.")
    per_pass = args.train_batch_size * accelerator.num_processes
    if args.total_batch_size:
        if args.total_batch_size % per_pass:
            raise SystemExit(
                f"--total_batch_size {args.total_batch_size} is no multiple of {accelerator.num_processes} process(es)"
                f" x --train_batch_size {args.train_batch_size}. Change one of the two."
            )
        args.gradient_accumulation_steps = args.total_batch_size // per_pass
    batch_size = per_pass * args.gradient_accumulation_steps
    with output_folder(args.output_dir, main_process):
        train(args, accelerator, batch_size)


def train(args: argparse.Namespace, accelerator: Accelerator, batch_size: int) -> None:
    """Train and export, or go on from a checkpoint, in a folder that this run has for itself."""
    main_process, device = accelerator.is_main_process, accelerator.device
    found = training.checkpointing.find(args.output_dir)
    if found and not args.resume_from_checkpoint:
        raise SystemExit(
            f"{args.output_dir} holds {found[-1].name}. Pass --resume_from_checkpoint latest to go on, or another"
            " --output_dir."
        )

    # 1. Data: pixels, images to encode, or cached latents
    vae = None
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path).requires_grad_(False).to(device)
    samples = open_samples(args, channels=3 if vae is not None else args.in_channels)
    codec = training.data.LatentCodec(vae, getattr(samples, "info", None))
    if args.frechet_steps and not codec.decodes:
        raise SystemExit("--frechet_steps shows images to a network: pass --pretrained_vae_model_name_or_path, too.")
    latent_shape = codec.latent_shape(args.resolution, args.in_channels)
    num_classes = len(samples.id2label)
    examples = training.data.TrainingExamples(
        samples, args.seed, latent_shape, num_classes, args.class_dropout_prob, continuous_time=args.flow_matching
    )

    # 2. Model, average, optimizer
    set_seed(args.seed)
    transformer = build_transformer(args, latent_shape[1], latent_shape[0], num_classes).train().to(device)
    teacher = None
    if args.teacher:
        teacher = training.initialize.load_transformer(args.teacher).requires_grad_(False).to(device)
        if teacher.config.num_classes != num_classes:
            raise SystemExit(
                f"--teacher knows {teacher.config.num_classes} classes, the data has {num_classes}. Pass a teacher of"
                " these."
            )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ema_model = copy.deepcopy(transformer).requires_grad_(False).eval()
    set_strength = training.initialize.gradual_ternarization(transformer) if args.ternary_warmup_steps else None
    if args.torch_compile:
        transformer.compile_repeated_blocks()
    if args.fsdp:
        training.sharding.shard_model(transformer, device.type)
        training.sharding.shard_model(ema_model, device.type)
    optimizer = torch.optim.AdamW(
        training.recipes.parameter_groups(transformer, args.adam_weight_decay, args.scale_lr_factor),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    model = transformer if args.fsdp else accelerator.prepare(transformer)
    scheduler = training_scheduler(args.learn_sigma, args.flow_matching)
    network = pkgutil.resolve_name(args.feature_network)().eval().to(device) if args.feature_network else None

    # 3. Resume
    step, log_path = 0, args.output_dir / "log.jsonl"
    folder = args.resume_from_checkpoint and Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        folder = found[-1] if found else None
    if folder:
        state = training.checkpointing.load(folder, transformer, ema_model, optimizer)
        step = state["step"]
        if (state["batch_size"], state["seed"]) != (batch_size, args.seed):
            raise SystemExit(
                f"{folder} was trained with {state['batch_size']} samples per step and seed {state['seed']}, this run"
                f" has {batch_size} and {args.seed}. Pass --total_batch_size {state['batch_size']} --seed"
                f" {state['seed']}."
            )
        if args.streaming:
            samples.shard_sizes.update({int(key): size for key, size in state["shard_sizes"].items()})
        logger.info(f"resumed {folder} at step {step}")
    if main_process:
        training.checkpointing.cut_log(log_path, step)  # a killed run writes on after its last checkpoint
        training.checkpointing.rotate(args.output_dir, args.checkpoints_total_limit)  # or ends before it removes one
    if args.report_to:
        accelerator.init_trackers("train_terdit", config=tracked(args))

    def log(**record) -> None:
        if main_process:
            with writing(log_path), log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        accelerator.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])

    def save() -> None:
        state = {"step": step, "images_seen": step * batch_size, "batch_size": batch_size, "seed": args.seed}
        state["shard_sizes"] = getattr(samples, "shard_sizes", {})
        folder = args.output_dir / f"checkpoint-{step}"
        training.checkpointing.save(folder, transformer, ema_model, optimizer, state, main_process)
        if main_process:
            training.checkpointing.rotate(args.output_dir, args.checkpoints_total_limit)
        accelerator.wait_for_everyone()
        logger.info(f"saved {folder}")

    def validate(grid: bool, frechet_due: bool) -> None:
        pipe = training.export.to_pipeline(ema_model, scheduler, vae, samples.id2label)  # takes every process
        pipe.to(device).set_progress_bar_config(disable=True)
        record = {}
        if grid and main_process:
            error = partial(noise_error, pipe.transformer, scheduler, args, codec, examples)
            if not args.streaming:
                record["noise_error"] = error(samples)
            if args.demo:
                record["noise_error_held_out"] = error(training.data.Digits(train=False))
            if codec.decodes:
                columns = min(num_classes, 10)
                indices = range(args.num_validation_images)
                images = sample_images(pipe, args, [i % columns for i in indices], list(indices), "pil")
                path = args.output_dir / "samples" / f"step-{step}.png"
                path.parent.mkdir(exist_ok=True)
                with new_file(path) as partial_file:
                    training.export.image_grid(images, columns).save(partial_file, format="PNG")
        if frechet_due:
            record["frechet_distance"] = frechet(pipe, args, accelerator, network, codec, examples)
        log(step=step, **record)
        accelerator.wait_for_everyone()

    def due() -> tuple[bool, bool]:
        """Whether a sample grid is due after this step, and a Frechet distance."""
        grid = step % args.validation_steps == 0 or step == args.max_train_steps
        return grid, bool(args.frechet_steps) and step % args.frechet_steps == 0

    if folder and any(due()):  # a run that ended between saving and validating left no line without a loss
        lines = log_path.read_text("utf-8").splitlines() if main_process and log_path.exists() else []
        missing = main_process and not any(r["step"] == step and "loss" not in r for r in map(json.loads, lines))
        if accelerator.reduce(torch.tensor(float(missing), device=device)).item():
            validate(*due())

    # 4. Train
    stop_requested = False

    def request_stop(signum, frame):
        nonlocal stop_requested
        stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    positions = training.random.run_positions(
        step,
        args.max_train_steps,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    if args.streaming:
        batches = examples.stream(positions)
    else:
        workers, pin_memory = args.dataloader_num_workers, device.type == "cuda"
        batches = iter(DataLoader(examples, batch_sampler=positions, num_workers=workers, pin_memory=pin_memory))
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
    codes = training.statistics.packed_codes(transformer)
    window, started, last_checkpoint = [], time.perf_counter(), step
    while step < args.max_train_steps:
        factor = training.recipes.learning_rate_factor(
            step,
            args.lr_scheduler,
            args.max_train_steps,
            args.lr_warmup_steps,
            args.lr_decay_steps,
            args.lr_step_rules,
        )
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor * group["lr_factor"]
        if set_strength is not None:
            set_strength(min(step / args.ternary_warmup_steps, 1.0))

        step_loss = torch.zeros((), device=device)
        for i, batch in enumerate(itertools.islice(batches, args.gradient_accumulation_steps), start=1):
            batch = codec.encode({key: value.to(device, non_blocking=True) for key, value in batch.items()})
            last = i == args.gradient_accumulation_steps
            with nullcontext() if last or args.fsdp else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = compute_loss(model, scheduler, args, **batch, teacher=teacher)
                loss = loss / args.gradient_accumulation_steps
                accelerator.backward(loss)
            step_loss += loss.detach()
        grad_norm = training.recipes.clip_grad_norm(transformer, args.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"The gradient is {grad_norm} at step {step}, loss {step_loss.item()}. The last checkpoint is of step"
                f" {last_checkpoint}. Lower --learning_rate, raise --lr_warmup_steps, or look at the data."
            )
        optimizer.step()
        optimizer.zero_grad()
        training.ema.update(ema_model, transformer, training.ema.decay_at(step, args.ema_decay))
        step += 1
        # One reduction: the mean loss, and whether any process was asked to stop.
        report = torch.stack([step_loss, torch.full_like(step_loss, stop_requested)])
        loss, stop = accelerator.reduce(report, reduction="mean").tolist()
        window.append((loss, grad_norm))
        progress.update()
        images_per_second = len(window) * batch_size / (time.perf_counter() - started)
        progress.set_postfix(loss=f"{loss:.4f}", images_s=f"{images_per_second:.0f}")
        done = step == args.max_train_steps
        if step % args.logging_steps == 0 or done:
            window_losses, norms = zip(*window, strict=True)
            log(
                step=step,
                images_seen=step * batch_size,
                loss=sum(window_losses) / len(window),
                lr=args.learning_rate * factor,
                grad_norm=sum(norms) / len(norms),
                grad_norm_max=max(norms),
                images_per_second=images_per_second,
                **training.statistics.ternary_statistics(transformer, codes),
                **training.statistics.gate_sizes(transformer),
            )
            codes, window, started = training.statistics.packed_codes(transformer), [], time.perf_counter()
        if step % args.checkpointing_steps == 0 or done or stop:
            save()
            last_checkpoint = step
        if stop and not done:
            logger.info("stopped by SIGTERM; go on with --resume_from_checkpoint latest")
            accelerator.end_training()
            return
        if any(due()):
            validate(*due())
    progress.close()

    # 5. Export
    pipe = training.export.to_pipeline(ema_model, scheduler, vae, samples.id2label)
    if main_process:
        if args.export_dtype != "float32":
            pipe.transformer.to(getattr(torch, args.export_dtype))
        training.export.save_pipeline(pipe, args.output_dir)
        grids = sorted((args.output_dir / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime)
        images = [f"samples/{path.name}" for path in grids[-1:]]
        name = args.hub_model_id or args.output_dir.name
        num_samples = None if args.streaming else len(samples)
        options = training.export.card_options(pipe, facts(args, step, batch_size, num_samples), images, args.license)
        training.export.save_card(pipe, args.output_dir, name, options)
        if args.push_to_hub:
            commit = push_saved(pipe, args.output_dir, options, name, token=args.hub_token, ignore=["checkpoint-*"])
            logger.info(f"pushed to {commit.repo_url.repo_id}")
        logger.info(f"{args.output_dir} is a pipeline: TerDiTPipeline.from_pretrained({str(args.output_dir)!r})")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that is read-only: one line
        raise SystemExit(f"{Path(__file__).name}: {error}") from None
