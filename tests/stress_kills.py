"""Programs that are killed, run out of disk, or run twice at once: `python tests/stress_kills.py --kills 200`.

Six programs write into a folder that holds something already. Each is killed with SIGKILL at random moments: spread
over the time that it takes, before one of its file operations, or some milliseconds after one. Then what is in the
folder is compared, bit by bit, with what was there before and with what an undisturbed program leaves, and the program
is run again: it must end as the undisturbed one. The same with a full disk (a small tmpfs, or a limit on the size of a
file where this process may not mount one), a read-only disk, a folder without permission, and two programs at once.

One process imports everything; each program is a fork of it. The figures: docs/results/stress_kills.md.
"""

import argparse
import ctypes
import io
import json
import logging
import os
import platform
import random
import resource
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

import pytest

from stress_files import parse


ROOT = Path(__file__).parent.parent
INTERRUPTED = "was interrupted, or is under way"
TINY = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "8", "--ffn_dim", "16"]
TINY += ["--resolution", "8", "--train_batch_size", "4", "--lr_warmup_steps", "1", "--lr_decay_steps", "2"]
TINY += ["--logging_steps", "1", "--num_validation_images", "2", "--num_inference_steps", "2"]
TINY += ["--max_train_steps", "8", "--checkpointing_steps", "2", "--validation_steps", "4"]

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    """Every file below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TEMPORARY = (".partial", ".saving", ".lock")  # what may be left of a process that was killed


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
    if folder.is_dir():
        shutil.rmtree(folder)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def tiny_transformer(**config):
    import torch

    from diffusers_terdit import TerDiTTransformer2DModel
    from tiny import randomize

    settings = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    settings |= {"num_classes": 4, "ffn_dim": 32, "in_channels": 3, **config}
    torch.manual_seed(0)
    return randomize(TerDiTTransformer2DModel(**settings), seed=int(settings.get("norm_eps", 1e-6) * 1e7)).eval()


def tiny_vae(seed: int = 0):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = {"block_out_channels": (8, 8), "down_block_types": down, "up_block_types": up, "layers_per_block": 1}
    return AutoencoderKL(**sizes, latent_channels=4, norm_num_groups=4, sample_size=16).eval()


def tiny_pipeline(norm_eps: float, vae: bool = False):
    from diffusers_terdit import TerDiTPipeline
    from diffusers_terdit.pipelines.schedulers import default_scheduler

    labels = {str(i): f"{name} {norm_eps}" for i, name in enumerate(["zero", "one", "two", "three"])}
    model = tiny_transformer(norm_eps=norm_eps, in_channels=4 if vae else 3)
    return TerDiTPipeline(model, default_scheduler(), tiny_vae(int(norm_eps * 1e7)) if vae else None, labels)


def make_images(folder: Path, count: int, side: int) -> None:
    """Pictures of noise in two class folders."""
    import numpy as np
    from PIL import Image

    for i in range(count):
        path = folder / ["ant", "bee"][i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


# The programs


class Program:
    """What runs in a child process, and what may be found in its folder afterwards.

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
        """The work, in the child process."""
        raise NotImplementedError

    def other(self, variant: str, folder: Path) -> None:
        """What a second process does in the same folder meanwhile: the same, or what was there before once more."""
        self.run(variant, folder)

    def state(self, variant: str, folder: Path) -> str:
        """What is in the folder: "old", "new", "interrupted" (and says so), or "part"; anything else raises."""
        raise NotImplementedError

    def same(self, files: Files) -> Files:
        """What must be the same in the end."""
        return {name: canonical(name, data) for name, data in files.items()}

    def finished(self, variant: str, folder: Path) -> None:
        """Raise unless the folder holds what an undisturbed run leaves, and nothing else."""
        found, wanted = self.same(files_of(folder)), self.same(self.new[variant])
        assert found.keys() == wanted.keys(), f"files differ: {sorted(found.keys() ^ wanted.keys())}"
        different = [name for name in found if found[name] != wanted[name]]
        assert not different, f"other bytes than of an undisturbed run: {different}"
        self.state(variant, folder)


def weights_of(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one: dict, two: dict) -> bool:
    import torch

    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Saving(Program):
    """Loads the folder, and compares what is loaded with the two that may be there."""

    def load(self, variant: str, folder: Path):
        raise NotImplementedError

    def contents(self, loaded) -> tuple[dict, str]:
        raise NotImplementedError

    def known(self, variant: str) -> dict[str, tuple[dict, str]]:
        """Contents of "old" and "new", loaded once."""
        if variant not in self._known:
            self._known[variant] = {}
            for name, files in (("old", self.old[variant]), ("new", self.new[variant])):
                place(self.root / "known", files)
                if files:
                    self._known[variant][name] = self.contents(self.load(variant, self.root / "known"))
        return self._known[variant]

    def __init__(self, root: Path):
        super().__init__(root)
        self._known: dict[str, dict[str, tuple[dict, str]]] = {}

    def state(self, variant: str, folder: Path) -> str:
        if not self.old[variant] and not whole(folder):
            return "old"  # nothing was there, and nothing is
        try:
            weights, text = self.contents(self.load(variant, folder))
        except OSError as error:
            if INTERRUPTED in str(error) and str(folder) in str(error):
                return "interrupted"
            raise
        for name, known in self.known(variant).items():
            if text == known[1] and equal(weights, known[0]):
                return name
        raise AssertionError("neither the old nor the new")


class Models(Saving):
    """`save_pretrained` of a model, over another one: one file, shards, a layer; over another layout."""

    variants = ("one file", "shards", "layer", "shards to one file", "one file to shards")

    def __init__(self, root: Path):
        super().__init__(root)
        for variant in self.variants:
            self.other(variant, self.root / "old")
            self.old[variant] = files_of(self.root / "old")
            shutil.rmtree(self.root / "old")

    def save(self, variant: str, layout: str, folder: Path, norm_eps: float) -> None:
        import torch

        from diffusers_terdit import TernaryLinear

        if variant == "layer":
            torch.manual_seed(int(norm_eps * 1e7))
            TernaryLinear(16, 8, bias=norm_eps < 5e-5).save_pretrained(folder)
        else:
            options = {"max_shard_size": "8KB"} if layout == "shards" else {}
            tiny_transformer(norm_eps=norm_eps).save_pretrained(folder, **options)

    def run(self, variant: str, folder: Path) -> None:
        self.save(variant, variant.split(" to ")[-1], folder, 1e-4)

    def other(self, variant: str, folder: Path) -> None:
        self.save(variant, variant.split(" to ")[0], folder, 1e-5)

    def load(self, variant: str, folder: Path):
        from diffusers_terdit import TerDiTTransformer2DModel, TernaryLinear

        if variant == "layer":
            return TernaryLinear.from_pretrained(folder)
        return TerDiTTransformer2DModel.from_pretrained(folder)

    def contents(self, loaded):
        return weights_of(loaded), loaded.to_json_string()


class Pipelines(Saving):
    """`save_pretrained` of a pipeline with a VAE over another one; whole files, and shards."""

    variants = ("one file", "shards")

    def __init__(self, root: Path):
        super().__init__(root)
        for variant in self.variants:
            self.other(variant, self.root / "old")
            (self.root / "old" / "notes.txt").write_text("the user's own")
            self.old[variant] = files_of(self.root / "old")
            shutil.rmtree(self.root / "old")

    def run(self, variant: str, folder: Path) -> None:
        options = {"max_shard_size": "8KB"} if variant == "shards" else {}
        tiny_pipeline(1e-4, vae=True).save_pretrained(folder, **options)

    def other(self, variant: str, folder: Path) -> None:
        tiny_pipeline(1e-5, vae=True).save_pretrained(folder)

    def load(self, variant: str, folder: Path):
        from diffusers_terdit import DiffusionPipeline, TerDiTPipeline

        self.turn = not getattr(self, "turn", False)  # the two ways to load it, in turns
        return (TerDiTPipeline if self.turn else DiffusionPipeline).from_pretrained(folder)

    def contents(self, loaded):
        parts = {"transformer": loaded.transformer, **({"vae": loaded.vae} if loaded.vae is not None else {})}
        weights = {f"{p}.{n}": t for p, model in parts.items() for n, t in weights_of(model).items()}
        configs = [loaded.transformer.to_json_string(), loaded.scheduler.to_json_string(), dict(loaded.config)]
        return weights, repr([*configs[:2], configs[2]["id2label"], configs[2]["guidance_channels"]])


class Convert(Pipelines):
    """`terdit convert`: the authors' files over an older pipeline; dense ternary weights into a new folder."""

    variants = ("original", "dense")

    def __init__(self, root: Path):
        from stress_files import make_bases

        Saving.__init__(self, root)
        make_bases(self.root / "bases")
        tiny_pipeline(1e-5).save_pretrained(self.root / "old")
        self.old["original"] = files_of(self.root / "old")

    def run(self, variant: str, folder: Path) -> None:
        from diffusers_terdit import cli

        args = ["convert", str(self.root / "bases" / variant), str(folder)]
        args = cli.build_parser().parse_args([*args, *(["--num_attention_heads", "2"] * (variant == "original"))])
        if variant == "dense" and folder.is_dir() and any(folder.iterdir()):
            with pytest.raises(FileExistsError):  # converted before the kill
                args.run(args)
            return
        args.run(args)  # without what makes one line of an error

    other = Program.other

    def load(self, variant: str, folder: Path):
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel.from_pretrained(folder) if variant == "dense" else super().load(variant, folder)

    def contents(self, loaded):
        return (weights_of(loaded), "") if hasattr(loaded, "state_dict") else super().contents(loaded)


class Train(Saving):
    """`examples/train_terdit.py`, over an older model: from nothing, and again from a checkpoint before the last."""

    variants = ("from nothing", "from an earlier checkpoint")
    kept = 2

    def __init__(self, root: Path):
        super().__init__(root)
        make_images(self.root / "images", 8, 8)
        tiny_pipeline(1e-5).save_pretrained(self.root / "old")
        (self.root / "old" / "README.md").write_text("---\ntags:\n- mine\n---\n# Mine\n\nThe author's own text.\n")
        for variant in self.variants:
            self.old[variant] = files_of(self.root / "old")
        self.all: dict[int, Files] = {}

    def call(self, folder: Path, *flags: str) -> None:
        import train_terdit

        images = ["--train_data_dir", str(self.root / "images")]
        train_terdit.main([*images, *TINY, "--output_dir", str(folder), *flags])

    def run(self, variant: str, folder: Path) -> None:
        from diffusers_terdit import training

        found = training.checkpointing.find(folder)
        first = variant == "from an earlier checkpoint" and len(found) == self.kept and found[-1].name[-1] == "8"
        self.call(folder, "--checkpoints_total_limit", str(self.kept), "--resume_from_checkpoint",
                  str(found[0]) if first else "latest")  # fmt: skip

    def prepare(self) -> None:
        """All checkpoints of an undisturbed run; `old` of the last variant is what it leaves."""
        place(self.root / "all", self.old["from nothing"])
        done(fork(lambda: self.call(self.root / "all", "--checkpoints_total_limit", "9"), self.root / "log"))
        for path in (self.root / "all").glob("checkpoint-*"):
            self.all[int(path.name.split("-")[1])] = files_of(path)
        for path in sorted((self.root / "all").glob("checkpoint-*"))[: -self.kept]:
            shutil.rmtree(path)
        self.old["from an earlier checkpoint"] = files_of(self.root / "all")

    load, contents = Pipelines.load, Pipelines.contents

    def same(self, files: Files) -> Files:
        """Without how fast it was."""
        lines = [json.loads(line) for line in files.get("log.jsonl", b"").decode().splitlines()]
        lines = [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]
        return {**super().same(files), "log.jsonl": json.dumps(lines).encode()}

    def state(self, variant: str, folder: Path) -> str:
        from diffusers_terdit import training

        found = training.checkpointing.find(folder)
        before = {name.split("/")[0] for name in self.old[variant] if name.startswith("checkpoint-")}
        assert len(found) >= len(before) - 1, "checkpoints are lost"
        for path in found:
            assert files_of(path) == self.all[int(path.name.split("-")[1])], f"{path.name} is not that of its step"
        if found:
            self.load_checkpoint(found[-1])
        for name in ("README.md", *(f"samples/step-{step}.png" for step in (4, 8))):
            data = (folder / name).read_bytes() if (folder / name).exists() else None
            assert data in (self.old[variant].get(name), self.new[variant][name]), f"{name} is torn"
        pipeline = super().state(variant, folder)
        return "part" if found and pipeline == "old" and variant != "from an earlier checkpoint" else pipeline

    def load_checkpoint(self, path: Path) -> None:
        import torch

        from diffusers_terdit import TerDiTTransformer2DModel, training

        config = TerDiTTransformer2DModel.load_config(path)
        model, average = (TerDiTTransformer2DModel.from_config(config) for _ in range(2))
        optimizer = torch.optim.AdamW(training.recipes.parameter_groups(model, 0.0, 1.0))
        state = training.checkpointing.load(path, model, average, optimizer)
        assert state["step"] == int(path.name.split("-")[1])


class Cache(Program):
    """`examples/cache_latents.py` with a VAE, four shards."""

    def __init__(self, root: Path):
        super().__init__(root)
        tiny_vae().save_pretrained(self.root / "vae")
        make_images(self.root / "images", 14, 16)

    def run(self, variant: str, folder: Path) -> None:
        import cache_latents

        sizes = ["--resolution", "16", "--shard_size", "4", "--batch_size", "2"]
        source = ["--train_data_dir", str(self.root / "images")]
        vae = ["--pretrained_vae_model_name_or_path", str(self.root / "vae")]
        cache_latents.main([*source, *vae, *sizes, "--output_dir", str(folder)])

    def state(self, variant: str, folder: Path) -> str:
        from diffusers_terdit import training

        names = whole(folder)
        for name in names:
            data = (folder / name).read_bytes()
            assert canonical(name, data) == canonical(name, self.new[variant][name]), f"{name} is torn"
        if training.data.LATENTS_NAME not in names:
            with pytest.raises(OSError, match="holds no whole latent cache"):
                training.data.LatentSamples(folder)
            return "part" if names else "old"
        samples = training.data.LatentSamples(folder)
        assert len([samples[i] for i in range(len(samples))]) == 14
        return "new"


class Evaluate(Program):
    """`examples/evaluate.py`: samples, pictures, statistics of a reference, report."""

    def __init__(self, root: Path):
        import numpy as np

        super().__init__(root)
        tiny_pipeline(1e-5).save_pretrained(self.root / "model")
        np.save(self.root / "reference.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))

    def run(self, variant: str, folder: Path) -> None:
        import evaluate

        sizes = ["--num_images", "10", "--batch_size", "2", "--num_inference_steps", "2", "--save_images"]
        network = ["--feature_network", "stress_kills:features", "--reference", str(self.root / "reference.npy")]
        evaluate.main(["--model", str(self.root / "model"), *sizes, *network, "--output_dir", str(folder)])

    def state(self, variant: str, folder: Path) -> str:
        import numpy as np

        from diffusers_terdit import evaluation

        names = whole(folder)
        place(self.root / "new", {"samples.npz": self.new[variant]["samples.npz"]})
        samples = evaluation.open_samples(self.root / "new" / "samples.npz")
        for name in names:
            if name.startswith("parts/"):
                first, last = map(int, Path(name).stem.split("-"))
                assert np.array_equal(np.load(folder / name), samples[first : last + 1]), f"{name} is torn"
            else:
                data = (folder / name).read_bytes()
                assert canonical(name, data) == canonical(name, self.new[variant][name]), f"{name} is torn"
        return "new" if "report.md" in names else "part" if names else "old"


def features():
    """A network for `examples/evaluate.py`: few features of an image."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).requires_grad_(False)


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
    """A fork that runs something; what it said in the end, and, with `events`, each of its file operations."""

    def __init__(self, pid: int, result: io.BufferedReader):
        self.pid, self.result = pid, result

    def wait(self) -> dict | None:
        """Its result; None where it was killed."""
        with self.result:
            text = self.result.read()
        os.waitpid(self.pid, 0)
        return json.loads(text) if text.endswith(b"\n") else None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")


def watch(folder: Path, act: Callable[[int], None]) -> Callable[[], int]:
    """Call `act(n)` before the n-th operation that changes a file below a folder; the number of them so far."""
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
    """Run something in a fork of this process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Child(pid, os.fdopen(read, "rb"))
    os.close(read)
    result: dict = {}
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        counted = before() if before is not None else None
        started = time.monotonic()
        try:
            work()
        except (Exception, SystemExit) as error:
            result = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()[-3000:]}
            result |= {"os": isinstance(error, OSError)}
        result |= {"seconds": time.monotonic() - started, "events": counted() if counted is not None else 0}
    finally:
        os.write(write, json.dumps(result).encode() + b"\n")
        os._exit(0)


def done(child: Child) -> dict:
    """Wait for a child that must succeed."""
    result = child.wait()
    assert result is not None, "it died"
    assert "error" not in result, result.get("trace")
    return result


def unfinished(folder: Path) -> bool:
    """Whether something in a folder, or beside it, is half-written."""
    beside = [*folder.rglob("*"), *folder.parent.glob(f"{folder.name}.*")]
    return any(path.name.endswith(TEMPORARY) for path in beside)


# The trials. Each returns its outcome; an AssertionError or any other error is a failure.


def kill(program: Program, variant: str, folder: Path, rng: random.Random) -> dict | None:
    """One to three kills, each followed by a look; then a run to the end. None where nothing was killed."""
    place(folder, program.old[variant])
    report: dict = {"kills": 0, "states": Counter(), "moments": Counter(), "writing": 0}
    for _ in range(rng.choice([1, 1, 2, 3])):
        moment = rng.choice(["over the time", "before a file operation", "after a file operation"])
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
    done(fork(lambda: program.run(variant, folder), program.root / "log"))
    program.finished(variant, folder)
    return report


def refused(program: Program, variant: str, folder: Path, result: dict | None, advice: str) -> str:
    """Check that a run that could not write said so in one line, and left what was there; the state it left."""
    assert result is not None, "it died"
    assert "error" in result, "it wrote"
    assert result["os"], result["trace"]
    assert "\n" not in result["message"], result["message"]
    assert str(folder) in result["message"], result["message"]
    assert "cannot be written" in result["message"], result["message"]
    assert advice in result["message"], result["message"]
    assert not unfinished(folder), "something is left half-written"
    state = program.state(variant, folder)
    assert state in ("old", "part") or (state == "new" and isinstance(program, (Train, Evaluate))), state
    return state


def full(program: Program, variant: str, folder: Path, rng: random.Random, disk: "Disk") -> str:
    """A disk that fills at some point; then one with room."""
    disk.resize(1 << 30)
    place(folder, program.old[variant])
    sizes = [-(-len(data) // 4096) * 4096 for data in program.new[variant].values()]
    need = sum(sizes) if disk.mounted else max(sizes)
    disk.resize(disk.used() + int(rng.random() * 1.2 * need))
    result = disk.run(lambda: program.run(variant, folder), program.root / "log")
    if result is not None and "error" not in result:
        disk.resize(1 << 30)
        program.finished(variant, folder)
        return "fitted"
    refused(program, variant, folder, result, "Make room there, or choose another folder")
    disk.resize(1 << 30)
    done(fork(lambda: program.run(variant, folder), program.root / "log"))
    program.finished(variant, folder)
    return "full"


def read_only(program: Program, variant: str, folder: Path, disk: "Disk") -> str:
    """A disk that is mounted read-only; then one that is not."""
    disk.resize(1 << 30)
    place(folder, program.old[variant])
    folder.mkdir(exist_ok=True)
    disk.resize(1 << 30, read_only=True)
    try:
        result = fork(lambda: program.run(variant, folder), program.root / "log").wait()
        refused(program, variant, folder, result, "Allow writing there, or choose another folder")
    finally:
        disk.resize(1 << 30)
    assert files_of(folder) == program.old[variant]
    done(fork(lambda: program.run(variant, folder), program.root / "log"))
    program.finished(variant, folder)
    return "read-only disk"


def forbidden(program: Program, variant: str, folder: Path) -> str:
    """A folder, and the one it is in, that the user may not write to; then one that he may."""
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
        result = fork(work, program.root / "log").wait()
        refused(program, variant, folder, result, "Allow writing there, or choose another folder")
    finally:
        for path in folders:
            path.chmod(0o755)
    assert files_of(folder) == program.old[variant]
    done(fork(lambda: program.run(variant, folder), program.root / "log"))
    program.finished(variant, folder)
    return "folder without permission"


def twice(program: Program, variant: str, folder: Path, rng: random.Random) -> str:
    """Two processes at once; in every second trial one of them is killed."""
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
    done(fork(lambda: program.run(variant, folder), log))
    program.finished(variant, folder)
    return "one was killed" if None in results else "one was refused" if len(ended) < 2 else "both succeeded"


# A disk of its own


class Disk:
    """A tmpfs in a mount namespace of this process; or, where that is not allowed, a limit on the size of a file."""

    def __init__(self, folder: Path):
        self.folder, self.limit = folder, 0
        self.libc = ctypes.CDLL(None, use_errno=True)
        folder.mkdir()
        self.mounted = self._mount()

    def _call(self, name: str, *args) -> None:
        if getattr(self.libc, name)(*args):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def _mount(self) -> bool:
        user, group = os.getuid(), os.getgid()
        try:
            self._call("unshare", 0x00020000 | (0x10000000 if user else 0))  # CLONE_NEWNS, CLONE_NEWUSER
            if user:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            self._call("mount", b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC, MS_PRIVATE
            self._call("mount", b"tmpfs", os.fsencode(self.folder), b"tmpfs", 0, b"size=1g")
        except (OSError, AttributeError):
            return False
        return True

    def resize(self, size: int, read_only: bool = False) -> None:
        self.limit = size
        if self.mounted:
            flags = 0x20 | read_only  # MS_REMOUNT, MS_RDONLY
            data = f"size={max(size // 4096, 1) * 4096}".encode()  # none would be no limit
            self._call("mount", b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, data)

    def used(self) -> int:
        if not self.mounted:
            return 0
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def run(self, work: Callable[[], None], log: Path) -> dict | None:
        def limited() -> None:
            if not self.mounted:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
            work()

        return fork(limited, log if self.mounted else Path(os.devnull)).wait()


# A report


def trials(name: str, kills: int, others: int, seed: int, root: Path) -> dict:
    """Everything for one program."""
    program = PROGRAMS[name](root)
    if isinstance(program, Train):
        program.prepare()
    started = time.monotonic()
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
            trace = traceback.format_exc()[-3000:]
            failure = {"trial": kind, "number": number, "variant": variant, "trace": trace}
            report["failures"].append({**failure, "error": f"{type(error).__name__}: {error}"[:1000]})
            return None

    number = 0
    while report["kills"] < kills and len(report["failures"]) < 20 and number < 10 * kills:
        found = attempt("kill", number, lambda variant, rng: kill(program, variant, folder, rng))
        number += 1
        if found:
            report["resumed"] += found["kills"]
            for key in ("kills", "writing", "states", "moments"):
                report[key] += found[key]
    for number in range(others):
        outcome = attempt("twice", number, lambda variant, rng: twice(program, variant, folder, rng))
        report["twice"].update([outcome] if outcome else [])
    for number in range(min(len(program.variants), others)):
        outcome = attempt("forbidden", number, lambda variant, rng: forbidden(program, variant, folder))
        report["disk"].update([outcome] if outcome else [])

    def disks() -> None:
        disk = Disk(root / "disk")
        report["mounted"] = disk.mounted
        for number in range(others):
            outcome = attempt("full", number, lambda v, rng: full(program, v, disk.folder / "x" / "out", rng, disk))
            report["disk"].update([outcome] if outcome else [])
        for number in range(min(len(program.variants), others) if disk.mounted else 0):
            outcome = attempt("read-only", number, lambda v, _: read_only(program, v, disk.folder / "x" / "out", disk))
            report["disk"].update([outcome] if outcome else [])
        (root / "disk.json").write_text(json.dumps(report))

    done(fork(disks, program.root / "log"))
    report = json.loads((root / "disk.json").read_text())
    return {**report, "elapsed": time.monotonic() - started}


def run(kills: int, others: int, seed: int, names: list[str], progress: Path | None = None) -> dict:
    """Try the programs one after the other; with `progress` a later call keeps those that are done."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "examples"))
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    import diffusers
    import transformers

    import cache_latents  # noqa: F401 - what the forks need is imported once
    import evaluate  # noqa: F401
    import train_terdit  # noqa: F401

    for library in (diffusers.utils.logging, transformers.logging):
        library.set_verbosity(60)
        library.disable_progress_bar()
    logging.disable(logging.WARNING)
    report: dict = {"seed": seed, "wanted": [kills, others], "programs": {}, "retried": {}}
    if progress is not None and progress.exists():
        saved = json.loads(progress.read_text())
        if (saved["seed"], saved["wanted"]) == (seed, [kills, others]):
            report["programs"] = {n: found for n, found in saved["programs"].items() if not found["failures"]}
            again = {n: len(found["failures"]) for n, found in saved["programs"].items() if found["failures"]}
            report["retried"] = {**saved["retried"], **again}
    for name in names:
        if name in report["programs"]:
            continue
        place_ = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(prefix="kills-", dir=place_) as folder:
            os.chmod(folder, 0o755)  # also for a child that gives its privileges away
            report["programs"][name] = trials(name, kills, others, seed, Path(folder))
        found = report["programs"][name]
        print(
            f"{name}: {found['kills']} kills, {len(found['failures'])} failures, {found['elapsed']:.0f} s", flush=True
        )
        if progress is not None:
            progress.write_text(json.dumps(report))
    return report


def markdown(report: dict) -> str:
    """The page of a report."""
    programs, seed = (
        {name: report["programs"][name] for name in PROGRAMS if name in report["programs"]},
        report["seed"],
    )
    kills, others = report["wanted"]
    moments = ("over the time", "before a file operation", "after a file operation")
    disks = ("full", "fitted", "read-only disk", "folder without permission")
    pairs = ("both succeeded", "one was killed", "one was refused")

    def table(columns: list[str], row: Callable[[dict], list[int]]) -> list[str]:
        lines = [f"| | {' | '.join(columns)} |", f"| --- | {' | '.join(['---:'] * len(columns))} |"]
        return lines + [f"| {n} | {' | '.join(f'{v:,}' for v in row(found))} |" for n, found in programs.items()]

    mounted = all(found["mounted"] for found in programs.values())
    how = "a tmpfs of a random size filled up" if mounted else "a random limit on the size of a file was met"
    again = ", ".join(f"{name} ({count} failure{'s'[: count > 1]})" for name, count in report["retried"].items())
    minutes = sum(found["elapsed"] for found in programs.values()) / 60
    return "\n".join(
        [
            "# Killed, full disk, twice at once: the figures",
            "",
            "```bash",
            f"OMP_NUM_THREADS=1 python tests/stress_kills.py --kills {kills} --others {others} --seed {seed}",
            "```",
            "",
            f"Made on {report['machine']}, one worker, {report['versions']}, in {minutes:.0f} minutes,"
            " with other programs beside it.",
            "",
            "## Killed",
            "",
            *table(
                ["kills", *moments, "while writing", "old", "part", "new", "interrupted", "ended exactly", "failures"],
                lambda f: [
                    f["kills"],
                    *(f["moments"].get(m, 0) for m in moments),
                    f["writing"],
                    *(f["states"].get(s, 0) for s in ("old", "part", "new", "interrupted")),
                    f["resumed"],
                    len([failure for failure in f["failures"] if failure["trial"] == "kill"]),
                ],
            ),
            "",
            "Every kill is a SIGKILL: at a moment spread over the time that the program takes, just before one of"
            " its file operations, or up to 3 ms after one. *While writing*: a half-written file or the marker of"
            " a save was there afterwards. *Old*: what was there before; a model or pipeline loads with the same"
            " bits. *Part*: checkpoints, shards or samples of the new run are there, each with the bytes of an"
            " undisturbed run, and the last checkpoint loads. *New*: the new model loads, with the bits of an"
            " undisturbed run; the latents or the report are there. *Interrupted*: loading raises an `OSError`"
            " that says so. *Ended exactly*: run again, after one to three kills, it left the same files with the"
            " same bytes as an undisturbed run, and nothing half-written. (A training log says how fast it was,"
            " and safetensors orders the metadata of a file anew each time: these two are left out of the"
            " comparison.)",
            "",
            "## Disks",
            "",
            *table(
                [*disks, "failures"],
                lambda f: [
                    *(f["disk"].get(kind, 0) for kind in disks),
                    len([x for x in f["failures"] if x["trial"] in ("full", "read-only", "forbidden")]),
                ],
            ),
            "",
            f"*Full*: {how}. The run ended with an `OSError` of one line that names the folder and says what to do."
            " What was there before still was, whole checkpoints, shards and samples were kept, nothing half-written"
            " was left; with room again, the next run ended as an undisturbed one. *Fitted*: there was room."
            " *Read-only disk*: the same with a tmpfs mounted read-only; *folder without permission*: the same for a"
            " user who may not write to the folder.",
            "",
            "## Twice at once",
            "",
            *table(
                [*pairs, "failures"],
                lambda f: [
                    *(f["twice"].get(kind, 0) for kind in pairs),
                    len([x for x in f["failures"] if x["trial"] == "twice"]),
                ],
            ),
            "",
            "Two processes wrote into one folder at once, and in about every second trial one of them was killed;"
            " where it had ended before, the trial counts as *both succeeded*. The folder then held what one of"
            " them leaves, whole, or, after a kill, one of the states above; and once the program ran again, what"
            " an undisturbed run leaves. *One was refused*: with an `OSError` that names the folder.",
            "",
            f"Programs that failed, and were tried again as a whole after a correction: {again or 'none'}.",
            "",
            "## Programs",
            "",
            *(f"- **{name}**: {program.__doc__.splitlines()[0]}" for name, program in PROGRAMS.items()),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of each program")
    parser.add_argument("--others", type=int, default=20, help="full disks, and pairs of processes, of each program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    arguments = parser.parse_args()
    import diffusers
    import torch

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    progress = arguments.output_dir / "stress_kills.progress.json"
    report = run(arguments.kills, arguments.others, arguments.seed, arguments.programs, progress)
    report["machine"] = f"{platform.machine()} CPU"
    report["versions"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__},"
        f" Linux {platform.release().split('-')[0]}"
    )
    (arguments.output_dir / "stress_kills.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    (arguments.output_dir / "stress_kills.md").write_text(markdown(report))
    failures = [(name, failure) for name, found in report["programs"].items() for failure in found["failures"]]
    for name, failure in failures[:20]:
        print(name, failure["trial"], failure["number"], failure["variant"], failure["error"])
    if not failures:
        progress.unlink()
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
