"""The same seed gives the same picture: one reference picture against all that may change around it.

docs/numerics.md shows the two tables below. `python tests/test_same_answer.py` prints the largest differences on this
machine. Training across restarts: tests/examples/test_train_terdit.py.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import choose_kernel, has_integer_kernel, reference
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.pipelines.schedulers import default_scheduler
from tiny import randomize


ROOT = Path(__file__).parents[1]
LABELS = [3, 1, 4, 1]  # image i has this label and the seed 100 + i


class Arithmetic(NamedTuple):
    dtype: torch.dtype
    bits: int | str | None
    near: float  # largest difference of a pixel over the picture's range that still counts as near


ARITHMETICS = {
    "float32": Arithmetic(torch.float32, None, 1e-5),
    "float32, int16": Arithmetic(torch.float32, 16, 1e-3),
    "float32, int8": Arithmetic(torch.float32, 8, 0.1),
    "bfloat16": Arithmetic(torch.bfloat16, "auto", 0.2),
    "float16": Arithmetic(torch.float16, None, 0.02),
}
SAME, NEAR = "the same bits", "near"
CLAIMS = {
    "nothing: another call, another process": SAME,
    "float or packed weights": SAME,
    "saving and loading, in one file, in shards": SAME,
    "instruction set of the integer kernels": SAME,
    "batch size and number of processes in `examples/evaluate.py`": SAME,
    "batch size, one generator per image": NEAR,
    "number of threads": NEAR,
    "adaLN computed ahead, or step by step": NEAR,
    "offloading": NEAR,
    "`torch.compile`": NEAR,
    "instruction set of PyTorch's libraries": NEAR,
    "another machine": NEAR,
}
# Pictures of an AMD EPYC (Zen 4) with AVX-512, torch 2.13.0+cpu: `--record` wrote them there, with one thread.
RECORDED = ROOT / "tests" / "data" / "pictures-zen4.safetensors"
OLD_PROCESSOR = {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}


def with_a_vae() -> TerDiTPipeline:
    """64 tokens of latents, 32x32 pixels; random weights, none of them zero."""
    torch.manual_seed(0)
    model = TerDiTTransformer2DModel(
        sample_size=16, num_layers=2, num_attention_heads=4, attention_head_dim=16, num_classes=10, ffn_dim=192
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return TerDiTPipeline(randomize(model, std=0.05).pack().eval(), default_scheduler(), vae.eval())


PIPELINES = {"digits": lambda: TerDiTPipeline.from_pretrained(bundled("digits")), "VAE": with_a_vae}


def computing_in(arithmetic: str, pipe: TerDiTPipeline) -> TerDiTPipeline:
    pipe.set_progress_bar_config(disable=True)
    pipe.to(ARITHMETICS[arithmetic].dtype)
    pipe.transformer.set_activation_bits(ARITHMETICS[arithmetic].bits)
    return pipe


def pictures(pipe: TerDiTPipeline, images=(0, 1, 2, 3), **kwargs) -> torch.Tensor:
    """(B, C, H, W) in [0, 1]."""
    generators = [torch.Generator().manual_seed(100 + i) for i in images]
    options = {"num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "pt", "generator": generators}
    return pipe([LABELS[i] for i in images], **options | kwargs).images


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """0 for the same bits."""
    if torch.equal(found, expected):
        return 0.0
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


class Case:
    """A pipeline in an arithmetic, and its pictures when nothing is changed."""

    def __init__(self, pipeline: str, arithmetic: str):
        self.pipeline, self.arithmetic = pipeline, arithmetic
        self.name = f"{pipeline}, {arithmetic}"
        self.near = ARITHMETICS[arithmetic].near
        self.expected = pictures(self.pipe())

    def pipe(self) -> TerDiTPipeline:
        return computing_in(self.arithmetic, PIPELINES[self.pipeline]())


# What may change: functions of a case, that give the differences they find.


def batch_size(case: Case) -> Iterator[float]:
    pipe, count = case.pipe(), len(LABELS)
    for size in (1, 3):
        parts = [pictures(pipe, range(i, min(i + size, count))) for i in range(0, count, size)]
        yield difference(torch.cat(parts), case.expected)


def fixed_rows(case: Case) -> Iterator[float]:
    """`examples/evaluate.py` gives each process batches of the images that are left: batches of any size."""
    with pytest.MonkeyPatch.context() as context, tempfile.TemporaryDirectory() as folder:
        context.syspath_prepend(ROOT / "examples")
        import evaluate

        PIPELINES[case.pipeline]().save_pretrained(folder)
        pipe = computing_in(case.arithmetic, evaluate.load_pipeline(evaluate.parse_args(["--model", folder]), "cpu"))
    together = pictures(pipe, output_type="latent")
    alone = [pictures(pipe, [i], output_type="latent") for i in range(len(LABELS))]
    yield difference(torch.cat(alone), together)
    yield difference(pictures(pipe, [2, 0], output_type="latent"), together[[2, 0]])


def threads(case: Case) -> Iterator[float]:
    before, pipe = torch.get_num_threads(), case.pipe()
    try:
        torch.set_num_threads(1 if before == 2 else 2)
        yield difference(pictures(pipe), case.expected)
    finally:
        torch.set_num_threads(before)


def step_by_step(case: Case) -> Iterator[float]:
    pipe = case.pipe()  # with one image adaLN has the fewest rows
    found = pictures(pipe, [0], callback_on_step_end=lambda pipe, step, timestep, kwargs: {})
    yield difference(found, case.expected[:1])


def offloading(case: Case) -> Iterator[float]:
    pipe = case.pipe()
    pipe.enable_model_cpu_offload(device="cpu")
    yield difference(pictures(pipe, [0]), case.expected[:1])
    pipe = case.pipe()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    yield difference(pictures(pipe, [0]), case.expected[:1])
    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        pipe = case.pipe()
        pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **kind)
        yield difference(pictures(pipe, [0]), case.expected[:1])


def compiled(case: Case, backend: str = "aot_eager") -> Iterator[float]:
    torch.compiler.reset()
    pipe = case.pipe()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    yield difference(pictures(pipe), case.expected)
    torch.compiler.reset()


def reference_many(input, weights, bits):
    return [reference.integer_linear(input, *weight, bits) for weight in weights]


def integer_kernels(case: Case) -> Iterator[float]:
    """Every instruction set that this processor has, and plain PyTorch."""
    pipe, kernels = case.pipe(), choose.integer_kernels()
    for name, kernel in [*list(kernels.items())[1:], ("reference", reference_many)]:
        with patch.object(choose, "integer_kernels", lambda name=name, kernel=kernel: {name: kernel}):
            yield difference(pictures(pipe), case.expected)


def saving(case: Case) -> Iterator[float]:
    for options in ({}, {"max_shard_size": "50KB"}):
        with tempfile.TemporaryDirectory() as folder:
            case.pipe().save_pretrained(folder, **options)
            assert (len(list(Path(folder, "transformer").glob("*.safetensors"))) > 1) == bool(options)
            loaded = TerDiTPipeline.from_pretrained(folder, dtype=ARITHMETICS[case.arithmetic].dtype)
        yield difference(pictures(computing_in(case.arithmetic, loaded)), case.expected)


def weight_format(case: Case) -> Iterator[float]:
    pipe = case.pipe()
    pipe.transformer.unpack()
    yield difference(pictures(pipe), case.expected)


def calls(case: Case) -> Iterator[float]:
    pipe = case.pipe()
    pictures(pipe, [1, 2], num_inference_steps=2)
    yield difference(pictures(pipe), case.expected)


def another_machine(case: Case) -> Iterator[float]:
    recorded = load_file(RECORDED)[case.name]
    yield difference(case.expected[: len(recorded)], recorded)


IN_THIS_PROCESS = {
    "nothing: another call, another process": calls,
    "float or packed weights": weight_format,
    "saving and loading, in one file, in shards": saving,
    "instruction set of the integer kernels": integer_kernels,
    "batch size and number of processes in `examples/evaluate.py`": fixed_rows,
    "batch size, one generator per image": batch_size,
    "number of threads": threads,
    "adaLN computed ahead, or step by step": step_by_step,
    "offloading": offloading,
    "`torch.compile`": compiled,
    "another machine": another_machine,
}


def applies(change: str, arithmetic: str) -> bool:
    """Float weights in half precision round to other codes, about which they warn; some layers have no integers."""
    if ARITHMETICS[arithmetic].bits is not None and not has_integer_kernel("cpu"):
        return False
    wanted = {"float or packed weights": arithmetic == "float32"}
    wanted["instruction set of the integer kernels"] = ARITHMETICS[arithmetic].bits is not None
    return wanted.get(change, True)


def from_another_process(
    folder: Path, keys: list[tuple[str, str]], **environment: str
) -> dict[tuple[str, str], torch.Tensor]:
    """The pictures of these cases, whose pipelines `folder` holds; with as many threads as here."""
    command = [sys.executable, __file__, "--pictures", str(folder), json.dumps(keys)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads | environment)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "pictures.pt")


@contextmanager
def saved_pipelines() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, make in PIPELINES.items():
            make().save_pretrained(Path(folder, name))
        yield Path(folder)


# Tests

CASES = [(pipeline, arithmetic) for pipeline in PIPELINES for arithmetic in ARITHMETICS]
QUICK = [("digits", "float32"), ("digits", "float32, int8"), ("digits", "bfloat16"), ("VAE", "float32")]
# Those of the default suite; the others are slow.
QUICK_OF = {
    "saving and loading, in one file, in shards": [("digits", "bfloat16")],
    "batch size, one generator per image": [("digits", "float32, int8"), ("VAE", "float32")],
    "offloading": [("digits", "float32, int8")],
    "`torch.compile`": [],
    "number of threads": [("VAE", "float32")],
    "float or packed weights": [("digits", "float32")],
    "nothing: another call, another process": [("digits", "float32, int8")],
    "instruction set of the integer kernels": [("digits", "float32, int8"), ("digits", "bfloat16")],
    "adaLN computed ahead, or step by step": [("digits", "float32"), ("digits", "float32, int8")],
    "batch size and number of processes in `examples/evaluate.py`": [("VAE", "float32"), ("digits", "float32, int8")],
}


@pytest.fixture(scope="module")
def cases():
    """Each made once: `cases("digits", "float32")`."""
    made: dict[tuple[str, str], Case] = {}
    return lambda *key: made.setdefault(key, None) or made.update({key: Case(*key)}) or made[key]


def combinations():
    for change in IN_THIS_PROCESS:
        for case in CASES:
            if applies(change, case[1]):
                slow = () if case in QUICK_OF.get(change, QUICK) else (pytest.mark.slow,)
                yield pytest.param(change, case, marks=slow, id=f"{change}-{'-'.join(case)}")


@pytest.mark.parametrize(("change", "case"), [*combinations()])
def test_the_picture_stays(cases, change, case):
    case = cases(*case)
    found = list(IN_THIS_PROCESS[change](case))
    assert found
    assert max(found) <= (0 if CLAIMS[change] == SAME else case.near), found


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", [case for case in CASES if applies("", case[1])], ids="-".join)
def test_inductor_stays_near(cases, case):
    case = cases(*case)
    assert max(compiled(case, backend="inductor")) <= case.near


@pytest.mark.parametrize("chosen", [QUICK, pytest.param(CASES, marks=pytest.mark.slow)], ids=["quick", "all"])
@pytest.mark.parametrize("limits", [pytest.param({}, marks=pytest.mark.slow), OLD_PROCESSOR], ids=["same", "older"])
def test_another_process_on_the_same_or_an_older_processor(cases, limits, chosen):
    # numba's kernels are not held to the older one: they have a test of their own
    keys = [key for key in chosen if applies("", key[1])]
    with saved_pipelines() as folder:
        found = from_another_process(folder, keys, **limits)
    for key in keys:
        assert difference(found[key], cases(*key).expected) <= (cases(*key).near if limits else 0), key


def test_seeds_and_arithmetics_show(cases):
    """The tolerances tell pictures apart: another seed is far, and each arithmetic is another picture."""
    expected = cases("digits", "float32").expected
    other = pictures(cases("digits", "float32").pipe(), [2, 3, 0, 1])
    assert difference(other, expected) > 0.5
    for arithmetic in ARITHMETICS:
        dtype, bits, _ = ARITHMETICS[arithmetic]
        exact = (
            choose_kernel(torch.device("cpu"), dtype, 64, 64, requested_bits=bits).bits is None
        )  # instead of 16 bits
        if applies("", arithmetic) and not (exact and dtype == torch.float32):
            assert difference(cases("digits", arithmetic).expected, expected) > ARITHMETICS["float32"].near


def test_the_page_shows_these_tables():
    page = (ROOT / "docs" / "numerics.md").read_text("utf-8")
    page = page.split("The next table is measured", 1)[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", page, re.MULTILINE)
    shown = dict(rows)
    assert {change: shown.get(change) for change in CLAIMS} == CLAIMS
    assert {name: shown.get(name) for name in ARITHMETICS} == {n: f"{a.near:g}" for n, a in ARITHMETICS.items()}
    assert len(rows) == len(CLAIMS) + len(ARITHMETICS) + 4  # two heads, each with a rule below


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how far pictures differ, by what changes.")
    parser.add_argument("--pictures", nargs=2, help=argparse.SUPPRESS)  # of the pipelines in a folder; which
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} instead")
    args = parser.parse_args()
    if args.pictures:
        folder, keys = Path(args.pictures[0]), [tuple(key) for key in json.loads(args.pictures[1])]
        pipes = {key: computing_in(key[1], TerDiTPipeline.from_pretrained(folder / key[0])) for key in keys}
        torch.save({key: pictures(pipe) for key, pipe in pipes.items()}, folder / "pictures.pt")
        return
    known = [case for case in CASES if applies("", case[1])]
    cases = {case: Case(*case) for case in known}
    if args.record:  # of the larger pictures one is enough
        save_file(
            {c.name: c.expected[: 4 if c.pipeline == "digits" else 1].contiguous() for c in cases.values()}, RECORDED
        )
        return
    found: dict[str, dict[str, float]] = {change: {} for change in CLAIMS}

    def add(change: str, arithmetic: str, *differences: float) -> None:
        found[change][arithmetic] = max(found[change].get(arithmetic, 0.0), *differences)

    for (_, arithmetic), case in cases.items():
        for change, measure in IN_THIS_PROCESS.items():
            if applies(change, arithmetic):
                add(change, arithmetic, *measure(case))
        if shutil.which("c++"):
            add("`torch.compile`", arithmetic, *compiled(case, backend="inductor"))
    with saved_pipelines() as folder:
        again, older = (from_another_process(folder, known, **limits) for limits in ({}, OLD_PROCESSOR))
    for key, case in cases.items():
        add("nothing: another call, another process", key[1], difference(again[key], case.expected))
        add("instruction set of PyTorch's libraries", key[1], difference(older[key], case.expected))
    print(f"| measured | {' | '.join(ARITHMETICS)} |\n|{' --- |' * (len(ARITHMETICS) + 1)}")
    for name, largest in found.items():
        cells = (f"{largest[a]:.1e}" if largest.get(a) else "0" if a in largest else "-" for a in ARITHMETICS)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
