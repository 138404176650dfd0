"""Damage what training reads: `python examples/reliability/data_files.py`.

Adapters, training checkpoints, cached latents and images, each healthy but for one fault, are used as a run uses them:
an adapter is loaded into a model, a training run goes on from a checkpoint, all latents of a cache are read, or an
image. Case i of a seed is made from `random.Random(f"{seed}:{i}")` alone. A worker process with an address-space limit
tries it; the supervisor restarts a worker that dies or takes too long. A case passes when

    it gives the same bits as the healthy files; or
    ValueError or OSError with the name of a file or folder in the message, or, for an image, a logged line with its
    name, and the next image is taken; or
    what the files say, where they carry no digest that says otherwise.

`page.py` writes the figures: docs/results/reliability.md.
"""

import argparse
import io
import json
import logging
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import diffusers
import numpy as np
import PIL
import safetensors
import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor

import files
import kills
from diffusers_terdit import training
from diffusers_terdit.lora import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from harness import memory, processor, supervise, tiny_vae, versions, write_report


Files = files.Files
GOOD = ("the same", "ValueError", "OSError", "left out", "as the files say")
BAD = ("silent", "unnamed", "other", "memory", "crashed", "hung")
MEMORY = 3 << 29  # bytes of address space that reading may take; an image of 100 megapixels takes a third of it

# The faults that files.py makes in every safetensors file
GENERAL = [
    "bit flips in headers", "bit flips in data", "truncated or lengthened", "wrong dtype", "wrong shape",
    "swapped or renamed tensors", "duplicate tensors", "missing or extra tensors and files", "NaN and infinity",
    "absurd safetensors headers", "symbolic links, folders, pipes", "noise",
]  # fmt: skip
GENERAL_FAULTS = {name: files.FAULTS[name][0] for name in GENERAL}


def change_somewhere(rng: random.Random, value, choices: list):
    """Return JSON with one value in it replaced, taken out, or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        changed = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.15:
            del changed[key]
        elif rng.random() < 0.1 and isinstance(changed, list):
            changed.append(changed[key])
        else:
            changed[key] = change_somewhere(rng, changed[key], choices)
        return changed
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, -value, value * 2, value * 1.0])
    return rng.choice(choices)


def odd_text(path: str):
    """Make a fault of a JSON file: one of its values is another, or it is no JSON."""

    def fault(rng, found, root):
        if rng.random() < 0.3:
            found[path] = files.broken_text(rng, found[path])
            return
        value = change_somewhere(rng, json.loads(found[path]), [*files.ODD, *files.HUGE])
        found[path] = json.dumps(value).encode()

    return fault


def swap_files(rng, found, root):
    """Two files in each other's place."""
    a, b = rng.sample(sorted(name for name in found if name.endswith(".safetensors")), 2)
    found[a], found[b] = found[b], found[a]


def own_digest_matches(found: Files) -> bool:
    """Return whether every safetensors file has the digest that it carries, or carries none."""
    for name in found:
        if isinstance(found[name], files.Link):
            return False
        if name.endswith(".safetensors"):
            tensors, metadata = files.tensors_of(found[name])
            if metadata.get("terdit.sha256") not in (None, files.digest(tensors)):
                return False
    return True


def digest_of(tensors: dict[str, Tensor], text: str = "") -> str:
    """Return a digest of the bits of tensors."""
    return files.digest({name: files.to_entry(tensor) for name, tensor in tensors.items()}) + text


# The kinds of files. The page shows the first lines of their docstrings.


class Adapters:
    """LoRA adapters, loaded into a packed model, used, and taken out; afterwards the model's own weights are
    compared."""

    count = 4000

    def make(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = self.model()
        targets = ["to_q", "to_v", "to_out.0", "down_proj"]
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
        model.save_lora_adapter(folder)

    def model(self):
        return kills.tiny_transformer(1e-5).pack()

    def start(self, folder: Path) -> None:
        self.kept = self.model()
        self.weights = digest_of(self.kept.state_dict())
        sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.inputs = (sample, torch.tensor([3, 700]), torch.tensor([0, 3]))

    def use(self, folder: Path) -> str:
        model = self.kept
        try:
            with torch.no_grad():
                model.load_lora_adapter(folder)
                self.loaded = get_peft_model_state_dict(model, adapter_name=model.active_adapters()[0])
                found = digest_of({**self.loaded, "output": model(*self.inputs).sample})
                model.unload_lora()
                assert digest_of(model.state_dict()) == self.weights, "an adapter has changed the model's own weights"
            return found
        except Exception as error:
            self.kept, left = self.model(), model.state_dict()
            own = {name.replace(".base_layer", ""): tensor for name, tensor in left.items() if "lora_" not in name}
            assert digest_of(own) == self.weights, "an adapter has changed the model's own weights"
            if own.keys() != left.keys():
                raise RuntimeError("a refused adapter has left its layers in the model") from error
            raise

    def says(self, found: Files) -> bool:
        """Return whether what was loaded is what the file says, and its digest and settings agree with it."""
        tensors, metadata = files.tensors_of(found[LORA_WEIGHT_NAME_SAFE])
        settings = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        config = metadata.get("terdit.config")
        values = files.as_values(tensors)
        loaded = {name: tensor.float() for name, tensor in self.loaded.items()}
        return (
            (config is None or json.loads(config) == settings)
            and loaded.keys() == values.keys()
            and all(torch.equal(tensor, values[name]) for name, tensor in loaded.items())
        )

    def own_tensors(rng, found, root):
        """Tensors with the names of the model's own weights, under other names of layers, or with huge numbers."""
        tensors, metadata = files.tensors_of(found[LORA_WEIGHT_NAME_SAFE])
        own = kills.tiny_transformer(1e-5).pack().state_dict()
        name = rng.choice(sorted(own))
        layer, _, leaf = name.rpartition(".")
        data = bytes([rng.choice([0, 255, 60])]) * own[name].nbytes
        entry = (files.to_entry(own[name])[0], list(own[name].shape), data)
        tensors[rng.choice([name, f"{layer}.base_layer.{leaf}", f"base_model.model.{name}"])] = entry
        if rng.random() < 0.3:
            name = rng.choice(sorted(key for key in tensors if "lora_" in key))
            tensors[name] = files.to_entry(torch.full(tensors[name][1], rng.choice([1e30, -1e38])))
        if rng.random() < 0.6:
            metadata["terdit.sha256"] = files.digest(tensors)
        found[LORA_WEIGHT_NAME_SAFE] = files.write(tensors, metadata)

    def settings(rng, found, root):
        """Other settings: values of other types, regular expressions, other methods; no JSON."""
        tensors, metadata = files.tensors_of(found[LORA_WEIGHT_NAME_SAFE])
        text = metadata[LORA_ADAPTER_METADATA_KEY]
        words = [r"(\w+\.?)+!", [r"(\w+\.?)+!"], "*", "all-linear", {r"(\w+\.?)+!": 3}, "eva", "pissa", "corda"]
        if rng.random() < 0.15:
            changed = files.broken_text(rng, text.encode()).decode("utf-8", "replace")
        else:
            settings = json.loads(text)
            for _ in range(rng.choice([1, 1, 3])):
                settings = change_somewhere(rng, settings, [*files.ODD, *files.HUGE, *words])
            changed = json.dumps(settings)
        metadata[LORA_ADAPTER_METADATA_KEY] = changed
        if (choice := rng.randrange(3)) == 0:
            del metadata["terdit.config"]
        elif choice == 1:
            metadata["terdit.config"] = changed
        if rng.random() < 0.1:
            del metadata[rng.choice(sorted(metadata))]
        found[LORA_WEIGHT_NAME_SAFE] = files.write(tensors, metadata)

    faults = {**GENERAL_FAULTS, "tensors of the model": own_tensors, "settings": settings}


class Checkpoints:
    """Training checkpoints: `examples/train_terdit.py` resumes from step 4 of 8; its last checkpoint and its model are
    compared."""

    count = 400

    def train(self, images: Path, folder: Path) -> None:
        kills.train_terdit.main(["--train_data_dir", str(images), *kills.TINY, "--output_dir", str(folder),
                                 "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "9"])  # fmt: skip

    def make(self, folder: Path) -> None:
        shutil.rmtree(folder)
        kills.make_images(folder.parent / "images", 8, 8)
        self.train(folder.parent / "images", folder)
        for name in ("checkpoint-2", "checkpoint-6", "checkpoint-8", "samples", "transformer", "scheduler"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for path in folder.iterdir():
            if path.is_file() and path.name != "log.jsonl":
                path.unlink()
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "log.jsonl"]

    def start(self, folder: Path) -> None:
        self.images = folder.parent / "images"

    def use(self, folder: Path) -> str:
        self.train(self.images, folder)
        names = [f"checkpoint-8/{name}" for name in ("model", "ema", "optimizer")]
        names = [f"{name}.safetensors" for name in names] + ["transformer/diffusion_pytorch_model.safetensors"]
        return json.dumps([files.digest(files.tensors_of((folder / name).read_bytes())[0]) for name in names])

    def says(self, found: Files) -> bool:
        """Return whether the state is the one in every file, and the config that of the run."""
        state = json.loads(found["checkpoint-4/training_state.json"])
        marks = [
            files.tensors_of(data)[1].get("terdit.state") for name, data in found.items() if "safetensors" in name
        ]
        return all(mark is not None and json.loads(mark) == state for mark in marks)

    def log(rng, found, root):
        """Lines of the log that are no JSON, no records, or not UTF-8."""
        lines = found["log.jsonl"].splitlines()
        odd = [b"{}", b"null", b"[1]", b"\xff", b'{"step": "a"}', b'{"step": null}', b'{"step": 1e99}', b"[" * 10**5]
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(odd))
        found["log.jsonl"] = b"\n".join(lines) + b"\n"

    STATE = "checkpoint-4/training_state.json"
    faults = {
        **GENERAL_FAULTS, "exchanged files": swap_files, "training_state.json": odd_text(STATE),
        "config.json": odd_text("checkpoint-4/config.json"), "log.jsonl": log,
    }  # fmt: skip


class Latents:
    """Cached latents of `examples/cache_latents.py`: all of them are read."""

    count = 2000

    def make(self, folder: Path) -> None:
        tiny_vae().save_pretrained(folder.parent / "vae")
        kills.make_images(folder.parent / "images", 10, 16)
        kills.cache_latents.main([
            "--train_data_dir", str(folder.parent / "images"), "--resolution", "16", "--shard_size", "5",
            "--pretrained_vae_model_name_or_path", str(folder.parent / "vae"), "--output_dir", str(folder),
        ])  # fmt: skip

    def start(self, folder: Path) -> None:
        pass

    def use(self, folder: Path) -> str:
        samples = training.data.LatentSamples(folder)
        codec = training.data.LatentCodec(cache=samples.info)
        read = [samples.get(i, flipped) for i in range(len(samples)) for flipped in (False, True)]
        self.moments = torch.stack([moments for moments, _ in read])
        self.labels = torch.tensor([label for _, label in read])
        text = repr([samples.id2label, samples.flip, codec.scale, codec.latent_shape(16, 3)])
        return digest_of({"moments": self.moments, "labels": self.labels}, text)

    def says(self, found: Files) -> bool:
        """Return whether the numbers are those of the shards, finite and in their range, and the index is theirs."""
        info = json.loads(found["latents.json"])
        moments, labels = [], []
        for shard in info["shards"]:
            tensors, metadata = files.tensors_of(found[shard["name"]])
            values = files.as_values(tensors)
            pairs = torch.stack([values["moments"], values["moments_flipped"]], dim=1)
            moments.append(pairs.flatten(0, 1))
            labels.append(values["labels"].repeat_interleave(2))
            config = {key: value for key, value in info.items() if key != "shards"}
            if json.loads(metadata.get("terdit.config", json.dumps(config))) != config:
                return False
        return torch.equal(torch.cat(moments), self.moments) and torch.equal(torch.cat(labels), self.labels)

    def values(rng, found, root):
        """Labels and deviations out of their range, in shards that have the digest of what they hold."""
        path = rng.choice(sorted(name for name in found if name.endswith(".safetensors")))
        tensors, metadata = files.tensors_of(found[path])
        name = rng.choice(sorted(tensors))
        tensor = files.to_tensor(*tensors[name])
        place = tuple(rng.randrange(size) for size in tensor.shape)
        tensor[place] = rng.choice([-1, 2, 10**4, -tensor[place], float("nan") if name != "labels" else 2**62])
        tensors[name] = files.to_entry(tensor)
        metadata["terdit.sha256"] = files.digest(tensors)
        found[path] = files.write(tensors, metadata)
        if rng.random() < 0.7:
            info = json.loads(found["latents.json"])
            for shard in info["shards"]:
                shard["sha256"] = files.tensors_of(found[shard["name"]])[1].get("terdit.sha256")
            found["latents.json"] = json.dumps(info).encode()

    faults = {
        **GENERAL_FAULTS, "exchanged files": swap_files, "latents.json": odd_text("latents.json"),
        "out of range": values,
    }  # fmt: skip


def flip(rng, found, root):
    """1 to 4 bits anywhere, or in the first hundred bytes."""
    ((name, data),) = found.items()
    changed = bytearray(data)
    end = rng.choice([len(data), min(100, len(data))])
    for _ in range(rng.choice([1, 1, 2, 4])):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    found[name] = bytes(changed)


def overwrite(rng, found, root):
    """A number of 1 to 4 bytes, such as a size, that is 0, very large, or anything."""
    ((name, data),) = found.items()
    width, place = rng.choice([1, 2, 4]), rng.randrange(min(len(data), rng.choice([64, 10**9])))
    value = rng.choice([b"\0" * width, b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), rng.randbytes(width)])
    found[name] = data[:place] + value + data[place + width :]


def cut(rng, found, root):
    """Cut, or with more bytes at the end."""
    ((name, data),) = found.items()
    end = rng.randrange(len(data) + 1)
    found[name] = data[:end] if rng.random() < 0.9 else data + rng.randbytes(end)


class Images:
    """Images of every format that Pillow writes here, including PostScript and others that are never read, read as
    training reads them; a healthy one follows each."""

    count = 200_000

    def make(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (24, 20, 4), dtype=np.uint8)
        smooth = np.add.outer(np.arange(24) * 5, np.arange(20) * 5).astype(np.uint8)
        pictures = {
            "RGB": Image.fromarray(noise[..., :3]), "L": Image.fromarray(smooth), "RGBA": Image.fromarray(noise),
            "P": Image.fromarray(smooth).convert("P"), "1": Image.fromarray(smooth).convert("1"),
            "I;16": Image.fromarray(smooth.astype(np.uint16) * 257), "F": Image.fromarray(smooth.astype(np.float32)),
        }  # fmt: skip
        Image.init()
        for name in sorted(Image.SAVE):
            for mode, picture in pictures.items():
                buffer = io.BytesIO()
                try:
                    picture.save(buffer, format=name)
                except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not in this mode
                    continue
                (folder / f"{name}-{mode.replace(';', '_')}.png").write_bytes(buffer.getvalue())
        assert len(list(folder.iterdir())) > 50

    def start(self, folder: Path) -> None:
        self.healthy = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.next = Image.new("RGB", (8, 8), (255, 0, 0))
        self.log = io.StringIO()
        training.data.logger.addHandler(logging.StreamHandler(self.log))
        training.data.logger.setLevel(logging.WARNING)

    def read(self, name: str, data: bytes) -> tuple[str, Tensor]:
        """Read an image, or the one after it, as training does."""
        self.log.seek(0)
        self.log.truncate()
        sources = [{"bytes": data, "path": name}, self.next]
        image, label = training.data.ImageSamples(sources, [0, 1], {0: "a", 1: "b"}, resolution=16)[0]
        assert image.shape == (3, 16, 16), "another shape"
        assert image.isfinite().all(), "not finite"
        assert image.abs().max() <= 1, "out of range"
        assert bool(label) == bool(self.log.getvalue()), "a line in the log for an image that was read, or none"
        assert not label or name in self.log.getvalue(), "the line in the log does not name the image"
        return ("left out" if label else "read"), image

    faults = {"bit flips": flip, "other numbers": overwrite, "cut or lengthened": cut}


KINDS = {"adapters": Adapters, "checkpoints": Checkpoints, "latents": Latents, "images": Images}


def run_case(kind: str, subject, seed: int, number: int, healthy: Files, same: str, root: Path) -> dict:
    """Use the files of one case; return its outcome, time and memory."""
    rng = random.Random(f"{seed}:{number}")
    fault = list(subject.faults)[number % len(subject.faults)]
    found: Files = dict(healthy)
    if kind == "images":
        name = rng.choice(sorted(healthy))
        found = {name: healthy[name]}
    subject.faults[fault](rng, found, root)
    result = {"number": number, "fault": fault, "kind": kind, "detail": ""}
    folder = root / "case"
    start, before = time.perf_counter(), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    names = {str(folder), *(Path(name).name for name in healthy)}
    try:
        if kind == "images":
            ((name, data),) = found.items()
            outcome, image = subject.read(name, data)
            if outcome == "read":
                whole, expected = subject.read(name, healthy[name])
                outcome = "the same" if whole == "read" and torch.equal(image, expected) else "as the files say"
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            files.place(folder, found, {})
            if subject.use(folder) == same:
                outcome = "the same"
            else:
                outcome = "as the files say" if own_digest_matches(found) and subject.says(found) else "silent"
    except (Exception, SystemExit) as error:  # each is counted
        result["detail"] = f"{type(error).__name__}: {error}"
        if isinstance(error, (ValueError, OSError, SystemExit)):
            outcome = "ValueError" if isinstance(error, ValueError) else "OSError"
            outcome = outcome if any(name in str(error) for name in names) else "unnamed"
        else:
            outcome = {MemoryError: "memory", AssertionError: "silent"}.get(type(error), "other")
        if outcome in BAD:
            result["trace"] = traceback.format_exc()[-3000:]
    result["detail"] = result["detail"][:300]
    peak = max(0, memory("VmHWM") - before)
    return result | {"outcome": outcome, "seconds": time.perf_counter() - start, "bytes": peak}


def worker(kind: str, seed: int, folder: Path) -> None:
    """Read case numbers from standard input, write a line with each result."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for library in (diffusers.utils.logging, transformers.logging):
        library.set_verbosity(60)
        library.disable_progress_bar()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subject, base = KINDS[kind](), folder / "base"
    subject.start(base)
    healthy, same = kills.files_of(base), ""
    if kind != "images":
        kills.place(folder / "case", healthy)
        same = subject.use(folder / "case")
        kills.place(folder / "case", healthy)
        assert subject.use(folder / "case") == same, "not the same twice"
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + MEMORY,) * 2)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        result = run_case(kind, subject, seed, int(line), healthy, same, folder)
        print(json.dumps(result), file=out, flush=True)


def run(kind: str, inputs: int, seed: int, progress: Path | None = None) -> dict:
    """Try cases 0 to `inputs` of a kind and count their outcomes."""

    def prepare(folder: Path) -> None:
        (folder / "base").mkdir()
        KINDS[kind]().make(folder / "base")

    faults = list(KINDS[kind].faults)
    return supervise(
        __file__, ["--kind", kind], inputs, seed, prepare, lambda number: faults[number % len(faults)], BAD, progress
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, subject in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=subject.count, help=f"cases, default {subject.count}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.kind, args.seed, args.worker)
        return
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report: dict = {"seed": args.seed, "kinds": {}}
    for kind in KINDS:
        progress = args.output_dir / f"reliability_data_files.{kind}.progress.json"
        report["kinds"][kind] = run(kind, getattr(args, kind), args.seed, progress)
    report["machine"], report["versions"] = processor(), versions(torch, diffusers, safetensors, PIL)
    write_report(args.output_dir / "reliability_data_files.json", report)
    failures = [failure for found in report["kinds"].values() for failure in found["failures"]]
    for failure in failures[:40]:
        print(failure["number"], failure["kind"], failure["fault"], failure["outcome"], failure["detail"])
    for kind in KINDS:
        (args.output_dir / f"reliability_data_files.{kind}.progress.json").unlink()
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
