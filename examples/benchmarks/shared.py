"""What the scenarios share: where and how something is measured, random models, results that resume, pages."""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from diffusers_terdit import TerDiTTransformer2DModel, pack_ternary
from diffusers_terdit.evaluation.measured import machine, measured, stamp
from diffusers_terdit.models.transformer_terdit import SIZES
from diffusers_terdit.ops import dequantize, unpack_ternary
from diffusers_terdit.ops.gpu import choose
from diffusers_terdit.storage.saving import new_file


FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
DTYPES = ("float32", "bfloat16")
TOY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_classes": 10}
# What `terdit train` takes for 28x28 pixels in gray.
TINY = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 384, "num_classes": 10}
TINY |= {"sample_size": 28, "patch_size": 4, "in_channels": 1, "pos_embed_type": "rope+sincos2d"}
PRESETS = {**SIZES, "tiny": TINY, "toy": {**TOY, "sample_size": 8}}  # the toy is for trying the code
PAPER_PRESETS = ["terdit-600m-256", "terdit-4.2b-256"]
LIMITS = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # of the libraries torch calls
GIB = 2**30 / 1e9  # in GB: records have GiB, pages GB
CACHE_BYTES = 2**28  # written between calls, so that no weight stays in a GPU's cache, as in a whole model


# Arguments


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def add_output_arguments(parser: argparse.ArgumentParser, resumes: bool = True) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("docs", "results"), help="for the JSON and its page")
    if resumes:
        parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already holds")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")


def command_line() -> str:
    """Return how this program was called, with the settings that change what is measured."""
    settings = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", *LIMITS) if name in os.environ]
    words = [*settings, "python examples/benchmarks/run.py", shlex.join(sys.argv[1:])]
    return re.sub(r" --(output_dir|folder) ('[^']*'|\S+)", "", " ".join(words))


# The place


def place(device: str) -> str:
    """Return the machine; for a GPU also its name, and what decodes the weights."""
    if device == "cpu":
        return machine()
    if not torch.cuda.is_available():
        raise SystemExit("This torch sees no GPU. Most gpu-* scenarios can try their code with --device cpu.")
    properties = torch.cuda.get_device_properties(0)
    decoder = "PyTorch" if choose.kernels(torch.device("cuda", 0)) is choose.IN_PYTORCH else "Triton"
    card = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return f"{card}; {machine()}; weights decoded by {decoder}"


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the parent, from before this program replaced it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def run_tests(skip: bool, *arguments: str) -> None:
    """Run tests of what is timed next, in a separate process; where they fail, no speed is measured."""
    if skip:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "default", "-p", "no:cacheprovider", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(
            f"The tests {' '.join(arguments)} fail or are not there, so no speed is measured. Mend them, or measure"
            " all the same with --skip_tests."
        )


def in_a_process(script: str, **settings) -> dict:
    """Return what `measure` of a scenario's file gives in a separate process, whose peak of memory is its own."""
    command = [sys.executable, script, json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def answer(measure: Callable[..., dict]) -> None:
    """Do in that process what `in_a_process` asks for."""
    print(json.dumps(measure(**json.loads(sys.argv[1]))))


# Time


def both_clocks(function: Callable[[], object]) -> dict[str, float]:
    start, busy = time.perf_counter(), time.process_time()
    function()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}


def in_turns(functions: dict, turns: int, clock: Callable = both_clocks) -> dict:
    """Return what `clock` gives for every call, {key: [...]}: one call of each per turn, after one that warms up.

    The order is reversed from turn to turn, so that a drift of the machine's speed falls on each side of a pair.
    """
    times: dict = {key: [] for key in functions}
    for turn in range(turns + 1):
        for key in list(functions)[:: 1 if turn % 2 else -1]:
            times[key].append(clock(functions[key]))
    return {key: found[1:] for key, found in times.items()}


def by_clock(times: dict) -> dict[str, dict]:
    """Turn {key: [{clock: seconds}]} into {clock: {key: [seconds]}}."""
    clocks = next(iter(times.values()))[0]
    return {clock: {key: [call[clock] for call in calls] for key, calls in times.items()} for clock in clocks}


def device_seconds(functions: dict, turns: int, device: str) -> dict[object, list[float]]:
    """Return the seconds of every call, in turns; on a GPU by its own clock, its cache cleared before each call."""
    if device == "cpu":
        return by_clock(in_turns(functions, turns))["seconds"]
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)

    def clock(function: Callable[[], object]) -> tuple:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()  # also keeps the GPU busy while the host queues what follows
        events[0].record()
        function()
        events[1].record()
        return events

    times = in_turns(functions, turns, clock)
    torch.cuda.synchronize()
    return {key: [start.elapsed_time(end) / 1e3 for start, end in events] for key, events in times.items()}


# Numbers


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


def ratios(values: list[float], bases: list[float], digits: int = 4) -> list[float]:
    """Return [median, lowest, highest] of the ratios of pairs."""
    found = [a / b for a, b in zip(values, bases, strict=True)]
    return [float(f"{value:.{digits}g}") for value in (statistics.median(found), min(found), max(found))]


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of what is expected, in float64."""
    return float((output.double() - expected.double()).norm() / expected.double().norm())


# Models and inputs

INPUTS = ("gaussian", "gated", "outliers")


def new_input(kind: str, rows: int, features: int, generator: torch.Generator) -> Tensor:
    """Return (rows, features) float32; "gated" is what down_proj sees, "outliers" are 0.1 %, 20 times as large."""
    x = torch.randn(rows, features, generator=generator)
    if kind == "gated":
        return nn.functional.silu(x) * torch.randn(rows, features, generator=generator)
    if kind == "outliers":
        return torch.where(torch.rand(rows, features, generator=generator) < 1e-3, 20 * x, x)
    return x


def new_model(preset: str, **overrides) -> TerDiTTransformer2DModel:
    return TerDiTTransformer2DModel(**{**PRESETS[preset], **overrides})


def layer_shapes(preset: str) -> list[tuple[int, int]]:
    """Return (outputs, inputs) of a block's layers, each once: attention, feed-forward in and out, adaLN."""
    with torch.device("meta"):
        block = new_model(preset, num_layers=1).transformer_blocks[0]
    layers = (block.attn.to_q, block.ff.up_proj, block.ff.down_proj, block.adaln.linear)
    return [(layer.out_features, layer.in_features) for layer in layers]


def random_codes(out_features: int, in_features: int, device: str = "cpu") -> Tensor:
    """Return packed random codes, (N/4, K) uint8."""
    return pack_ternary(torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, device=device))


def power_of_two_scale(in_features: int) -> float:
    """Return a scale that keeps the variance; bfloat16 holds its products with codes exactly."""
    return 2.0 ** round(-0.5 * torch.tensor(in_features).log2().item())


def random_model(preset: str, device: str = "cpu", **overrides) -> TerDiTTransformer2DModel:
    """Return a packed model of random codes, made on the device; its gates and its output are of the order of one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = new_model(preset, weight_format="packed", **overrides).eval()
    for layer in model.ternary_layers().values():
        layer.weight_packed.data.copy_(random_codes(layer.out_features, layer.in_features, device))
        layer.weight_scale.data.fill_(power_of_two_scale(layer.in_features))
    for block in model.transformer_blocks:
        nn.init.ones_(block.adaln.norm.weight)
    nn.init.normal_(model.proj_out.weight, std=0.02)  # a new model's is zero, and so would be every output
    return model


def save_mapped(model: nn.Module, weights: Iterable[tuple[str, Tensor]], folder: Path, shard: str = "10GB") -> dict:
    """Give a model on the meta device these weights and save it in a new folder; return its files' bytes by name.

    The weights are in mapped files meanwhile, so that 17 GB of them need no such memory.
    """
    state = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for count, (name, tensor) in enumerate(weights):
            # a file for each: tensors that share one would be saved as one shard, whatever its size
            mapped = torch.from_file(f"{scratch}/{count}", shared=True, size=tensor.numel(), dtype=tensor.dtype)
            state[name] = mapped.view(tensor.shape).copy_(tensor)
        model.load_state_dict(state, assign=True)
        model.save_pretrained(folder, max_shard_size=shard)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def guided_input(
    model: TerDiTTransformer2DModel, dtype: torch.dtype, images: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timestep and labels of guided images: the rows of a label, then those of the null label."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(images, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    labels = torch.tensor([min(207, config.num_classes - 1), config.num_classes]).repeat_interleave(images)
    return latents.repeat(2, 1, 1, 1).to(dtype), torch.tensor(500), labels


def unpack_every_call(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Run a packed layer as the authors' code does: a new float32 weight in every call."""
    return nn.functional.linear(input, dequantize(unpack_ternary(weight_packed), weight_scale), bias)


def new_vae(small: bool) -> AutoencoderKL:
    """Return a VAE of Stable Diffusion's size with random weights, 84 million; or a tiny one, for trying the code."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4 if small else 32,
        sample_size=256,
    ).eval()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


# Results


def to_json(value: object) -> str:
    """Return JSON with every item of a list of records on a separate line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(map(to_json, value)) + "\n]"
    return json.dumps(value)


class Results:
    """A scenario's JSON, and the page that is rendered from it alone. Both are whole on disk after every `save`."""

    def __init__(
        self, args: argparse.Namespace, name: str, page: Callable[[dict], str], tables_are_dated: bool = False
    ):
        self.path = args.output_dir / f"{name}.json"
        if args.render and not self.path.exists():
            raise SystemExit(f"{self.path} does not exist; measure first, without --render.")
        self.data: dict = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        self.page = page
        self.tables_are_dated = tables_are_dated

    def resume(self, fresh: bool, **where) -> None:
        """Keep what a stopped run left, if that measured the same thing in the same place; else begin with nothing."""
        if fresh or any(self.data.get(key) != value for key, value in where.items()):
            self.data = {}
        self.data = {"command": command_line(), **self.data, **where}

    def missing(self, cases: Iterable[dict]) -> list[dict]:
        """Return the cases of which there is no record."""
        records = self.data.setdefault("records", [])
        return [case for case in cases if not any(record.items() >= case.items() for record in records)]

    def collect(self, records: Iterable[dict]) -> None:
        """Add records as they come."""
        for record in records:
            print(json.dumps(record), file=sys.stderr, flush=True)
            self.data.setdefault("records", []).append(record)
            if command_line() not in self.data["command"].splitlines():
                self.data["command"] += f"\n{command_line()}"
            self.save()

    def save(self, with_page: bool = True) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as file:
            file.write_text(to_json(self.data) + "\n", "utf-8")
        stamp(self.path)
        if with_page:
            self.write_page()

    def write_page(self) -> None:
        with new_file(self.path.with_suffix(".md")) as file:
            when = "" if self.tables_are_dated else measured(self.path)
            file.write_text(self.page(self.data) + (f"\n{when}\n" if when else ""), "utf-8")

    def finish(self, plot: Callable[[dict, Path], None] | None = None) -> None:
        """Write the page, and the plot where there is one."""
        self.write_page()
        if plot:
            plot(self.data, self.path.with_suffix(".png"))
        print(f"Written to {self.path.with_suffix('.md')}")


# Pages


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def spread(values: list[float] | None) -> str:
    """Return "median (lowest to highest)"."""
    return "-" if values is None else f"{number(values[0])} ({number(values[1])} to {number(values[2])})"


def table(header: list[str], rows: Iterable[list]) -> str:
    """Return a Markdown table without the last line break, for a separate line in a template."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *rows])


def grouped(records: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def render(name: str, **values) -> str:
    """Return the Markdown of `pages/NAME.md.j2`, which may also use the functions above."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "pages"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"table": table, "spread": spread, "number": number, "grouped": grouped, "gib": GIB}
    return environment.get_template(f"{name}.md.j2").render(values)


def processor(machine: str) -> str:
    """Return the name of the processor, or of the GPU, in a line about a machine."""
    names = machine.split(" (")[0].replace("(R)", "").removesuffix(" Processor").split(", ")
    return next((name for name in names if name.startswith("Zen")), names[0])


def bars(
    path: Path,
    panels: dict[str, list[tuple[str, float, float]]],
    speed: str | None = None,
    others: tuple[str, ...] = (),
) -> None:
    """Draw horizontal bars, {title: [(label, lowest, highest)]}, pale beyond the lowest.

    Labels that begin with "dense" or "best dense" are gray, those that begin with one of `others` blue, ours orange.
    Speeds have the axis label `speed`, one axis, and a line at the fastest dense one that is no integer.
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    plt.switch_backend("Agg")
    plt.style.use(ROOT / "examples" / "figures.mplstyle")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (11, rows * (1.1 + 0.22 * max(map(len, panels.values()))))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=bool(speed))
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
        labels, lowest, highest = zip(*found, strict=True)
        dense = ("dense", "best dense")
        colors = ["C1" if label.startswith(dense) else "C2" if label.startswith(others) else "C0" for label in labels]
        drawn = axis.barh(labels, highest, color=colors, alpha=0.4)
        axis.barh(labels, lowest, color=colors)
        texts = [f"{low:.2f} to {high:.2f}" if low < high else f"{high:.2f}" for _, low, high in found]
        for text in axis.bar_label(drawn, texts, padding=3, fontsize=8):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        axis.set_title(title)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.set_xlim(0, 1.35 * max(end for shown in (panels.values() if speed else [found]) for *_, end in shown))
        axis.invert_yaxis()
        if speed:
            rivals = [low for label, low, _ in found if label.startswith(dense) and not label.endswith("int8")]
            axis.axvline(max(rivals), color="black", linewidth=0.8, linestyle="dashed")
            axis.set_xlabel(f"{speed} (faster \N{RIGHTWARDS ARROW})")
        else:
            axis.label_outer()  # the same bars in every panel
    for axis in axes.flat[len(panels) :]:  # one at most
        axis.axis("off")
    if len(panels) > 2:
        names = {"C0": "this package", "C1": "dense", "C2": "others"}
        keys = [Patch(color=color, label=name) for color, name in names.items()]
        if speed:
            keys.append(Line2D([], [], color="black", linewidth=0.8, linestyle="dashed", label="fastest dense one"))
        axes.flat[-1].legend(handles=keys, loc="center" if len(panels) % 2 else "lower right")
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(32)  # a third of the bytes
    few.save(path, optimize=True)
