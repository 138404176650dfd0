"""Draw the network, after Figure 2 of TerDiT, from the model itself: docs/images/architecture.svg.

    python docs/figure2.py --preset terdit-600m-256 --output docs/images/architecture.svg

Names, sizes and which layers are ternary are read from a model on the meta device, shapes of activations from one
forward of it. A module that is not in the picture is an error, so the picture cannot fall behind the code.
"""

import argparse
from html import escape
from pathlib import Path

import torch
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.models.transformer_terdit import SIZES


WIDTH, HEIGHT = 1120, 880
TIMES = "\N{MULTIPLICATION SIGN}"
COLORS = {  # kind: fill, border
    "ternary": ("#cfe2ff", "#2563c9"),
    "float": ("#e6e6e6", "#6b6b6b"),
    "norm": ("#ffd9a0", "#d97706"),  # the adaLN RMSNorm
    "operation": ("#ffffff", "#9a9a9a"),
    "block": ("#fafafa", "#333"),  # dashed: what the frame on the right shows from the inside
    "tensor": ("none", "none"),
}
BLOCK = "transformer_blocks.0."
CODE = 'class="code" font-weight="600"'
GRAY = 'fill="#444"'


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
        fill, border = COLORS[kind]
        thick = 2.5 if kind == "norm" else 1.2
        dashes = ' stroke-dasharray="5 4"' if kind == "block" else ""
        if kind != "tensor":
            self.parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{border}"'
                f' stroke-width="{thick}"{dashes}/>'
            )
        self.text(x + w / 2, y + h / 2 + (-2 if note else 5), name, 14, CODE if name in self.names else "")
        if note:
            self.text(x + w / 2, y + h / 2 + 15, note, 13 if w >= 130 else 12, GRAY)

    def module(self, path: str, x: float, y: float, w: float, h: float = 42) -> None:
        module = self.model.get_submodule(path)
        self.drawn.add(path)
        kind = "ternary" if isinstance(module, TernaryLinear) else "float"
        if path == f"{BLOCK}adaln.norm":
            kind = "norm"
        elif not list(module.parameters()):
            kind = "operation"
        note = describe(module)
        narrow = kind == "ternary" and w < 130  # the color says it
        self.box(kind, x, y, w, h, path.removeprefix(BLOCK), note.removeprefix("Ternary ") if narrow else note)

    def arrow(self, *points: tuple[float, float], head: bool = True) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        marker = ' marker-end="url(#head)"' if head else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="#333" stroke-width="1.3"{marker}/>')

    def down(self, x: float, *spans: tuple[float, float]) -> None:
        """Vertical arrows."""
        for start, end in spans:
            self.arrow((x, start), (x, end))

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
    """Kind and size of a module that has weights."""
    if isinstance(module, (nn.Linear, TernaryLinear)):
        kind = "Ternary" if isinstance(module, TernaryLinear) else "Linear"
        return f"{kind} {module.in_features:,} → {module.out_features:,}"
    if isinstance(module, nn.Embedding):
        return f"Embedding {module.num_embeddings:,} {TIMES} {module.embedding_dim:,}"
    kind = "RMSNorm" if isinstance(module, nn.RMSNorm) else "LayerNorm"
    return f"{kind} {module.normalized_shape[0]:,}"


def modules_to_draw(model: TerDiTTransformer2DModel) -> list[str]:
    """Modules with weights or a norm, of the first block and outside the blocks.

    Raises:
        ValueError: The blocks differ.
    """
    kinds = (nn.Linear, TernaryLinear, nn.Embedding, nn.RMSNorm, nn.LayerNorm)

    def inside(module: nn.Module) -> dict[str, str]:
        return {name: describe(part) for name, part in module.named_modules() if isinstance(part, kinds)}

    blocks = [inside(block) for block in model.transformer_blocks]
    if any(block != blocks[0] for block in blocks):
        raise ValueError(f"The blocks differ, so one cannot represent all {len(blocks)}. Draw another model.")
    outside = [name for name in inside(model) if not name.startswith("transformer_blocks.")]
    return [*outside, *(BLOCK + name for name in blocks[0])]


def shapes(model: TerDiTTransformer2DModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the modules' outputs for one image, by name, in the order in which they run."""
    seen: dict[str, tuple[int, ...]] = {}

    def record(name: str):
        return lambda module, inputs, output: seen.setdefault(name, tuple(output.shape[1:])) and None

    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [
        module.register_forward_hook(record(name)) for name, module in modules if not isinstance(module, nn.ModuleList)
    ]
    size = (1, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    with torch.device("meta"), torch.no_grad():
        model(torch.empty(size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return seen


def draw_network(d: Drawing, out: dict[str, tuple[int, ...]]) -> None:
    """The whole network, x 30 to 230."""
    config, patch, x, w, mid = d.model.config, d.model.config.patch_size, 30, 200, 130
    blocks, size = d.model.transformer_blocks, f"{config.sample_size}, {config.sample_size})"
    d.down(mid, (90, 112), (154, 180), (222, 256), (362, 450), (492, 530), (560, 590), (632, 655), (685, 706))
    d.box("tensor", x, 50, w, 34, "noisy latents", f"({config.in_channels}, {size}")
    tokens = f"{out['proj_in'][0]:,} tokens of {patch**2 * config.in_channels}"
    d.box("operation", x, 112, w, 42, f"patches of {patch} {TIMES} {patch}", tokens)
    d.module("proj_in", x, 180, w)
    for shift in (10, 5, 0):
        d.box("block", x + shift, 266 - shift, w - 10, 96, "")
    d.text(x + (w - 10) / 2, 308, f"{len(blocks)} {TIMES} {type(blocks[0]).__name__}", 15, CODE)
    d.text(x + (w - 10) / 2, 330, "tokens ({:,}, {:,})".format(*out["proj_in"]), 13, GRAY)
    d.module("norm_out.norm", x, 450, w)
    d.box("operation", x, 530, w, 30, f"{TIMES} (1 + scale) + shift")
    d.module("proj_out", x, 590, w)
    d.box("operation", x, 655, w, 30, "tokens back to an image")
    predicted = "noise" + (" and variance" if config.learn_sigma else "")
    d.box("tensor", x, 708, w, 34, predicted, f"({out['proj_out'][-1] // patch**2}, {size}")


def draw_condition(d: Drawing, out: dict[str, tuple[int, ...]]) -> None:
    """Timestep and class label, x 262 to 440; their sum goes along x 456 into block and output norm."""
    x, w, mid, bus = 262, 178, 351, 456
    d.down(mid, (74, 92), (122, 140), (182, 198), (224, 240), (282, 304), (350, 324), (414, 392), (506, 524))
    d.box("tensor", x, 50, w, 24, "timestep")
    d.box("operation", x, 92, w, 30, f"{out['time_proj'][-1]} sines and cosines")
    d.module("time_embed.linear_1", x, 140, w)
    d.box("operation", x, 198, w, 26, "SiLU")
    d.module("time_embed.linear_2", x, 240, w)
    d.plus(mid, 314)
    d.module("class_embed", x, 350, w)
    d.box("tensor", x, 412, w, 24, f"class label, or {d.model.config.num_classes:,} for none")
    d.text(bus - 6, 304, f"temb ({out['class_embed'][-1]:,})", 13, GRAY, "end")
    d.arrow((mid + 10, 314), (bus, 314), (bus, 493), (x + w, 493))
    d.box("operation", x, 480, w, 26, "SiLU")
    d.module("norm_out.linear", x, 524, w)
    d.arrow((x, 545), (230, 545))
    d.arrow((bus, 314), (bus, 133), (494, 133))


def draw_adaln(d: Drawing) -> None:
    """The adaLN of a block, x 494 to 680; its six vectors go along x 702."""
    x, w, mid, bus = 494, 186, 587, 702
    d.down(mid, (146, 172), (214, 240), (324, 342))
    d.box("operation", x, 120, w, 26, "SiLU")
    d.module(f"{BLOCK}adaln.linear", x, 172, w)
    d.module(f"{BLOCK}adaln.norm", x, 240, w)
    d.text(mid, 299, "TerDiT's addition: outputs of", 13, 'fill="#a85b00"')
    d.text(mid, 316, "ternary layers are large", 13, 'fill="#a85b00"')
    d.box("operation", x, 342, w, 42, "six vectors", "shift, scale, gate; twice")
    d.arrow((x + w, 363), (bus, 363), head=False)
    for y, end in ((177, 762), (786, 812)):
        d.arrow((bus, 363), (bus, y), (end, y))
    for y, end in ((467, 812), (597, 762)):
        d.arrow((bus, y), (end, y))


def draw_block(d: Drawing, out: dict[str, tuple[int, ...]]) -> None:
    """Attention and feed-forward of a block, x 722 to 1062, with their residual connections at x 1084."""
    config, left, right, mid, skip = d.model.config, 722, 1062, 892, 1084
    d.down(mid, (98, 116), (152, 164), (394, 404), (444, 455), (479, 490))
    d.box("tensor", mid - 90, 78, 180, 20, "tokens ({:,}, {:,})".format(*out["proj_in"]))
    d.module(f"{BLOCK}norm1", mid - 90, 116, 180, 36)
    d.box("operation", 762, 164, 260, 26, f"{TIMES} (1 + scale_msa) + shift_msa")
    third = 110
    for column, name, norm in ((left, "to_q", "norm_q"), (left + 115, "to_k", "norm_k"), (left + 230, "to_v", "")):
        x = column + third / 2
        d.arrow((mid, 190), (mid, 200), (x, 200), (x, 212))
        d.module(f"{BLOCK}attn.{name}", column, 212, third, 52)
        if norm:
            d.down(x, (264, 278), (320, 332), (356, 368))
            d.module(f"{BLOCK}attn.{norm}", column, 278, third, 42)
        else:
            d.down(x, (264, 368))
    d.box("operation", left, 332, 225, 24, "rotary positions")
    heads = f"softmax attention, {config.num_attention_heads} heads of {config.attention_head_dim}"
    d.box("operation", left, 368, right - left, 26, heads)
    d.module(f"{BLOCK}attn.to_out.0", mid - 105, 404, 210, 40)
    d.box("operation", 812, 455, 160, 24, f"{TIMES} gate_msa")
    d.plus(mid, 500)
    d.arrow((mid, 106), (skip, 106), (skip, 500), (mid + 10, 500))

    d.down(mid, (510, 536), (572, 584), (710, 720), (762, 774), (798, 808), (828, 850))
    d.module(f"{BLOCK}norm2", mid - 90, 536, 180, 36)
    d.box("operation", 762, 584, 260, 26, f"{TIMES} (1 + scale_mlp) + shift_mlp")
    half = 164
    for column, name in ((left, "gate_proj"), (right - half, "up_proj")):
        x = column + half / 2
        d.arrow((mid, 610), (mid, 620), (x, 620), (x, 632))
        d.module(f"{BLOCK}ff.{name}", column, 632, half)
        d.down(x, (674, 686))
    d.box("operation", left, 686, right - left, 24, f"silu(gate) {TIMES} up")
    d.module(f"{BLOCK}ff.down_proj", mid - 105, 720, 210, 42)
    d.box("operation", 812, 774, 160, 24, f"{TIMES} gate_mlp")
    d.plus(mid, 818)
    d.arrow((mid, 522), (skip, 522), (skip, 818), (mid + 10, 818))


def draw_legend(d: Drawing) -> None:
    layers = d.model.ternary_layers().values()
    ternary = sum(layer.in_features * layer.out_features for layer in layers)
    scales = sum(layer.weight_scale.numel() for layer in layers)
    total = sum(parameter.numel() for parameter in d.model.parameters())
    meanings = {
        "ternary": f"ternary: {ternary:,} weights ({ternary / total:.1%}), {scales} scales",
        "norm": "the RMSNorm after adaLN, full precision",
        "float": f"full precision: {total - ternary - scales:,} weights with all biases",
        "operation": "no weights",
    }
    for i, (kind, words) in enumerate(meanings.items()):
        d.box(kind, 30, 768 + 26 * i, 26, 16, "")
        d.text(66, 781 + 26 * i, words, 14, anchor="start")


def draw(preset: str) -> str:
    """Draw a preset, as SVG."""
    with torch.device("meta"):
        model = TerDiTTransformer2DModel.from_preset(preset)
    d, out, block = Drawing(model), shapes(model), type(model.transformer_blocks[0]).__name__
    d.text(24, 32, f"{preset}: {len(model.transformer_blocks)} blocks", 17, 'font-weight="600"', "start")
    d.parts.append(
        '<rect x="476" y="46" width="628" height="812" rx="10" fill="#fafafa" stroke="#333" stroke-dasharray="5 4"/>'
    )
    d.text(494, 70, f"one {block}: transformer_blocks.0", 15, CODE, "start")
    draw_network(d, out)
    draw_condition(d, out)
    draw_adaln(d)
    draw_block(d, out)
    draw_legend(d)
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
