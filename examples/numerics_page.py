"""What `benchmark.py numerics` measures: the error of every dtype and arithmetic against float64.

Of a layer, of one forward pass of the bundled models, and of their pictures after 50 steps. The results go to JSON;
the page is rendered from that.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from diffusers_terdit import TerDiTPipeline, pack_ternary
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import has_integer_kernel, integer_linear, reference, ternary_linear
from kernel_benchmark import new_input, relative_error, rounded
from kernel_page import INPUTS, table


DTYPES = ("float32", "bfloat16", "float16")
ARITHMETICS = {"dense": None, "exact": None, "int16": 16, "int8": 8}
MODELS = {"digits": 2.0, "emoji": 1.5}  # bundled, and the guidance scale of their pictures
ROWS, OUTPUTS, INPUT_FEATURES = 256, 768, 1024
STEPS, IMAGES = 50, 8
TIMESTEPS = (20, 250, 500, 900)

INTRODUCTION = f"""\
# Errors against float64

How far from exact is each dtype and arithmetic: a layer, a forward pass, a picture? This page is rendered from
[numerics.json](numerics.json) (`python examples/benchmark.py numerics --render`). What changes a picture and what does
not: [the same picture everywhere](../numerics.md).

- **dense**: `F.linear`, or the model `dequantize()` gives; **exact**, **int16**, **int8**: the packed layer or model
  with `set_activation_bits(None)`, `(16)`, `(8)`, of which the last leaves `down_proj` at 16 bits. The default in
  float32 and float16 is exact, in bfloat16 int16.
- **Layer**: {ROWS} rows, {INPUT_FEATURES} inputs, {OUTPUTS} outputs, random codes: normal numbers ("gaussian"),
  SiLU-gated ones ("gated": silu(a) b), and 0.1 % of the numbers 20 times as large ("outliers").
- **Forward**: the bundled checkpoints on noise, {IMAGES} labels at each of the timesteps
  {", ".join(map(str, TIMESTEPS))}.
- **Picture**: DDPM with guidance, {IMAGES} labels, one generator per image, by the pipeline.
- **float64**: the same packed model in `.double()`, with an attention that turns queries and keys in float64 (that of
  diffusers does it in float32), and a loop that keeps latents and steps in float64 and draws the pipeline's noise. The
  schedule and the sines of positions and timesteps are the float32 ones in all.
- **Error**: norm of the difference over the norm of the float64 result, so that bfloat16 and float16 include the
  rounding of input, other weights and output. "8-bit pixels": the share of values that differ as PNG.
"""

WORDS = """\
With integers a layer's error grows with outliers, as one step covers a row of the input. Which error can be
seen is not measured here; [speed](../speed.md) says what the arithmetics cost.
"""


def add_arguments(commands) -> None:
    sub = commands.add_parser("numerics", help="error of every dtype and arithmetic against float64")
    sub.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    sub.add_argument("--steps", type=int, default=STEPS, help="of a picture")
    sub.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    sub.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")


def run(args: argparse.Namespace, machine: str, command: str) -> None:
    """Measure into the JSON, then write the page from it."""
    path = args.output_dir / "numerics.json"
    if args.render and not path.exists():
        raise SystemExit(f"{path} does not exist; measure first, without --render.")
    if args.steps < 1:
        raise SystemExit(f"--steps must be 1 or more, got {args.steps}.")
    if not args.render:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            data = {
                "machine": machine,
                "command": re.sub(r" --output_dir \S+", "", command),
                "steps": args.steps,
                "layer": list(measure_layer()),
                "models": {name: list(measure_model(name, args.steps)) for name in args.models},
            }
        path.write_text(json.dumps(data, indent=1) + "\n")
    (args.output_dir / "numerics.md").write_text(page(json.loads(path.read_text())), "utf-8")


def modes() -> list[tuple[str, str]]:
    """(arithmetic, dtype) of those that run here."""
    names = [name for name, bits in ARITHMETICS.items() if bits is None or has_integer_kernel("cpu")]
    return [(name, dtype) for name in names for dtype in DTYPES]


def measure_layer() -> Iterator[dict]:
    generator = torch.Generator().manual_seed(0)
    ternary = torch.randint(-1, 2, (OUTPUTS, INPUT_FEATURES), generator=generator)
    packed, scale = pack_ternary(ternary), torch.tensor([0.03])
    weight = reference.dequantize(ternary, scale)
    inputs = {kind: new_input(kind, ROWS, INPUT_FEATURES, generator) for kind in INPUTS}
    for name, dtype in modes():
        function: Callable[[Tensor], Tensor]
        if name == "dense":
            function = partial(F.linear, weight=weight.to(getattr(torch, dtype)))
        elif name == "exact":
            function = partial(ternary_linear, weight_packed=packed, weight_scale=scale)
        else:
            function = partial(integer_linear, weight_packed=packed, weight_scale=scale, bits=ARITHMETICS[name])
        errors = {
            kind: rounded(relative_error(function(x.to(getattr(torch, dtype))), x.double() @ weight.double().T))
            for kind, x in inputs.items()
        }
        yield {"mode": name, "dtype": dtype, "error": errors}


class Float64AttnProcessor:
    """`TerDiTAttnProcessor` without its float32: diffusers rotates in that whatever the dtype."""

    def __call__(self, attn, hidden_states: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(-1, (-1, attn.head_dim))  # (B, L, H, D/H)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(-1, (-1, attn.head_dim))
        value = attn.to_v(hidden_states).unflatten(-1, (-1, attn.head_dim))
        query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(*heads, enable_gqa=key.shape[2] != query.shape[2])
        return attn.to_out[0](output.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, L, H, D/H) by the angles of (L, D/H), in the dtype of `x`."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def in_float64(model):
    """A copy that computes in float64 throughout."""
    model = copy.deepcopy(model).double()
    model.set_attn_processor(Float64AttnProcessor())
    return model


def labels_of(model) -> list[int]:
    return [index * model.config.num_classes // IMAGES for index in range(IMAGES)]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(IMAGES)]


def measure_model(name: str, steps: int) -> Iterator[dict]:
    pipe = TerDiTPipeline.from_pretrained(bundled(name))
    pipe.set_progress_bar_config(disable=True)
    model, scale = pipe.transformer, MODELS[name]
    exact = in_float64(model)
    noise = start(pipe, generators()).repeat(len(TIMESTEPS), 1, 1, 1)
    timesteps = torch.tensor(TIMESTEPS).repeat_interleave(IMAGES)
    labels = torch.tensor(labels_of(model) * len(TIMESTEPS))
    forward = exact(noise.double(), timesteps, labels).sample
    picture = float64_pictures(pipe, exact, steps, scale)
    for mode, dtype in modes():
        own = model.dequantize() if mode == "dense" else copy.deepcopy(model)
        own.to(getattr(torch, dtype))
        if mode != "dense":
            own.set_activation_bits(ARITHMETICS[mode])
        found = own(noise.to(own.dtype), timesteps, labels).sample
        own_pipe = TerDiTPipeline(own, pipe.scheduler)
        own_pipe.set_progress_bar_config(disable=True)
        images = own_pipe(
            labels_of(model), num_inference_steps=steps, guidance_scale=scale, generator=generators(),
            output_type="latent",
        ).images  # fmt: skip
        yield {
            "mode": mode,
            "dtype": dtype,
            "forward": rounded(relative_error(found, forward)),
            "picture": rounded(relative_error(images.clamp(-1, 1), picture.clamp(-1, 1))),
            "pixels": rounded(float((bytes_of(images) != bytes_of(picture)).double().mean())),
        }


def start(pipe: TerDiTPipeline, random: list[torch.Generator]) -> Tensor:
    """The pipeline's start noise: (B, C, h, w)."""
    config = pipe.transformer.config
    return randn_tensor((IMAGES, config.in_channels, config.sample_size, config.sample_size), generator=random)


def float64_pictures(pipe: TerDiTPipeline, exact, steps: int, scale: float) -> Tensor:
    """What the pipeline computes, in float64: (B, C, H, W)."""
    scheduler, random = copy.deepcopy(pipe.scheduler), generators()
    scheduler.set_timesteps(steps)
    latents = start(pipe, random).double()
    labels = torch.tensor(labels_of(exact))
    both = torch.cat([labels, torch.full_like(labels, exact.config.num_classes)])
    channels = exact.config.in_channels

    def same_noise(shape, generator, dtype, **kwargs) -> Tensor:
        return randn_tensor(shape, generator=generator).to(dtype)

    with patch.object(scheduling_ddpm, "randn_tensor", same_noise):
        for timestep in scheduler.timesteps:
            output = exact(latents.repeat(2, 1, 1, 1), timestep.expand(len(both)), both).sample
            conditional, unconditional = output.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            prediction = torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)
            latents = scheduler.step(prediction, timestep, latents, generator=random).prev_sample
    return latents


def bytes_of(images: Tensor) -> Tensor:
    """[-1, 1] as a PNG holds it."""
    return (images.double().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def page(data: dict) -> str:
    """The Markdown; every figure comes from `data`."""
    parts = [INTRODUCTION, f"{data['machine']}\n", f"```bash\n{data['command']}\n```\n", "## A layer\n"]
    lines = [[label(record), *(f"{record['error'][kind]:.1e}" for kind in INPUTS)] for record in data["layer"]]
    parts.append(table(["", *INPUTS], lines))
    parts.append(f"## A forward pass, and a picture after {data['steps']} steps\n")
    names = list(data["models"])
    header = [f"{name}, {what}" for name in names for what in ("forward", "picture", "8-bit pixels")]
    lines = []
    for records in zip(*data["models"].values(), strict=True):
        cells = [(f"{r['forward']:.1e}", f"{r['picture']:.1e}", f"{100 * r['pixels']:.2g} %") for r in records]
        lines.append([label(records[0]), *(value for cell in cells for value in cell)])
    parts.append(table(["", *header], lines))
    return "\n".join([*parts, WORDS])


def label(record: dict) -> str:
    return f"{record['mode']}, {record['dtype']}"
