"""Sample images from a TerDiT pipeline and measure them as ADM defines the metrics.

    python examples/evaluate.py --model digits --num_images 1000 --output_dir outputs/evaluation
    accelerate launch examples/evaluate.py --model terdit-600m --num_images 50000 --num_inference_steps 250 \
        --guidance_scale 1.5 --inception_weights weights-inception-2015-12-05-6726825d.pth \
        --reference VIRTUAL_imagenet256_labeled.npz --output_dir evaluation

Image i is a function of (--seed, i), whatever the batch size, the number of processes and the restarts. `--output_dir`
gets `samples.npz` (uint8 `arr_0`, (N, H, W, C)), `samples.png` (a look at the first ones), `report.json`, `report.md`.
A run that was killed goes on when it is started again.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pkgutil
import platform
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"evaluate: interrupted\n") and os._exit(130))

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_terdit import TerDiTPipeline, __version__, cli, evaluation, training
from diffusers_terdit.arguments import Parser, at_least, color, not_negative, seed
from diffusers_terdit.checkpoints import resolve_model
from diffusers_terdit.evaluation.digits import digits_classifier
from diffusers_terdit.evaluation.inception import InceptionV3
from diffusers_terdit.evaluation.pixels import PixelAverages
from diffusers_terdit.pipelines.schedulers import scheduler_by_name
from diffusers_terdit.storage.saving import new_file, output_folder, writing
from diffusers_terdit.storage.weights import (
    WeightsFile,
    canonical_json,
    check_tensors_of,
    read_json,
    state_dict_digest,
)


logger = get_logger(__name__, log_level="INFO")

CONDITIONING_ROWS = 16
MEASURES = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "precision": "Precision"}
MEASURES |= {"recall": "Recall"}


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("samples").add_argument
    add(
        "--model",
        default="digits",
        help="Draw from this pipeline: a folder, a Hub id, or the name of a bundled checkpoint.",
    )
    add("--num_images", type=at_least(1), default=1000, help="Draw this many images; papers draw 50,000.")
    add("--batch_size", type=at_least(1), default=32, help="Draw this many images at a time in each process.")
    add("--seed", type=seed, default=0, help="Draw the images of this seed; image i depends on it and on i alone.")
    add(
        "--label_policy",
        choices=["balanced", "random"],
        default="balanced",
        help="Draw image i of class i modulo the number of classes, or of a class drawn from the seed.",
    )
    add(
        "--guidance_scale",
        type=not_negative,
        help="Draw with this guidance; without it, with what the model recommends.",
    )
    add(
        "--num_inference_steps",
        type=at_least(1),
        help="Take this many steps, 250 in the paper; without it, as many as the model recommends.",
    )
    add(
        "--scheduler",
        help="Draw with this scheduler of diffusers, such as DPMSolverMultistepScheduler; without it, the pipeline's.",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="Load the weights and compute in this type.",
    )
    add("--output_dir", type=Path, default=Path("evaluation"), help="Write samples and report into this folder.")
    add("--save_images", action="store_true", help="Write each image as a PNG, too, such as images/000000.png.")

    add = parser.add_argument_group("metrics").add_argument
    add(
        "--reference",
        help='Compare with these images: a folder, an .npz or .npy of images, an ADM reference .npz, or "digits".',
    )
    add("--background", type=color, default="white", help="Show this color where images of a folder are transparent.")
    add(
        "--reference_statistics",
        type=Path,
        help="Keep the reference's statistics in this file; without it, in reference.safetensors of --output_dir.",
    )
    add(
        "--inception_weights",
        help="Measure the FID with weights-inception-2015-12-05-6726825d.pth, a file of torch-fidelity.",
    )
    add(
        "--feature_network",
        help="Measure with the network that this module:function returns (docs/evaluation.md). Without it and without"
        " --inception_weights, colors of 8 x 8 areas are compared, or digits by a classifier.",
    )
    add("--feature_batch_size", type=at_least(1), default=64, help="Show the network this many images at a time.")
    add(
        "--images_seen",
        type=at_least(1),
        help="Report that the model saw this many images in training; without it, what its folder says.",
    )
    args = parser.parse_args(argv)
    if args.inception_weights and args.feature_network:
        parser.error("pass one of --inception_weights, --feature_network")
    return args


def load_pipeline(args: argparse.Namespace, device: torch.device) -> TerDiTPipeline:
    pipe = cli.load_pipeline(args.model, args.dtype).to(device)
    if args.scheduler:
        pipe.scheduler = scheduler_by_name(args.scheduler, pipe.scheduler, pipe.prediction_type)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.transformer.modules():
        if type(module).__name__ in ("TimestepEmbedding", "TerDiTAdaLN", "TerDiTOutNorm"):
            for name, layer in module.named_children():
                if name.startswith("linear"):
                    at_fixed_rows(layer)
    return pipe


def at_fixed_rows(layer: nn.Module) -> None:
    """Make a layer of the conditioning, one row per image, always compute 16 rows.

    A matrix product of one to three rows sums in another order than one of many, so an image would depend on how many
    others are in its batch. All other layers see at least 16 tokens per image.
    """
    forward = layer.forward

    def padded(rows: Tensor) -> Tensor:
        missing = -len(rows) % CONDITIONING_ROWS
        filled = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return torch.cat([forward(part) for part in filled.split(CONDITIONING_ROWS)])[: len(rows)]

    layer.forward = padded


def label_of(args: argparse.Namespace, index: int, num_classes: int) -> int:
    if args.label_policy == "balanced":
        return index % num_classes
    return int(training.random.uniform(args.seed, "label", [index]) * num_classes)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8 as ADM rounds: 127.5 x + 128, clamped, truncated."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def sample(pipe: TerDiTPipeline, args: argparse.Namespace, indices: range) -> np.ndarray:
    """Draw the images of these indices, (B, H, W, C) uint8."""
    seeds = [int(training.random.uniform(args.seed, "image", [index]) * 2**53) for index in indices]
    latents = pipe(
        [label_of(args, index, pipe.transformer.config.num_classes) for index in indices],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    if pipe.vae is None:
        images = latents
    else:
        with torch.no_grad():  # one by one: the convolutions of a batch round otherwise
            latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
            images = torch.cat([pipe.vae.decode(latent, return_dict=False)[0] for latent in latents.split(1)])
    images = images.float()
    broken = [index for index, image in zip(indices, images, strict=True) if not image.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"Images {broken} hold NaN or infinite pixels (--dtype {args.dtype}). Try --dtype float32; if that fails,"
            " the weights are broken."
        )
    return to_uint8(images)


def part_config(settings: dict, first: int, last: int) -> str:
    """Return what a part says it is: images `first` to `last` of a run with these settings."""
    return canonical_json({**settings, "first": first, "last": last})


def indices_in(path: Path, settings: dict) -> range:
    """Return the image indices of a part, which is found to be whole and of a run with these settings."""
    advice = "It is drawn again."
    found = re.fullmatch(r"(\d{8})-(\d{8})", path.stem)
    first, last = map(int, found.groups()) if found else (0, -1)
    shape = WeightsFile(path).tensors.get("images", ("", ()))[1]
    file = check_tensors_of(path, {"images": (torch.uint8, (last - first + 1, *shape[1:]))}, advice)
    wanted = part_config(settings, first, last)
    if file.metadata.get("terdit.config") != wanted or "terdit.sha256" not in file.metadata:
        raise ValueError(f"{path} holds other images than its name and the settings say. {advice}")
    return range(first, last + 1)


def pending(parts: Path, num_images: int, batch_size: int, settings: dict) -> list[range]:
    """Find the batches of image indices that no whole file holds yet; damaged and foreign files are removed."""
    done = np.zeros(num_images, dtype=bool)
    for path in parts.glob("*.safetensors"):
        try:
            indices = indices_in(path, settings)
        except (OSError, ValueError) as error:
            logger.warning(str(error))
            path.unlink(missing_ok=True)
        else:
            done[indices.start : indices.stop] = True
    batches: list[range] = []
    for index in np.flatnonzero(~done).tolist():
        if batches and batches[-1].stop == index and len(batches[-1]) < batch_size:
            batches[-1] = range(batches[-1].start, index + 1)
        else:
            batches.append(range(index, index + 1))
    return batches


def save_part(parts: Path, indices: range, images: np.ndarray, settings: dict) -> None:
    tensors = {"images": torch.from_numpy(images)}
    metadata = {"format": "pt", "terdit.sha256": state_dict_digest(tensors)}
    metadata["terdit.config"] = part_config(settings, indices[0], indices[-1])
    with new_file(parts / f"{indices[0]:08}-{indices[-1]:08}.safetensors") as partial:
        save_file(tensors, partial, metadata)


def merge(parts: Path, num_images: int, path: Path) -> None:
    """Write all parts, in order of their index, into one uncompressed .npz, with one part in memory at a time."""
    files = sorted(parts.glob("*.safetensors"))
    shapes = [WeightsFile(file).tensors["images"][1] for file in files]
    count, sizes = sum(shape[0] for shape in shapes), sorted({shape[1:] for shape in shapes})
    if len(sizes) != 1 or count != num_images:
        raise SystemExit(f"{parts} holds {count} of {num_images} images, of sizes {sizes}. Delete it.")
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *sizes[0])}
    with (
        new_file(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for part in files:
            file.write(load_file(part)["images"].numpy())


def sample_all(pipe: TerDiTPipeline, args: argparse.Namespace, accelerator: Accelerator, settings: dict) -> None:
    """Write `samples.npz` with all processes, from wherever an earlier run stopped."""
    path, parts = args.output_dir / "samples.npz", args.output_dir / "parts"
    settings_path = args.output_dir / "settings.json"
    if settings_path.exists():
        before = read_json(settings_path)
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            differences = ", ".join(f"{key} {before.get(key)} (now {settings[key]})" for key in changed)
            raise SystemExit(f"{args.output_dir} holds images of {differences}. Pass another --output_dir.")
    elif path.exists():
        raise SystemExit(f"{path} is not of this script, or its settings.json is lost. Pass another --output_dir.")
    accelerator.wait_for_everyone()  # each has looked before one writes
    if accelerator.is_main_process and not path.exists():
        parts.mkdir(parents=True, exist_ok=True)
        with new_file(settings_path) as partial:
            partial.write_text(json.dumps(settings, indent=2))
    accelerator.wait_for_everyone()
    if path.exists():
        logger.info(f"{path} is complete")
    else:
        batches = pending(parts, args.num_images, args.batch_size, settings)
        accelerator.wait_for_everyone()  # all have made the same list
        left = sum(map(len, batches))
        progress = tqdm(
            total=args.num_images,
            initial=args.num_images - left,
            unit="image",
            disable=not accelerator.is_main_process,
        )
        for turn in range(0, len(batches), accelerator.num_processes):
            round_ = batches[turn : turn + accelerator.num_processes]
            if accelerator.process_index < len(round_):
                indices = round_[accelerator.process_index]
                save_part(parts, indices, sample(pipe, args, indices), settings)
            progress.update(sum(map(len, round_)))
        progress.close()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            merge(parts, args.num_images, path)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and parts.exists():
        shutil.rmtree(parts)


class FolderImages:
    """The images of a folder of class folders, read when a slice is asked for, in the order of their names."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, root: str, size: int, channels: int, background: str):
        options = {"resolution": size, "channels": channels, "background": background}
        self.samples = training.data.ImageSamples.from_folder(root, **options)
        self.shape = (len(self.samples), size, size, channels)
        self.root = Path(root)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.concatenate([to_uint8(self.samples.read(i)[None]) for i in range(*rows.indices(len(self)))])

    def fingerprint(self) -> str:
        """Digest of names and sizes of the files: hashing the pixels would read them twice."""
        files = [(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in self.samples.sources]
        return hashlib.sha256(json.dumps([self.shape, self.samples.background, files]).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def feature_network(args: argparse.Namespace, device: torch.device) -> nn.Module | None:
    if args.inception_weights:
        return InceptionV3(args.inception_weights).eval().to(device)
    if args.feature_network:
        return pkgutil.resolve_name(args.feature_network)().eval().to(device)
    if "digits" in (args.model, args.reference):
        return digits_classifier().to(device)
    return PixelAverages() if args.reference else None


def reference_statistics(args, network: nn.Module, shape: tuple[int, ...], device) -> evaluation.ImageStatistics:
    """Return the reference's statistics, from the file that keeps them if it is of the same data and network."""
    name, (height, width, channels) = args.reference, shape[1:]
    images, adm = None, False
    if name == "digits" and not Path(name).exists():
        images = to_uint8(training.data.Digits(train=True).images)
    elif Path(name).is_dir():
        if height != width:
            raise SystemExit(
                f"A folder of references is read as squares, but the samples are {height} x {width}. Pass an .npz."
            )
        images = FolderImages(name, height, channels, args.background)
    elif not Path(name).is_file():
        raise SystemExit(f'--reference {name}: no such file or folder. Pass one, or "digits".')
    elif zipfile.is_zipfile(name) and "mu.npy" in zipfile.ZipFile(name).namelist():
        adm = True
    else:
        images = evaluation.open_samples(name)
    if images is not None and images.shape[1:] != shape[1:]:
        raise SystemExit(
            f"The images of {name} are {images.shape[1:]}, the samples {shape[1:]} (H, W, C). Pass others as"
            " --reference."
        )

    if adm:
        data = file_digest(name)
    else:
        data = images.fingerprint() if isinstance(images, FolderImages) else evaluation.fingerprint(images)
    path = args.reference_statistics or args.output_dir / "reference.safetensors"
    if path.exists():
        kept = evaluation.ImageStatistics.load(path)
        if (kept.fingerprint, kept.network) == (data, evaluation.network_name(network)):
            logger.info(f"reference statistics from {path}")
            return kept
        logger.info(f"{path} is of other data or another network: writing it again")
    if adm:
        found = evaluation.ImageStatistics.from_adm(
            name, network, args.feature_batch_size, device, progress=bar("reference")
        )
    else:
        found = evaluation.image_statistics(
            images, network, args.feature_batch_size, device, progress=bar("reference")
        )
    found = dataclasses.replace(found, fingerprint=data)
    with writing(path):
        found.save(path)
    return found


def bar(name: str):
    """Progress bar for the batches of `evaluation.image_statistics`."""
    return lambda batches, total=None: tqdm(batches, desc=name, total=total, unit="batch")


def images_seen(folder: Path) -> int | None:
    """Read from the model's folder what it was trained on: the last line of its log, or its card."""
    log, card = folder / "log.jsonl", folder / "README.md"
    if log.is_file():
        seen = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # of a run that was killed
                seen.append(json.loads(line).get("images_seen"))
        return max((number for number in seen if number), default=None)
    found = re.search(r"([\d,]+) images seen", card.read_text("utf-8")) if card.is_file() else None
    return int(found[1].replace(",", "")) if found else None


def save_pngs(samples: np.ndarray, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(tqdm(samples, desc="PNG", unit="image")):
        with new_file(folder / f"{index:06}.png") as partial:
            to_pil(image).save(partial, format="PNG")


def to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def report_lines(report: dict) -> Iterator[str]:
    network = str(report.get("network", ""))
    inception, pixels = network.startswith("inception"), network.startswith(PixelAverages.name)
    distance = "FID" if inception else "Pixel Fréchet distance, not FID" if pixels else "Fréchet distance"
    yield f"# {report['model']}: {report['num_images']:,} images\n"
    measured = [key for key in MEASURES if key in report]
    if measured:
        yield "| measure | value |\n| --- | --- |"
        for key in measured:
            name = distance if key == "fid" else MEASURES[key]
            yield f"| {name} | {report[key]:.4g} |"
        if not inception:
            yield f"\nOn the features of another network ({network}): not comparable with published FIDs."
        if report.get("note"):
            yield f"\n{report['note']}"
    else:
        yield "Nothing was measured: no --reference and network were given."
    yield "\n| setting | value |\n| --- | --- |"
    for key, value in report.items():
        if key not in (*MEASURES, "note"):
            yield f"| {key.replace('_', ' ')} | {value} |"


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    accelerator = Accelerator()
    with output_folder(args.output_dir, accelerator.is_main_process):
        evaluate(args, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Sample, measure and report, or go on where a run was killed, in a folder that this run alone uses."""
    device = accelerator.device
    if args.model == "digits" and args.reference is None and not Path("digits").is_dir():
        args.reference = "digits"
    network = feature_network(args, device) if accelerator.is_main_process else None
    pipe = load_pipeline(args, device)
    for key, value in pipe.sampling_defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    settings = {
        "model": args.model,
        "weights_sha256": training.statistics.weights_digest(pipe.transformer),
        "num_images": args.num_images,
        "seed": args.seed,
        "label_policy": args.label_policy,
        "guidance_scale": args.guidance_scale,
        "guidance_channels": pipe.config.guidance_channels,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": args.dtype,
    }

    # 1. Samples, by all processes
    sample_all(pipe, args, accelerator, settings)

    # 2. Metrics and report, by one
    if accelerator.is_main_process:
        samples = evaluation.open_samples(args.output_dir / "samples.npz")
        num_classes = pipe.transformer.config.num_classes
        columns = min(num_classes, 10) if num_classes > 1 else 10
        grid = training.export.image_grid([to_pil(image) for image in samples[: 4 * columns]], columns)
        with new_file(args.output_dir / "samples.png") as partial:
            grid.save(partial, format="PNG")
        if args.save_images:
            save_pngs(samples, args.output_dir / "images")
        del pipe
        measured = {}
        if network is not None:
            found = evaluation.image_statistics(
                samples, network, args.feature_batch_size, device, progress=bar("features")
            )
            if args.reference:
                reference = reference_statistics(args, network, samples.shape, device)
                measured = evaluation.compare(found, reference, device)
                measured["reference"] = args.reference + (f", {reference.count:,} images" if reference.count else "")
                measured["reference_fingerprint"] = reference.fingerprint
                if Path(args.reference).is_dir():
                    measured["background"] = args.background
                if found.count <= found.features.width:
                    measured["note"] = (
                        f"{found.count:,} images for {found.features.width:,} features: with so few the Fréchet"
                        " distance is far too high. Papers use 50,000."
                    )
            elif found.inception_score is not None:
                measured = {"inception_score": found.inception_score}
            measured["network"] = found.network
        seen = args.images_seen or images_seen(Path(resolve_model(args.model)))
        report = {
            **measured,
            **settings,
            "images_seen_in_training": seen or "unknown",
            "device": str(device),
            "versions": f"diffusers-terdit {__version__}, torch {torch.__version__},"
            f" diffusers {diffusers.__version__}, Python {platform.python_version()}",
        }
        text = "\n".join(report_lines(report)) + "\n"
        for name, contents in (("report.json", json.dumps(report, indent=2)), ("report.md", text)):
            with new_file(args.output_dir / name) as partial:
                partial.write_text(contents, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    sys.exit(cli.run_program(Path(__file__).stem, main))
