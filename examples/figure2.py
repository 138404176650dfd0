"""Draw the network, after Figure 2 of TerDiT, from the model itself: docs/images/architecture.svg.

    python examples/figure2.py --preset terdit-600m-256 --output docs/images/architecture.svg

Names, sizes and which layers are ternary are read from a model on the meta device, shapes of activations from one
forward of it. A module that is not in the picture is an error, so the picture cannot fall behind the code.
"""

import argparse
from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.models.transformer_terdit import SIZES


WIDTH, HEIGHT = 1120, 880
TIMES = "\N{MULTIPLICATION SIGN}"
COLOURS = {  # kind: fill, border
    "ternary": ("#cfe2ff", "#2563c9"),
    "float": ("#e6e6e6", "#6b6b6b"),
    "norm": ("#ffd9a0", "#d97706"),  # the adaLN RMSNorm
    "operation": ("#ffffff", "#9a9a9a"),
    "tensor": ("none", "none"),
}
BLOCK = "transformer_blocks.0."


class Drawing:
    """Boxes for modules and operations, and arrows between them; remembers which modules it has."""

    def __init__(self, model: TerDiTTransformer2DModel):
        self.model = model
        self.drawn: set[str] = set()
        self.names = {name.removeprefix(BLOCK) for name, _ in model.named_modules()}
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 12, style: str = "", anchor: str = "middle") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" {style}>{escape(words)}</text>'
        )

    def box(self, kind: str, x: float, y: float, w: float, h: float, name: str, note: str = "") -> None:
        fill, border = COLOURS[kind]
        thick = 2.5 if kind == "norm" else 1.2
        if kind != "tensor":
            self.parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{border}"'
                f' stroke-width="{thick}"/>'
            )
        code = 'class="code" font-weight="600"' if name in self.names else ""
        self.text(x + w / 2, y + h / 2 + (-3 if note else 4), name, 12, code)
        if note:
            self.text(x + w / 2, y + h / 2 + 13, note, 11, 'fill="#444"')

    def module(self, path: str, x: float, y: float, w: float, h: float = 42) -> None:
        module = self.model.get_submodule(path)
        self.drawn.add(path)
        kind = "ternary" if isinstance(module, TernaryLinear) else "float"
        if path == f"{BLOCK}adaln.norm":
            kind = "norm"
        elif not list(module.parameters()):
            kind = "operation"
        note = describe(module)
        narrow = kind == "ternary" and w < 130  # the colour says it
        self.box(kind, x, y, w, h, path.removeprefix(BLOCK), note.removeprefix("Ternary ") if narrow else note)

    def arrow(self, *points: tuple[float, float], head: bool = True) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        marker = ' marker-end="url(#head)"' if head else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="#333" stroke-width="1.3"{marker}/>')

    def plus(self, x: float, y: float) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#fff" stroke="#333" stroke-width="1.3"/>')
        self.text(x, y + 5, "+", 15)

    def svg(self) -> str:
        missing = set(modules_to_draw(self.model)) - self.drawn
        if missing:
            raise ValueError(f"The picture lacks {sorted(missing)}: draw them.")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            ' font-family="system-ui, sans-serif">\n<style>.code { font-family: ui-monospace, monospace }</style>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def describe(module: nn.Module) -> str:
    """Kind and size of a module that holds weights."""
    if isinstance(module, (nn.Linear, TernaryLinear)):
        kind = "Ternary" if isinstance(module, TernaryLinear) else "Linear"
        return f"{kind} {module.in_features:,} → {module.out_features:,}"
    if isinstance(module, nn.Embedding):
        return f"Embedding {module.num_embeddings:,} {TIMES} {module.embedding_dim:,}"
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        kind = "RMSNorm" if isinstance(module, nn.RMSNorm) else "LayerNorm"
        return f"{kind} {module.normalized_shape[0]:,}"
    raise ValueError(f"No words for a {type(module).__name__}. Add it to `describe`.")


def modules_to_draw(model: TerDiTTransformer2DModel) -> Iterable[str]:
    """Modules with weights or a norm, of the first block and outside the blocks.

    Raises:
        ValueError: The blocks differ.
    """
    first = [(name, describe(m)) for name, m in model.transformer_blocks[0].named_modules() if _counts(m)]
    for block in model.transformer_blocks:
        if [(name, describe(m)) for name, m in block.named_modules() if _counts(m)] != first:
            raise ValueError(
                f"The blocks differ, so one cannot stand for all {len(model.transformer_blocks)}. Draw another model."
            )
    outside = [n for n, m in model.named_modules() if _counts(m) and not n.startswith("transformer_blocks.")]
    return [*outside, *(BLOCK + name for name, _ in first)]


def _counts(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, TernaryLinear, nn.Embedding, nn.RMSNorm, nn.LayerNorm))


def shapes(model: TerDiTTransformer2DModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the modules' outputs for one image, by name, in the order in which they run."""
    seen: dict[str, tuple[int, ...]] = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            seen.setdefault(name, tuple(output.shape[1:]))

        return hook

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Module) and not isinstance(module, nn.ModuleList)
    ]
    config = model.config
    size = (1, config.in_channels, config.sample_size, config.sample_size)
    with torch.device("meta"), torch.no_grad():
        model(torch.empty(size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return seen


def draw(preset: str) -> str:
    """The picture of a preset, as SVG."""
    with torch.device("meta"):
        model = TerDiTTransformer2DModel.from_preset(preset)
    config, out = model.config, shapes(model)
    d = Drawing(model)
    tokens = "({:,}, {:,})".format(*out["proj_in"])
    latents = f"({config.in_channels}, {config.sample_size}, {config.sample_size})"
    patch = config.patch_size
    temb = f"({out['class_embed'][-1]:,})"

    d.parts.append('<path d="M220,286 L476,60 M220,352 L476,846" stroke="#bbb" stroke-dasharray="3 4" fill="none"/>')
    d.text(24, 32, f"{preset}: {len(model.transformer_blocks)} blocks", 17, 'font-weight="600"', "start")

    # The network, x 30 to 230
    x, w, mid = 30, 200, 130
    d.box("tensor", x, 50, w, 34, "noisy latents", latents)
    d.arrow((mid, 90), (mid, 112))
    d.box(
        "operation",
        x,
        112,
        w,
        42,
        f"patches of {patch} {TIMES} {patch}",
        f"{out['proj_in'][0]:,} tokens of {patch**2 * config.in_channels}",
    )
    d.arrow((mid, 154), (mid, 180))
    d.module("proj_in", x, 180, w)
    d.arrow((mid, 222), (mid, 256))
    for shift in (10, 5, 0):
        d.box("operation", x + shift, 266 - shift, w - 10, 96, "")
    d.text(
        x + (w - 10) / 2,
        308,
        f"{len(model.transformer_blocks)} {TIMES} {type(model.transformer_blocks[0]).__name__}",
        13,
        'class="code" font-weight="600"',
    )
    d.text(x + (w - 10) / 2, 328, f"tokens {tokens}", 11, 'fill="#444"')
    d.arrow((mid, 362), (mid, 450))
    d.module("norm_out.norm", x, 450, w)
    d.arrow((mid, 492), (mid, 530))
    d.box("operation", x, 530, w, 30, f"{TIMES} (1 + scale) + shift")
    d.arrow((mid, 560), (mid, 590))
    d.module("proj_out", x, 590, w)
    d.arrow((mid, 632), (mid, 655))
    d.box("operation", x, 655, w, 30, "tokens back to an image")
    d.arrow((mid, 685), (mid, 706))
    d.box(
        "tensor",
        x,
        708,
        w,
        34,
        "noise" + (" and variance" if config.learn_sigma else ""),
        f"({out['proj_out'][-1] // patch**2}, {config.sample_size}, {config.sample_size})",
    )

    # The condition, x 262 to 440
    x, w, mid, bus = 262, 178, 351, 456
    d.box("tensor", x, 50, w, 24, "timestep")
    d.arrow((mid, 74), (mid, 92))
    d.box("operation", x, 92, w, 30, f"{out['time_proj'][-1]} sines and cosines")
    d.arrow((mid, 122), (mid, 140))
    d.module("time_embed.linear_1", x, 140, w)
    d.arrow((mid, 182), (mid, 198))
    d.box("operation", x, 198, w, 26, "SiLU")
    d.arrow((mid, 224), (mid, 240))
    d.module("time_embed.linear_2", x, 240, w)
    d.arrow((mid, 282), (mid, 304))
    d.plus(mid, 314)
    d.arrow((mid, 350), (mid, 324))
    d.module("class_embed", x, 350, w)
    d.arrow((mid, 414), (mid, 392))
    d.box("tensor", x, 412, w, 24, f"class label, or {config.num_classes:,} for none")
    d.text(bus - 6, 304, f"temb {temb}", 11, 'fill="#444"', "end")
    d.arrow((mid + 10, 314), (bus, 314), (bus, 493), (x + w, 493))
    d.box("operation", x, 480, w, 26, "SiLU")
    d.arrow((mid, 506), (mid, 524))
    d.module("norm_out.linear", x, 524, w)
    d.arrow((x, 545), (230, 545))

    # One block, x 476 to 1104
    d.parts.append(
        '<rect x="476" y="46" width="628" height="812" rx="10" fill="#fafafa" stroke="#333" stroke-dasharray="5 4"/>'
    )
    d.text(
        494,
        70,
        f"{type(model.transformer_blocks[0]).__name__}: transformer_blocks.0",
        13,
        'class="code" font-weight="600"',
        "start",
    )
    x, w, mid = 494, 186, 587
    d.arrow((bus, 314), (bus, 133), (x, 133))
    d.box("operation", x, 120, w, 26, "SiLU")
    d.arrow((mid, 146), (mid, 172))
    d.module(f"{BLOCK}adaln.linear", x, 172, w)
    d.arrow((mid, 214), (mid, 240))
    d.module(f"{BLOCK}adaln.norm", x, 240, w)
    d.text(mid, 298, "TerDiT's addition to adaLN: the", 11, 'fill="#a85b00"')
    d.text(mid, 312, "outputs of a ternary layer are large", 11, 'fill="#a85b00"')
    d.arrow((mid, 322), (mid, 342))
    d.box("operation", x, 342, w, 42, "six vectors", "shift, scale, gate; twice")

    left, right, mid, skip, bus = 722, 1062, 892, 1084, 702
    d.arrow((x + w, 363), (bus, 363), head=False)
    d.arrow((bus, 363), (bus, 177), (762, 177))
    d.arrow((bus, 363), (bus, 786), (812, 786))
    d.arrow((bus, 467), (812, 467))
    d.arrow((bus, 597), (762, 597))
    d.box("tensor", mid - 90, 78, 180, 20, f"tokens {tokens}")
    d.arrow((mid, 98), (mid, 116))
    d.module(f"{BLOCK}norm1", mid - 90, 116, 180, 36)
    d.arrow((mid, 152), (mid, 164))
    d.box("operation", 762, 164, 260, 26, f"{TIMES} (1 + scale_msa) + shift_msa")
    third = 106
    columns = [left, left + 117, left + 234]
    for column, name in zip(columns, ("to_q", "to_k", "to_v"), strict=True):
        d.arrow((mid, 190), (mid, 200), (column + third / 2, 200), (column + third / 2, 212))
        d.box("operation", column, 212, third, 4, "")
        d.module(f"{BLOCK}attn.{name}", column, 212, third, 52)
    for column, name in zip(columns, ("norm_q", "norm_k"), strict=False):
        d.arrow((column + third / 2, 264), (column + third / 2, 278))
        d.module(f"{BLOCK}attn.{name}", column, 278, third, 42)
        d.arrow((column + third / 2, 320), (column + third / 2, 332))
    d.box("operation", left, 332, 223, 24, "rotary positions")
    for column in columns[:2]:
        d.arrow((column + third / 2, 356), (column + third / 2, 368))
    d.arrow((columns[2] + third / 2, 264), (columns[2] + third / 2, 368))
    d.box(
        "operation",
        left,
        368,
        right - left,
        26,
        f"softmax attention, {config.num_attention_heads} heads of {config.attention_head_dim}",
    )
    d.arrow((mid, 394), (mid, 404))
    d.module(f"{BLOCK}attn.to_out.0", mid - 105, 404, 210, 40)
    d.arrow((mid, 444), (mid, 455))
    d.box("operation", 812, 455, 160, 24, f"{TIMES} gate_msa")
    d.arrow((mid, 479), (mid, 490))
    d.plus(mid, 500)
    d.arrow((mid, 106), (skip, 106), (skip, 500), (mid + 10, 500))

    d.arrow((mid, 510), (mid, 536))
    d.module(f"{BLOCK}norm2", mid - 90, 536, 180, 36)
    d.arrow((mid, 572), (mid, 584))
    d.box("operation", 762, 584, 260, 26, f"{TIMES} (1 + scale_mlp) + shift_mlp")
    half = 164
    for column, name in ((left, "gate_proj"), (right - half, "up_proj")):
        d.arrow((mid, 610), (mid, 620), (column + half / 2, 620), (column + half / 2, 632))
        d.module(f"{BLOCK}ff.{name}", column, 632, half)
        d.arrow((column + half / 2, 674), (column + half / 2, 686))
    d.box("operation", left, 686, right - left, 24, f"silu(gate) {TIMES} up")
    d.arrow((mid, 710), (mid, 720))
    d.module(f"{BLOCK}ff.down_proj", mid - 105, 720, 210, 42)
    d.arrow((mid, 762), (mid, 774))
    d.box("operation", 812, 774, 160, 24, f"{TIMES} gate_mlp")
    d.arrow((mid, 798), (mid, 808))
    d.plus(mid, 818)
    d.arrow((mid, 522), (skip, 522), (skip, 818), (mid + 10, 818))
    d.arrow((mid, 828), (mid, 850))

    # Legend
    ternary = sum(layer.in_features * layer.out_features for layer in model.ternary_layers().values())
    scales = sum(layer.weight_scale.numel() for layer in model.ternary_layers().values())
    rest = sum(p.numel() for p in model.parameters()) - ternary - scales
    share = ternary / (ternary + scales + rest)
    for i, (kind, words) in enumerate(
        (
            ("ternary", f"ternary: {ternary:,} weights ({share:.1%}), {scales} scales"),
            ("norm", "the RMSNorm after adaLN, full precision"),
            ("float", f"full precision: {rest:,} weights with all biases"),
            ("operation", "no weights"),
        )
    ):
        y = 768 + 26 * i
        d.box(kind, 30, y, 26, 16, "")
        d.text(66, y + 13, words, 12, anchor="start")
    return d.svg()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw the network.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=SIZES, default="terdit-600m-256")
    parser.add_argument("--output", type=Path, default=Path("architecture.svg"), help="SVG file to write")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(draw(args.preset), encoding="utf-8")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
