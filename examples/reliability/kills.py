"""Kill programs, fill their disk, or run two at once: `python examples/reliability/kills.py --kills 200`.

Six programs write into a folder that holds something already. Each is killed with SIGKILL at random moments: spread
over the time that it takes, before one of its file operations, or some milliseconds after one. Then the folder is
compared, bit by bit, with what was there before and with what an undisturbed program leaves, and the program is run
again: it must end like the undisturbed one. The same with a full and a read-only disk (a tmpfs, where this process may
mount one), a folder without permission, and two programs at once.

One process imports everything; each program is a fork of it. `page.py` writes docs/results/reliability.md.
"""

import argparse
import ctypes
import io
import json
import logging
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import (
    DiffusionPipeline,
    TerDiTPipeline,
    TerDiTTransformer2DModel,
    TernaryLinear,
    cli,
    evaluation,
    training,
)
from diffusers_terdit.pipelines.schedulers import default_scheduler
from harness import make_bases, parse, randomize, tiny_vae, versions, write_report


sys.path.append(str(Path(__file__).parents[1]))
import cache_latents
import evaluate
import train_terdit


INTERRUPTED = "was interrupted, or is under way"
TINY = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "8", "--ffn_dim", "16"]
TINY += ["--resolution", "8", "--train_batch_size", "4", "--lr_warmup_steps", "1", "--lr_decay_steps", "2"]
TINY += ["--logging_steps", "1", "--num_validation_images", "2", "--num_inference_steps", "2"]
TINY += ["--max_train_steps", "8", "--checkpointing_steps", "2", "--validation_steps", "4"]
TEMPORARY = (".partial", ".saving", ".lock")  # what may be left of a process that was killed

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    """Every file below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def whole(folder: Path) -> list[str]:
    """The files below a folder that are not temporary, or in a temporary folder."""
    return [name for name in files_of(folder) if not any(part.endswith(TEMPORARY) for part in Path(name).parts)]


def canonical(name: str, data: bytes) -> bytes:
    """A file's bytes; safetensors writes the metadata of a file in an order that differs from one time to the next."""
    if not name.endswith(".safetensors"):
        return data
    header, body = parse(data)
    return json.dumps(header, sort_keys=True).encode() + body


def place(folder: Path, files: Files) -> None:
    """Make a folder that holds these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def tiny_transformer(norm_eps: float, in_channels: int = 3) -> TerDiTTransformer2DModel:
    """A model whose weights are a function of `norm_eps`."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4}
    model = TerDiTTransformer2DModel(**sizes, ffn_dim=32, in_channels=in_channels, norm_eps=norm_eps)
    return randomize(model, seed=int(norm_eps * 1e7)).eval()


def tiny_pipeline(norm_eps: float, vae: bool = False) -> TerDiTPipeline:
    labels = {str(i): f"{name} {norm_eps}" for i, name in enumerate(["zero", "one", "two", "three"])}
    model = tiny_transformer(norm_eps, in_channels=4 if vae else 3)
    return TerDiTPipeline(model, default_scheduler(), tiny_vae(int(norm_eps * 1e7)) if vae else None, labels)


def make_images(folder: Path, count: int, side: int) -> None:
    """Write pictures of noise into two class folders."""
    for i in range(count):
        path = folder / ["ant", "bee"][i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


# The programs. The page shows the first lines of their docstrings.


class Program:
    """Work for a child process, and what may be found in its folder afterwards.

    `variants` are kinds of runs; `old` is what is in the folder before, `new` what an undisturbed run leaves.
    """

    variants: tuple[str, ...] = ("",)

    def __init__(self, root: Path):
        self.root = root / type(self).__name__
        self.root.mkdir()
        self.old: dict[str, Files] = {variant: {} for variant in self.variants}
        self.new: dict[str, Files] = {}
        self.seconds: dict[str, float] = {}
        self.events: dict[str, int] = {}

    def run(self, variant: str, folder: Path) -> None:
        """Do the work, in the child process."""
        raise NotImplementedError

    def other(self, variant: str, folder: Path) -> None:
        """Do what a second process does in the folder meanwhile: the same, or what was there before once more."""
        self.run(variant, folder)

    def state(self, variant: str, folder: Path) -> str:
        """Judge the folder: "old", "new", "interrupted" (and says so), or "part"; anything else raises."""
        raise NotImplementedError

    def check_new(self, variant: str, folder: Path, names: list[str]) -> None:
        """Raise unless these files are those of an undisturbed run."""
        for name in names:
            data = (folder / name).read_bytes()
            assert canonical(name, data) == canonical(name, self.new[variant][name]), f"{name} is torn"

    def same(self, files: Files) -> Files:
        """Select what must be the same in the end."""
        return {name: canonical(name, data) for name, data in files.items()}

    def finished(self, variant: str, folder: Path) -> None:
        """Raise unless the folder holds what an undisturbed run leaves, and nothing else."""
        found, wanted = self.same(files_of(folder)), self.same(self.new[variant])
        assert found.keys() == wanted.keys(), f"files differ: {sorted(found.keys() ^ wanted.keys())}"
        different = [name for name in found if found[name] != wanted[name]]
        assert not different, f"other bytes than of an undisturbed run: {different}"
        self.state(variant, folder)


class Saving(Program):
    """Loads the folder, and compares what is loaded with the two models that may be there."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.known: dict[str, dict[str, tuple[dict, str]]] = {}  # variant -> contents of "old" and "new"

    def keep_as_old(self, variant: str) -> None:
        self.old[variant] = files_of(self.root / "old")
        shutil.rmtree(self.root / "old")

    def load(self, variant: str, folder: Path):
        raise NotImplementedError

    def contents(self, loaded) -> tuple[dict, str]:
        """Weights, and everything else as text."""
        raise NotImplementedError

    def state(self, variant: str, folder: Path) -> str:
        if not self.old[variant] and not whole(folder):
            return "old"  # nothing was there, and nothing is
        if variant not in self.known:
            self.known[variant] = {}
            for name, files in (("old", self.old[variant]), ("new", self.new[variant])):
                place(self.root / "known", files)
                if files:
                    self.known[variant][name] = self.contents(self.load(variant, self.root / "known"))
        try:
            weights, text = self.contents(self.load(variant, folder))
        except OSError as error:
            if INTERRUPTED in str(error) and str(folder) in str(error):
                return "interrupted"
            raise
        for name, (known, known_text) in self.known[variant].items():
            equal = weights.keys() == known.keys() and all(torch.equal(weights[key], known[key]) for key in known)
            if text == known_text and equal:
                return name
        raise AssertionError("neither the old nor the new")


class Models(Saving):
    """`save_pretrained` of a model, over another one: one file, shards, a layer; over another layout."""

    variants = ("one file", "shards", "layer", "shards to one file", "one file to shards")

    def __init__(self, root: Path):
        super().__init__(root)
        for variant in self.variants:
            self.other(variant, self.root / "old")
            self.keep_as_old(variant)

    def save(self, variant: str, layout: str, folder: Path, norm_eps: float) -> None:
        if variant == "layer":
            torch.manual_seed(int(norm_eps * 1e7))
            TernaryLinear(16, 8, bias=norm_eps < 5e-5).save_pretrained(folder)
        else:
            options = {"max_shard_size": "8KB"} if layout == "shards" else {}
            tiny_transformer(norm_eps).save_pretrained(folder, **options)

    def run(self, variant: str, folder: Path) -> None:
        self.save(variant, variant.split(" to ")[-1], folder, 1e-4)

    def other(self, variant: str, folder: Path) -> None:
        self.save(variant, variant.split(" to ")[0], folder, 1e-5)

    def load(self, variant: str, folder: Path):
        return (TernaryLinear if variant == "layer" else TerDiTTransformer2DModel).from_pretrained(folder)

    def contents(self, loaded) -> tuple[dict, str]:
        return loaded.state_dict(), loaded.to_json_string()


class Pipelines(Saving):
    """`save_pretrained` of a pipeline with a VAE over another one; whole files, and shards."""

    variants = ("one file", "shards")

    def __init__(self, root: Path):
        super().__init__(root)
        for variant in self.variants:
            self.other(variant, self.root / "old")
            (self.root / "old" / "notes.txt").write_text("the user's own")
            self.keep_as_old(variant)

    def run(self, variant: str, folder: Path) -> None:
        options = {"max_shard_size": "8KB"} if variant == "shards" else {}
        tiny_pipeline(1e-4, vae=True).save_pretrained(folder, **options)

    def other(self, variant: str, folder: Path) -> None:
        tiny_pipeline(1e-5, vae=True).save_pretrained(folder)

    def load(self, variant: str, folder: Path):
        self.turn = not getattr(self, "turn", False)  # the two ways to load it, in turns
        return (TerDiTPipeline if self.turn else DiffusionPipeline).from_pretrained(folder)

    def contents(self, loaded) -> tuple[dict, str]:
        parts = {name: getattr(loaded, name) for name in ("transformer", "vae") if getattr(loaded, name) is not None}
        weights = {f"{part}.{n}": tensor for part, model in parts.items() for n, tensor in model.state_dict().items()}
        config = [loaded.config["id2label"], loaded.config["guidance_channels"]]
        return weights, repr([loaded.transformer.to_json_string(), loaded.scheduler.to_json_string(), *config])


class Convert(Pipelines):
    """`terdit convert`: the authors' files over an older pipeline; dense ternary weights into a new folder."""

    variants = ("original", "dense")

    def __init__(self, root: Path):
        Saving.__init__(self, root)
        make_bases(self.root / "bases")
        tiny_pipeline(1e-5).save_pretrained(self.root / "old")
        self.keep_as_old("original")

    def run(self, variant: str, folder: Path) -> None:
        words = ["convert", str(self.root / "bases" / variant), str(folder)]
        flags = ["--num_attention_heads", "2", "--overwrite"] * (variant == "original")
        args = cli.build_parser().parse_args([*words, *flags])
        converted = variant == "dense" and folder.is_dir() and any(folder.iterdir())  # before a kill
        try:
            args.run(args)  # without what makes one line of an error
        except FileExistsError:
            if not converted:
                raise
        else:
            assert not converted, "it was converted twice"

    other = Program.other

    def load(self, variant: str, folder: Path):
        return DiTTransformer2DModel.from_pretrained(folder) if variant == "dense" else super().load(variant, folder)

    def contents(self, loaded) -> tuple[dict, str]:
        return (loaded.state_dict(), "") if hasattr(loaded, "state_dict") else super().contents(loaded)


class Train(Saving):
    """`examples/train_terdit.py`, over an older model: from nothing, and again from a checkpoint before the last."""

    variants = ("from nothing", "from an earlier checkpoint")
    kept = 2

    def __init__(self, root: Path):
        super().__init__(root)
        make_images(self.root / "images", 8, 8)
        tiny_pipeline(1e-5).save_pretrained(self.root / "old")
        (self.root / "old" / "README.md").write_text("---\ntags:\n- mine\n---\n# Mine\n\nThe author's own text.\n")
        self.keep_as_old("from nothing")
        # All checkpoints of an undisturbed run; the second variant starts with the last ones.
        place(self.root / "all", self.old["from nothing"])
        done(fork(lambda: self.call(self.root / "all", "--checkpoints_total_limit", "9"), self.root / "log"))
        paths = training.checkpointing.find(self.root / "all")
        self.all = {path.name: files_of(path) for path in paths}
        for path in paths[: -self.kept]:
            shutil.rmtree(path)
        self.old["from an earlier checkpoint"] = files_of(self.root / "all")

    def call(self, folder: Path, *flags: str) -> None:
        images = ["--train_data_dir", str(self.root / "images")]
        train_terdit.main([*images, *TINY, "--output_dir", str(folder), *flags])

    def run(self, variant: str, folder: Path) -> None:
        found = training.checkpointing.find(folder)
        first = variant == "from an earlier checkpoint" and len(found) == self.kept and found[-1].name[-1] == "8"
        self.call(folder, "--checkpoints_total_limit", str(self.kept), "--resume_from_checkpoint",
                  str(found[0]) if first else "latest")  # fmt: skip

    load, contents = Pipelines.load, Pipelines.contents

    def same(self, files: Files) -> Files:
        """Leave out of the log how fast it was."""
        lines = [json.loads(line) for line in files.get("log.jsonl", b"").decode().splitlines()]
        lines = [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]
        return {**super().same(files), "log.jsonl": json.dumps(lines).encode()}

    def state(self, variant: str, folder: Path) -> str:
        found = training.checkpointing.find(folder)
        before = {name.split("/")[0] for name in self.old[variant] if name.startswith("checkpoint-")}
        assert len(found) >= len(before) - 1, "checkpoints are lost"
        for path in found:
            kept, right = (super(Train, self).same(files) for files in (files_of(path), self.all[path.name]))
            assert kept == right, f"{path.name} is not that of its step"
        if found:
            self.load_checkpoint(found[-1])
        for name in ("README.md", *(f"samples/step-{step}.png" for step in (4, 8))):
            data = (folder / name).read_bytes() if (folder / name).exists() else None
            assert data in (self.old[variant].get(name), self.new[variant][name]), f"{name} is torn"
        pipeline = super().state(variant, folder)
        return "part" if found and pipeline == "old" and variant != "from an earlier checkpoint" else pipeline

    def load_checkpoint(self, path: Path) -> None:
        config = TerDiTTransformer2DModel.load_config(path)
        model, average = (TerDiTTransformer2DModel.from_config(config) for _ in range(2))
        optimizer = training.muon.Muon(training.recipes.parameter_groups(model, muon=True))
        state = training.checkpointing.load(path, model, average, optimizer)
        assert f"checkpoint-{state['step']}" == path.name


class Cache(Program):
    """`examples/cache_latents.py` with a VAE, four shards."""

    def __init__(self, root: Path):
        super().__init__(root)
        tiny_vae().save_pretrained(self.root / "vae")
        make_images(self.root / "images", 14, 16)

    def run(self, variant: str, folder: Path) -> None:
        sizes = ["--resolution", "16", "--shard_size", "4", "--batch_size", "2"]
        source = ["--train_data_dir", str(self.root / "images")]
        vae = ["--pretrained_vae_model_name_or_path", str(self.root / "vae")]
        cache_latents.main([*source, *vae, *sizes, "--output_dir", str(folder)])

    def state(self, variant: str, folder: Path) -> str:
        names = whole(folder)
        self.check_new(variant, folder, names)
        try:
            samples = training.data.LatentSamples(folder)
        except OSError as error:
            if training.data.LATENTS_NAME in names or "holds no whole latent cache" not in str(error):
                raise
            return "part" if names else "old"
        assert len([samples[i] for i in range(len(samples))]) == 14
        return "new"


class Evaluate(Program):
    """`examples/evaluate.py`: samples, pictures, statistics of a reference, report."""

    def __init__(self, root: Path):
        super().__init__(root)
        tiny_pipeline(1e-5).save_pretrained(self.root / "model")
        np.save(self.root / "reference.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))

    def run(self, variant: str, folder: Path) -> None:
        sizes = ["--num_images", "10", "--batch_size", "2", "--num_inference_steps", "2", "--save_images"]
        network = ["--feature_network", "harness:features", "--reference", str(self.root / "reference.npy")]
        evaluate.main(["--model", str(self.root / "model"), *sizes, *network, "--output_dir", str(folder)])

    def state(self, variant: str, folder: Path) -> str:
        place(self.root / "new", {"samples.npz": self.new[variant]["samples.npz"]})
        samples = evaluation.open_samples(self.root / "new" / "samples.npz")
        names = whole(folder)
        parts = [name for name in names if name.startswith("parts/")]
        for name in parts:
            first, last = map(int, Path(name).stem.split("-"))
            images = load_file(folder / name)["images"].numpy()
            assert np.array_equal(images, samples[first : last + 1]), f"{name} is torn"
        self.check_new(variant, folder, [name for name in names if name not in parts])
        return "new" if "report.md" in names else "part" if names else "old"


PROGRAMS = {
    "training": Train,
    "save_pretrained, models": Models,
    "save_pretrained, pipelines": Pipelines,
    "terdit convert": Convert,
    "latent caching": Cache,
    "evaluation": Evaluate,
}


# Child processes


class Child:
    """A fork that runs something."""

    def __init__(self, pid: int, result: io.BufferedReader):
        self.pid, self.result = pid, result

    def wait(self) -> dict | None:
        """Return its result; None where it was killed."""
        with self.result:
            text = self.result.read()
        os.waitpid(self.pid, 0)
        return json.loads(text) if text.endswith(b"\n") else None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")


def watch(folder: Path, act: Callable[[int], object]) -> Callable[[], int]:
    """Call `act(n)` before the n-th operation that changes a file below a folder; return a counter of them."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in WATCHED or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if not os.fsdecode(args[0]).startswith(str(folder)):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        act(count)
        count += 1

    sys.addaudithook(hook)
    return lambda: count


def fork(work: Callable[[], None], log: Path, before: Callable[[], Callable[[], int]] | None = None) -> Child:
    """Run something in a fork of this process; the result has its error, seconds and file operations."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Child(pid, os.fdopen(read, "rb"))
    os.close(read)
    torch.set_num_threads(1)  # makes torch's pool again; two threads doing so at once fail: "Invalid thread pool!"
    result: dict = {}
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        counted = before() if before is not None else lambda: 0
        started = time.monotonic()
        try:
            work()
        except (Exception, SystemExit) as error:
            result = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()[-3000:]}
            result |= {"os": isinstance(error, OSError)}
        result |= {"seconds": time.monotonic() - started, "events": counted()}
    finally:
        os.write(write, json.dumps(result).encode() + b"\n")
        os._exit(0)


def done(child: Child) -> dict:
    """Wait for a child that must succeed."""
    result = child.wait()
    assert result is not None, "it died"
    assert "error" not in result, result.get("trace")
    return result


def end(program: Program, variant: str, folder: Path) -> None:
    """Run a program once more: it must end like an undisturbed one."""
    done(fork(lambda: program.run(variant, folder), program.root / "log"))
    program.finished(variant, folder)


def unfinished(folder: Path) -> bool:
    """Whether something in a folder, or next to it, is half-written."""
    paths = [*folder.rglob("*"), *folder.parent.glob(f"{folder.name}.*")]
    return any(path.name.endswith(TEMPORARY) for path in paths)


# The trials. Each returns its outcome; an AssertionError or any other error is a failure.


MOMENTS = ("over the time", "before a file operation", "after a file operation")


def kill(program: Program, variant: str, folder: Path, rng: random.Random) -> dict | None:
    """Kill one to three times and judge the folder each time; then run to the end. None where nothing was killed."""
    place(folder, program.old[variant])
    report: dict = {"kills": 0, "states": Counter(), "moments": Counter(), "writing": 0}
    for _ in range(rng.choice([1, 1, 2, 3])):
        moment = rng.choice(MOMENTS)
        number, delay = rng.randrange(program.events[variant]), rng.random()
        read, write = os.pipe()

        def before(moment=moment, number=number, read=read, write=write):
            def act(count: int) -> None:
                if count == number and moment == "before a file operation":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif count == number and moment == "after a file operation":
                    os.write(write, b"1")

            os.close(read)
            return watch(folder, act)

        child = fork(lambda: program.run(variant, folder), program.root / "log", before)
        os.close(write)
        if moment == "over the time":
            time.sleep(program.seconds[variant] * delay)
            child.kill()
        elif os.read(read, 1):  # nothing where it has ended
            time.sleep(0.003 * delay)
            child.kill()
        os.close(read)
        result = child.wait()
        if result is not None:
            assert "error" not in result, result.get("trace")
            break  # it was faster
        report["kills"] += 1
        report["moments"][moment] += 1
        report["writing"] += unfinished(folder)
        report["states"][program.state(variant, folder)] += 1
    if not report["kills"]:
        return None
    end(program, variant, folder)
    return report


def refused(program: Program, variant: str, folder: Path, result: dict | None, advice: str) -> None:
    """Check that a run that could not write said so in one line, and left what was there."""
    assert result is not None, "it died"
    assert "error" in result, "it wrote"
    assert result["os"], result["trace"]
    assert "\n" not in result["message"], result["message"]
    for part in (str(folder), "cannot be written", f"{advice}, or choose another folder"):
        assert part in result["message"], result["message"]
    assert not unfinished(folder), "something is left half-written"
    state = program.state(variant, folder)
    assert state in ("old", "part") or (state == "new" and isinstance(program, (Train, Evaluate))), state


def full(program: Program, variant: str, folder: Path, rng: random.Random, disk: "Disk") -> str:
    """Run on a disk that fills at some point; then on one with room."""
    disk.resize(1 << 30)
    place(folder, program.old[variant])
    need = sum(-(-len(data) // 4096) * 4096 for data in program.new[variant].values())
    disk.resize(disk.used() + int(rng.random() * 1.2 * need))
    result = fork(lambda: program.run(variant, folder), program.root / "log").wait()
    if result is not None and "error" not in result:
        disk.resize(1 << 30)
        program.finished(variant, folder)
        return "fitted"
    refused(program, variant, folder, result, "Make room there")
    disk.resize(1 << 30)
    end(program, variant, folder)
    return "full"


def read_only(program: Program, variant: str, folder: Path, disk: "Disk") -> str:
    """Run on a disk that is mounted read-only; then on one that is not."""
    disk.resize(1 << 30)
    place(folder, program.old[variant])
    folder.mkdir(exist_ok=True)
    disk.resize(1 << 30, read_only=True)
    try:
        result = fork(lambda: program.run(variant, folder), program.root / "log").wait()
        refused(program, variant, folder, result, "Allow writing there")
    finally:
        disk.resize(1 << 30)
    assert files_of(folder) == program.old[variant]
    end(program, variant, folder)
    return "read-only disk"


def forbidden(program: Program, variant: str, folder: Path) -> str:
    """Run where the user may not write to the folder, nor to the one it is in; then where he may."""
    place(folder, program.old[variant])
    folder.mkdir(exist_ok=True)
    folders = [folder.parent, folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    for path in program.root.rglob("*"):
        path.chmod(0o755)  # to read for a user that is not the one who made it

    def work() -> None:
        if os.getuid() == 0:  # whom permissions do not stop
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        program.run(variant, folder)

    try:
        refused(program, variant, folder, fork(work, program.root / "log").wait(), "Allow writing there")
    finally:
        for path in folders:
            path.chmod(0o755)
    assert files_of(folder) == program.old[variant]
    end(program, variant, folder)
    return "folder without permission"


def twice(program: Program, variant: str, folder: Path, rng: random.Random) -> str:
    """Run two processes at once; in every second trial one of them is killed."""
    place(folder, program.old[variant])
    log, seconds = program.root / "log", program.seconds[variant]
    first = fork(lambda: program.run(variant, folder), log)
    time.sleep(seconds * rng.random() / 2)
    second = fork(lambda: program.other(variant, folder), log)
    killed = rng.random() < 0.5
    if killed:
        time.sleep(seconds * rng.random())
        rng.choice([first, second]).kill()
    results = [first.wait(), second.wait()]
    for result in results:
        if result is not None and "error" in result:
            assert result["os"], result["trace"]
            assert str(folder) in result["message"], result["trace"]
            assert "exists and is not an empty folder" in result["message"], result["trace"]
    ended = [result for result in results if result is not None and "error" not in result]
    state = program.state(variant, folder)
    assert ended or killed, "both were refused"
    if ended and not (isinstance(program, Saving) and None in results):  # the last word may be of the one killed
        assert state in ("old", "new") if isinstance(program, Saving) else state == "new", state
        assert not unfinished(folder) or None in results, "something is left half-written"
    end(program, variant, folder)
    return "one was killed" if None in results else "one was refused" if len(ended) < 2 else "both succeeded"


class Disk:
    """A tmpfs in a mount namespace of this process; `mounted` is False where that is not allowed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.libc = ctypes.CDLL(None, use_errno=True)
        folder.mkdir()
        user, group = os.getuid(), os.getgid()
        try:
            self.call("unshare", 0x00020000 | (0x10000000 if user else 0))  # CLONE_NEWNS, CLONE_NEWUSER
            if user:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            self.call("mount", b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC, MS_PRIVATE
            self.call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=1g")
            self.mounted = True
        except (OSError, AttributeError):
            self.mounted = False

    def call(self, name: str, *args) -> None:
        """Call a function of the C library."""
        if getattr(self.libc, name)(*args):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def resize(self, size: int, read_only: bool = False) -> None:
        data = f"size={max(size // 4096, 1) * 4096}".encode()  # none would be no limit
        flags = 0x20 | read_only  # MS_REMOUNT, MS_RDONLY
        self.call("mount", b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, data)

    def used(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


# A report


def trials(name: str, kills: int, others: int, seed: int, root: Path) -> dict:
    """Run all trials of one program."""
    started = time.monotonic()
    program = PROGRAMS[name](root)
    folder = root / "place" / "out"
    for variant in program.variants:
        place(folder, program.old[variant])
        child = fork(lambda v=variant: program.run(v, folder), program.root / "log", lambda: watch(folder, int))
        result = done(child)
        program.seconds[variant], program.events[variant] = result["seconds"], result["events"]
        program.new[variant] = files_of(folder)
        program.finished(variant, folder)
    report: dict = {"kills": 0, "resumed": 0, "writing": 0, "states": Counter(), "moments": Counter()}
    report |= {"disk": Counter(), "twice": Counter(), "failures": [], "mounted": None}
    report["seconds"] = max(program.seconds.values())

    def attempt(kind: str, number: int, trial: Callable[[str, random.Random], object]):
        rng = random.Random(f"{seed}:{name}:{kind}:{number}")
        variant = program.variants[number % len(program.variants)]
        try:
            return trial(variant, rng)
        except Exception as error:
            failure = {"trial": kind, "number": number, "variant": variant, "trace": traceback.format_exc()[-3000:]}
            report["failures"].append({**failure, "error": f"{type(error).__name__}: {error}"[:1000]})
            return None

    def repeat(table: str, kind: str, count: int, trial: Callable[[str, random.Random], object]) -> None:
        outcomes = [attempt(kind, number, trial) for number in range(count)]
        report[table].update(outcome for outcome in outcomes if outcome)

    number, once = 0, min(len(program.variants), others)
    while report["kills"] < kills and len(report["failures"]) < 20 and number < 10 * kills:
        found = attempt("kill", number, lambda variant, rng: kill(program, variant, folder, rng))
        number += 1
        if found:
            report["resumed"] += found["kills"]
            for key in ("kills", "writing", "states", "moments"):
                report[key] += found[key]
    repeat("twice", "twice", others, lambda variant, rng: twice(program, variant, folder, rng))
    repeat("disk", "forbidden", once, lambda variant, rng: forbidden(program, variant, folder))

    def disks() -> None:
        disk = Disk(root / "disk")
        place = disk.folder / "x" / "out"
        report["mounted"] = disk.mounted
        if disk.mounted:
            repeat("disk", "full", others, lambda variant, rng: full(program, variant, place, rng, disk))
            repeat("disk", "read-only", once, lambda variant, rng: read_only(program, variant, place, disk))
        (root / "disk.json").write_text(json.dumps(report))

    done(fork(disks, program.root / "log"))
    return {**json.loads((root / "disk.json").read_text()), "elapsed": time.monotonic() - started}


def run(kills: int, others: int, seed: int, names: list[str], progress: Path) -> dict:
    """Try the programs one after the other; a later call keeps those that passed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    for library in (diffusers.utils.logging, transformers.logging):
        library.set_verbosity(60)
        library.disable_progress_bar()
    logging.disable(logging.WARNING)
    report: dict = {"seed": seed, "wanted": [kills, others], "programs": {}}
    if progress.exists():
        saved = json.loads(progress.read_text())
        if (saved["seed"], saved["wanted"]) == (seed, [kills, others]):
            report["programs"] = {n: found for n, found in saved["programs"].items() if not found["failures"]}
    for name in names:
        if name in report["programs"]:
            continue
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(prefix="kills-", dir=shared) as folder:
            os.chmod(folder, 0o755)  # also for a child that gives its privileges away
            report["programs"][name] = found = trials(name, kills, others, seed, Path(folder))
        print(
            f"{name}: {found['kills']} kills, {len(found['failures'])} failures, {found['elapsed']:.0f} s", flush=True
        )
        progress.write_text(json.dumps(report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each program")
    parser.add_argument("--others", type=int, default=20, help="full disks, and pairs of processes, of each program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    progress = args.output_dir / "reliability_kills.progress.json"
    report = run(args.kills, args.others, args.seed, args.programs, progress)
    report["machine"] = f"{platform.machine()} CPU"
    report["versions"] = f"{versions(torch, diffusers)}, Linux {platform.release().split('-')[0]}"
    write_report(args.output_dir / "reliability_kills.json", report)
    failures = [(name, failure) for name, found in report["programs"].items() for failure in found["failures"]]
    for name, failure in failures[:20]:
        print(name, failure["trial"], failure["number"], failure["variant"], failure["error"])
    if failures:
        sys.exit(1)
    progress.unlink()


if __name__ == "__main__":
    main()
