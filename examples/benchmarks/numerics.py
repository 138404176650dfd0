"""`numerics`: the error of every dtype and arithmetic against float64, of a layer, a forward pass and a picture.

The models are the bundled ones; a picture takes 50 steps.
"""

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

import shared
from diffusers_terdit import TerDiTPipeline, pack_ternary
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import has_integer_kernel, integer_linear, reference, ternary_linear
from shared import INPUTS, Results, new_input, relative_error, rounded


DTYPES = ("float32", "bfloat16", "float16")
ARITHMETICS = {"dense": None, "exact": None, "int16": 16, "int8": 8}
MODELS = {"digits": 2.0, "emoji": 1.5}  # bundled, and the guidance scale of their pictures
LAYER = {"rows": 256, "outputs": 768, "inputs": 1024}
STEPS, IMAGES = 50, 8
TIMESTEPS = (20, 250, 500, 900)


def add_arguments(commands) -> None:
    parser = commands.add_parser("numerics", help="error of every dtype and arithmetic against float64")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=shared.positive, default=STEPS, help="of a picture")
    shared.add_output_arguments(parser, resumes=False)
    parser.set_defaults(run=run)


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    results = Results(args, "numerics", page)
    if not args.render:
        results.data = {"machine": shared.machine(), "command": shared.command_line(), "steps": args.steps}
        results.data["layer"] = list(measure_layer())
        results.data["models"] = {name: list(measure_model(name, args.steps)) for name in args.models}
        results.save()
    results.finish()


def modes() -> list[tuple[str, str]]:
    """Return (arithmetic, dtype) of those that run here."""
    names = [name for name, bits in ARITHMETICS.items() if bits is None or has_integer_kernel("cpu")]
    return [(name, dtype) for name in names for dtype in DTYPES]


def measure_layer() -> Iterator[dict]:
    generator = torch.Generator().manual_seed(0)
    ternary = torch.randint(-1, 2, (LAYER["outputs"], LAYER["inputs"]), generator=generator)
    packed, scale = pack_ternary(ternary), torch.tensor([0.03])
    weight = reference.dequantize(ternary, scale)
    inputs = {kind: new_input(kind, LAYER["rows"], LAYER["inputs"], generator) for kind in INPUTS}
    for name, dtype in modes():
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
    """Rotate (B, L, H, D/H) by the angles of (L, D/H), in the dtype of `x`."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def in_float64(model):
    """Return a copy that computes in float64 throughout."""
    model = copy.deepcopy(model).double()
    model.set_attn_processor(Float64AttnProcessor())
    return model


def labels_of(model) -> list[int]:
    return [index * model.config.num_classes // IMAGES for index in range(IMAGES)]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(IMAGES)]


def measure_model(name: str, steps: int) -> Iterator[dict]:
    pipe = TerDiTPipeline.from_pretrained(bundled(name))
    model, scale = pipe.transformer, MODELS[name]
    exact = in_float64(model)
    noise = start_noise(pipe, generators()).repeat(len(TIMESTEPS), 1, 1, 1)
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


def start_noise(pipe: TerDiTPipeline, random: list[torch.Generator]) -> Tensor:
    """Draw the pipeline's start noise, (B, C, h, w)."""
    config = pipe.transformer.config
    return randn_tensor((IMAGES, config.in_channels, config.sample_size, config.sample_size), generator=random)


def float64_pictures(pipe: TerDiTPipeline, exact, steps: int, scale: float) -> Tensor:
    """Compute what the pipeline does, in float64: (B, C, H, W)."""
    scheduler, random = copy.deepcopy(pipe.scheduler), generators()
    scheduler.set_timesteps(steps)
    latents = start_noise(pipe, random).double()
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
    """Return [-1, 1] as a PNG holds it."""
    return (images.double().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def page(data: dict) -> str:
    layer = [[mode_of(record), *(f"{record['error'][kind]:.1e}" for kind in INPUTS)] for record in data["layer"]]
    models = []
    for records in zip(*data["models"].values(), strict=True):
        line = [mode_of(records[0])]
        for record in records:
            line += [f"{record['forward']:.1e}", f"{record['picture']:.1e}", f"{100 * record['pixels']:.2g} %"]
        models.append(line)
    header = [f"{name}, {what}" for name in data["models"] for what in ("forward", "picture", "8-bit pixels")]
    sizes = {"sizes": LAYER, "images": IMAGES, "timesteps": TIMESTEPS}
    return shared.render("numerics", **data | {"layer": layer, "models": models}, header=header, **sizes)


def mode_of(record: dict) -> str:
    return f"{record['mode']}, {record['dtype']}"
