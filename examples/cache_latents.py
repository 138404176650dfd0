"""Encode a data set once, so that training needs neither the images nor the VAE.

    python examples/cache_latents.py --train_data_dir imagenet/train --pretrained_vae_model_name_or_path vae \
        --resolution 256 --output_dir latents
    python examples/train_terdit.py --train_latents_dir latents --preset terdit-600m

Keeps mean and deviation of the VAE's distribution, of every image and of its mirror, in safetensors shards. Several
processes (`accelerate launch`) share the shards; one that is killed goes on with the shards that are missing.
"""

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"cache_latents: interrupted\n") and os._exit(130))

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_terdit import training
from diffusers_terdit.arguments import Parser, at_least, color, column
from diffusers_terdit.cli import run_program
from diffusers_terdit.storage.saving import new_file, output_folder
from diffusers_terdit.storage.weights import WeightsFile, canonical_json, differing_keys, state_dict_digest


logger = get_logger(__name__, log_level="INFO")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--train_data_dir", help="Encode the images of this folder: a folder per class, or images without classes.")
    add(
        "--dataset_name",
        help="Encode this data set: a name on the Hub, a folder (save_to_disk's, too), or a parquet file.",
    )
    add("--dataset_config_name", help="Take this configuration of --dataset_name.")
    add("--dataset_split", default="train", help="Take this split of --dataset_name.")
    add("--image_column", default="image", help="Take the images from this column of --dataset_name.")
    add(
        "--label_column",
        type=column,
        default="label",
        help="Take the classes from this column; none stores no classes.",
    )
    add(
        "--label_order",
        default="value",
        choices=["value", "text"],
        help='Number classes whose names are numbers by value, or as text, "10" before "2".',
    )
    add("--resolution", type=at_least(1), default=256, help="Cut and scale images to squares of this many pixels.")
    add("--background", type=color, default="white", help="Show this color where images are transparent.")
    add("--no_flip", action="store_true", help="Leave out the mirror images, which halves the size.")
    add(
        "--pretrained_vae_model_name_or_path",
        required=True,
        help="Encode with this AutoencoderKL: a folder or Hub id.",
    )
    add("--output_dir", type=Path, required=True, help="Write the latents into this folder.")
    add("--batch_size", type=at_least(1), default=32, help="Encode this many images at a time.")
    add("--shard_size", type=at_least(1), default=10_000, help="Write this many images into a file.")
    add(
        "--dtype",
        default="float16",
        choices=["float16", "float32"],
        help="Store the latents in this type; the VAE computes in float32.",
    )
    add("--dataloader_num_workers", type=at_least(0), default=0, help="Read images in this many extra processes.")
    args = parser.parse_args(argv)
    if bool(args.train_data_dir) == bool(args.dataset_name):
        parser.error("pass one of --train_data_dir, --dataset_name")
    return args


class Readable(Dataset):
    """Images by index; `None` for one that cannot be read, which is logged."""

    def __init__(self, samples: training.data.ImageSamples, indices: range):
        self.samples, self.indices = samples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, offset: int):
        index = self.indices[offset]
        try:
            return self.samples.read(index), self.samples.labels[index]
        except OSError as error:
            logging.getLogger(__name__).warning(f"Left out: {error}")
            return None


def collate(batch: list) -> tuple[torch.Tensor, torch.Tensor] | None:
    batch = [item for item in batch if item is not None]
    return (torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])) if batch else None


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode (B, 3, H, W) in [-1, 1] into (B, 2C, h, w): mean, deviation."""
    distribution = vae.encode(images.to(vae.device)).latent_dist
    return torch.cat([distribution.mean, distribution.std], dim=1)


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    accelerator = Accelerator()
    with output_folder(args.output_dir, accelerator.is_main_process):
        cache(args, accelerator)


def cache(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Encode the shards that are missing, then write the index that makes them a cache."""
    options = {"resolution": args.resolution, "channels": 3, "background": args.background}
    if args.train_data_dir:
        samples = training.data.ImageSamples.from_folder(args.train_data_dir, args.label_order, **options)
    else:
        dataset = training.data.open_dataset(args.dataset_name, args.dataset_config_name, args.dataset_split)
        columns = (args.image_column, args.label_column)
        names = (args.dataset_name, args.label_order)
        samples = training.data.ImageSamples.from_dataset(dataset, *columns, *names, **options)
    vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path).eval().to(accelerator.device)
    info = {
        "latent_shape": list(training.data.LatentCodec(vae).latent_shape(args.resolution, 3)),
        "scaling_factor": vae.config.scaling_factor,
        "flip": not args.no_flip,
        "resolution": args.resolution,
        "background": args.background,
        "vae": args.pretrained_vae_model_name_or_path,
        "id2label": {str(label): name for label, name in samples.id2label.items()},
        "num_images": len(samples),
        "shard_size": args.shard_size,
        "dtype": args.dtype,
    }
    shards = [
        (args.output_dir / f"latents-{i:05d}.safetensors", range(start, min(start + args.shard_size, len(samples))))
        for i, start in enumerate(range(0, len(samples), args.shard_size))
    ]
    if note := training.data.numbering_note(samples.id2label):
        logger.info(note)
    logger.info(f"{len(samples)} images, {len(shards)} shard(s), {accelerator.num_processes} process(es)")

    for path, indices in shards[accelerator.process_index :: accelerator.num_processes]:
        if path.exists():
            before = json.loads(WeightsFile(path).metadata.get("terdit.config", "{}"))
            differing = [
                f"{key} {before.get(key)!r:.80} (now {info[key]!r:.80})" for key in differing_keys(info, before)
            ]
            if differing:
                raise SystemExit(f"{path} was made with {', '.join(differing)}. Take another --output_dir.")
            continue
        tensors: dict[str, list[torch.Tensor]] = {"moments": [], "moments_flipped": [], "labels": []}
        loader = DataLoader(
            Readable(samples, indices), args.batch_size, num_workers=args.dataloader_num_workers, collate_fn=collate
        )
        for batch in tqdm(loader, desc=path.name, disable=not accelerator.is_local_main_process):
            if batch is None:
                continue
            images, labels = batch
            tensors["labels"].append(labels)
            tensors["moments"].append(encode(vae, images).to(getattr(torch, args.dtype)).cpu())
            if not args.no_flip:
                flipped = encode(vae, images.flip(-1))
                tensors["moments_flipped"].append(flipped.to(getattr(torch, args.dtype)).cpu())
        if not tensors["labels"]:
            raise SystemExit(
                f"None of the images {indices.start} to {indices.stop - 1} can be read. The log above names them."
            )
        whole = {name: torch.cat(parts).contiguous() for name, parts in tensors.items() if parts}
        metadata = {"terdit.sha256": state_dict_digest(whole), "terdit.config": canonical_json(info)}
        with new_file(path) as partial:
            save_file(whole, partial, {"format": "pt", **metadata})
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        entries = []
        for path, _ in shards:
            file = WeightsFile(path)
            count = file.tensors["labels"][1][0]
            entries.append({"name": path.name, "num_samples": count, "sha256": file.metadata["terdit.sha256"]})
        with new_file(args.output_dir / training.data.LATENTS_NAME) as partial:
            partial.write_text(json.dumps({**info, "shards": entries}, indent=2) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path, _ in shards)
        total = sum(entry["num_samples"] for entry in entries)
        logger.info(f"{args.output_dir} holds {total} latents of {len(samples)} images, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_program(Path(__file__).stem, main))
