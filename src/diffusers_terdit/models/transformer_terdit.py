"""The ternary diffusion transformer of TerDiT (https://arxiv.org/abs/2405.14854, Figure 2): the whole network.

Shapes: B images, C channels, h x w latents, p patch size, L = h*w/p^2 tokens, D width, H heads, E conditioning width.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import FasterCacheConfig
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .._diffusers import is_offloaded
from ..layers import TernaryLinear, call_all
from ..lora import TernaryAdapterMixin, refuse_adapters
from ..modeling import TernaryModelMixin, size_in_bytes
from ..ops import reference
from ..ops.gpu.graphs import graphed
from ..storage.configs import check_config


# Source: the released checkpoints. 600M: 16 layers, width 1536; 4.2B: 32 layers, width 3072; 32 heads each.
_TERDIT_600M = {"num_layers": 16, "num_attention_heads": 32, "attention_head_dim": 48}
_TERDIT_4_2B = {"num_layers": 32, "num_attention_heads": 32, "attention_head_dim": 96}
SIZES = {
    "terdit-600m-256": {**_TERDIT_600M, "sample_size": 32},
    "terdit-600m-512": {**_TERDIT_600M, "sample_size": 64},
    "terdit-4.2b-256": {**_TERDIT_4_2B, "sample_size": 32},
    "terdit-4.2b-512": {**_TERDIT_4_2B, "sample_size": 64},
}


LARGEST_SMALL_HEAD = 64  # features, up to which attention in float32 trains faster on a CPU


class TerDiTRMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input: under autocast torch would leave its fused kernel for a float32 weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type == "cpu":  # where torch's takes twice as long
            wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (B, L, 1)
            scale = torch.rsqrt(norm.square() / wide.shape[-1] + self.eps)
            return (wide * scale).mul_(self.weight.to(wide.dtype)).to(hidden_states.dtype)
        weight = self.weight.to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, self.normalized_shape, weight, self.eps)


def rotate(hidden_states: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighboring features by its position's angle, in float32: (B, L, H, D/H)."""
    if hidden_states.device.type == "cpu" and not torch.compiler.is_compiling():  # the same in a fifth of the time
        cos, sin = (part[:, ::2].unsqueeze(1) for part in image_rotary_emb)  # (L, 1, D/H/2)
        pairs = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(hidden_states.dtype)
    return apply_rotary_emb(hidden_states, image_rotary_emb, sequence_dim=1)


def attention_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype in which softmax attention is fastest, forward and backward: that of `value` (B, L, H, D/H).

    torch's backward of attention in half precision on a CPU takes up to 6 times as long as in float32 where a head has
    32 features, twice as long where it has 48, and less from 96 on (docs/training.md).
    """
    small = value.device.type == "cpu" and value.shape[-1] <= LARGEST_SMALL_HEAD
    return torch.float32 if small and value.dtype.itemsize == 2 and value.requires_grad else value.dtype


class TerDiTAttnProcessor:
    """Softmax attention over all tokens, with rotary positions on queries and keys."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "TerDiTAttention", hidden_states: Tensor, image_rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        query, key, value = call_all((attn.to_q, attn.to_k, attn.to_v), hidden_states)  # (B, L, D)
        query = attn.norm_q(query).unflatten(-1, (-1, attn.head_dim))  # (B, L, H, D/H)
        key = attn.norm_k(key).unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        device, dtype = value.device.type, attention_dtype(value)
        with torch.autocast(device, enabled=False) if dtype != value.dtype else nullcontext():
            hidden_states = dispatch_attention_fn(
                rotate(query, image_rotary_emb).to(dtype),
                rotate(key, image_rotary_emb).to(dtype),
                value.to(dtype),
                enable_gqa=key.shape[2] != query.shape[2],
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        return attn.to_out[0](hidden_states.flatten(2, 3).to(value.dtype))  # (B, L, D)


class TerDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention; queries and keys pass a LayerNorm over the full width when `qk_norm`."""

    _default_processor_cls = TerDiTAttnProcessor
    _available_processors = [TerDiTAttnProcessor]
    _supports_qkv_fusion = False  # the host would fuse into a dense nn.Linear

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, linear):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.to_q = linear(dim, heads * head_dim, bias=False)
        self.to_k = linear(dim, kv_heads * head_dim, bias=False)
        self.to_v = linear(dim, kv_heads * head_dim, bias=False)
        self.norm_q = nn.LayerNorm(heads * head_dim) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(kv_heads * head_dim) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([linear(heads * head_dim, dim, bias=False)])
        self.set_processor(self._default_processor_cls())  # type: ignore[operator]

    def forward(self, hidden_states: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        return self.processor(self, hidden_states, image_rotary_emb)  # type: ignore[operator]


class TerDiTFeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, dim: int, ffn_dim: int, linear):
        super().__init__()
        self.gate_proj = linear(dim, ffn_dim, bias=False)
        self.up_proj = linear(dim, ffn_dim, bias=False)
        self.down_proj = linear(ffn_dim, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = call_all((self.gate_proj, self.up_proj), hidden_states)
        hidden_states = nn.functional.silu(gate).mul_(up)
        del gate, up  # 32 MB of 4.2B in float32
        return self.down_proj(hidden_states)


class TerDiTAdaLN(nn.Module):
    """Six modulation vectors of a block: SiLU, ternary linear, and the RMSNorm that TerDiT adds to bound them.

    They depend on timestep and label alone, so a sampler may compute them ahead (`AdaLNAhead`) and hand them in.
    """

    def __init__(self, cond_dim: int, dim: int, eps: float, norm: bool, linear):
        super().__init__()
        self.linear = linear(cond_dim, 6 * dim, bias=True)
        self.norm = TerDiTRMSNorm(6 * dim, eps=eps) if norm else nn.Identity()

    def forward(self, temb: Tensor, ahead: Tensor | None = None) -> Tensor:
        if ahead is not None:
            return ahead
        return self.norm(self.linear(nn.functional.silu(temb)))  # (B, 6 * D)


class TerDiTBlock(nn.Module):
    """Attention and feed-forward, each normalized, modulated by the condition and gated."""

    def __init__(self, dim, heads, kv_heads, head_dim, ffn_dim, cond_dim, qk_norm, adaln_norm, eps, linear):
        super().__init__()
        self.adaln = TerDiTAdaLN(cond_dim, dim, eps, adaln_norm, linear)
        self.norm1 = TerDiTRMSNorm(dim, eps=eps)
        self.attn = TerDiTAttention(dim, heads, kv_heads, head_dim, qk_norm, linear)
        self.norm2 = TerDiTRMSNorm(dim, eps=eps)
        self.ff = TerDiTFeedForward(dim, ffn_dim, linear)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        modulation: Tensor | None = None,
    ) -> Tensor:
        modulation = self.adaln(temb, modulation).unsqueeze(1)  # (B, 1, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)

        residual = hidden_states
        hidden_states = torch.addcmul(shift_msa, self.norm1(hidden_states), 1 + scale_msa)
        hidden_states = torch.addcmul(residual, gate_msa, self.attn(hidden_states, image_rotary_emb))

        residual = hidden_states
        hidden_states = torch.addcmul(shift_mlp, self.norm2(hidden_states), 1 + scale_mlp)
        hidden_states = torch.addcmul(residual, gate_mlp, self.ff(hidden_states))
        return hidden_states  # (B, L, D)


class TerDiTOutNorm(nn.Module):
    """LayerNorm without parameters, modulated by the condition; full precision."""

    def __init__(self, cond_dim: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(cond_dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(nn.functional.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(hidden_states) * (1 + scale) + shift


class TerDiTTransformer2DModel(TernaryModelMixin, TernaryAdapterMixin, CacheMixin, AttentionMixin):
    r"""Class-conditional diffusion transformer with ternary weights in attention, feed-forward and adaLN.

    Args:
        sample_size (`int`, defaults to 32): Side of the latents (pixels where there is no VAE). Any size whose sides
            divide by `patch_size` works in `forward`; this one is the pipeline's default.
        patch_size (`int`, defaults to 2): Side of the square of latents that makes one token.
        in_channels (`int`, defaults to 4): Channels of the latents.
        num_layers (`int`, defaults to 16): Number of blocks.
        num_attention_heads (`int`, defaults to 32): Heads per block.
        attention_head_dim (`int`, defaults to 48): Width of a head, even; the width of the model is heads times this.
        num_classes (`int`, defaults to 1000): Number of labels; row `num_classes` of the table is the null label.
        class_dropout_prob (`float`, defaults to 0.1): Record of how often the trainer passes the null label.
        learn_sigma (`bool`, defaults to `True`): Whether the output also holds `in_channels` channels of variance.
        qk_norm (`bool`, defaults to `True`): LayerNorm on queries and keys.
        num_key_value_heads (`int`, *optional*): Fewer key and value heads than query heads; `None` for as many.
        norm_eps (`float`, defaults to 1e-5): Epsilon of the RMSNorms.
        ffn_dim (`int`, *optional*): Width of the feed-forward; `None` for 8/3 of the width, rounded up to 256.
        weight_format (`str`, defaults to `"float"`): `"float"` to train, `"packed"` for two bits per weight.
        scale_granularity (`str` or `int`, defaults to `"tensor"`): What one scale of a ternary weight covers, see
            [`TernaryLinear`].
        ternary (`bool`, defaults to `True`): `False` is the same network in full precision.
        adaln_norm (`bool`, defaults to `True`): The paper's RMSNorm after the adaLN linear; `False` for its ablation.
        pos_embed_type (`str`, defaults to `"rope"`): `"rope"`: rotary positions over the flat token index, as
            released; `"rope+sincos2d"`: also a fixed 2-D sine-cosine embedding added to the tokens, better for small
            new models.
        activation_bits (`int`, *optional*): 8 for a model that is trained with 8-bit inputs of its ternary layers, see
            [`TernaryLinear`].
        prediction_type (`str`, *optional*): What it is trained to predict, in diffusers' words: `"epsilon"`,
            `"v_prediction"`, `"sample"`, `"flow_prediction"` or `"flow_sample"`. A pipeline refuses, or configures,
            schedulers by it; `None`: as the scheduler says that the pipeline is made with.
        initialization (`str`, defaults to `"small_gain"`): `"small_gain"`: variance-preserving scales, adaLN starting
            small (RMSNorm gain 0.1; zero weights where there is no norm). `"reference"`: the authors' (normal scales,
            zero adaLN weights, gain 1). Not stored.

    Source: TerDiT, Figure 2 (https://arxiv.org/abs/2405.14854); adaLN after DiT (https://arxiv.org/abs/2212.09748).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TerDiTBlock"]
    _repeated_blocks = ["TerDiTBlock"]
    _skip_layerwise_casting_patterns = ["proj_in", "time_embed", "class_embed", "norm", "weight_scale"]
    _adapter_layer_class = TernaryLinear
    ignore_for_config = ["initialization"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 16,
        num_attention_heads: int = 32,
        attention_head_dim: int = 48,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        qk_norm: bool = True,
        num_key_value_heads: int | None = None,
        norm_eps: float = 1e-5,
        ffn_dim: int | None = None,
        weight_format: str = "float",
        scale_granularity: str | int = "tensor",
        ternary: bool = True,
        adaln_norm: bool = True,
        pos_embed_type: str = "rope",
        activation_bits: int | None = None,
        prediction_type: str | None = None,
        initialization: str = "small_gain",
    ):
        super().__init__()
        check_config(type(self).__name__, dict(self.config), TerDiTTransformer2DModel)
        kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        dim = num_attention_heads * attention_head_dim
        if attention_head_dim % 2:
            raise ValueError(f"Rotary positions need an even `attention_head_dim`, got {attention_head_dim}.")
        if num_attention_heads % kv_heads:
            raise ValueError(f"{num_attention_heads=} must be a multiple of {num_key_value_heads=}.")
        if sample_size % patch_size:
            raise ValueError(f"{sample_size=} must be a multiple of {patch_size=}.")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must be a probability, 0 to 1, got {class_dropout_prob}.")
        if pos_embed_type not in ("rope", "rope+sincos2d"):
            raise ValueError(f'`pos_embed_type` must be "rope" or "rope+sincos2d", got {pos_embed_type!r}.')
        if prediction_type not in (None, "epsilon", "v_prediction", "sample", "flow_prediction", "flow_sample"):
            raise ValueError(
                "`prediction_type` must be None, epsilon, v_prediction, sample, flow_prediction or flow_sample, got"
                f" {prediction_type!r}."
            )
        if pos_embed_type == "rope+sincos2d" and dim % 4:
            raise ValueError(f"A 2-D sine-cosine embedding needs a width divisible by 4, got {dim}.")
        if not ternary and (weight_format != "float" or activation_bits is not None):
            raise ValueError(
                f"A model with ternary=False has no packed weights or integer activations, got {weight_format=},"
                f" {activation_bits=}."
            )
        cond_dim = min(dim, 1024)
        ffn_dim = -(-8 * dim // 3 // 256) * 256 if ffn_dim is None else ffn_dim
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
            if not ternary:
                return nn.Linear(in_features, out_features, bias=bias)
            return TernaryLinear(in_features, out_features, bias, weight_format, scale_granularity, activation_bits)

        self.proj_in = nn.Linear(patch_size * patch_size * in_channels, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, cond_dim)
        self.class_embed = nn.Embedding(num_classes + 1, cond_dim)
        self.transformer_blocks = nn.ModuleList(
            TerDiTBlock(
                dim,
                num_attention_heads,
                kv_heads,
                attention_head_dim,
                ffn_dim,
                cond_dim,
                qk_norm,
                adaln_norm,
                norm_eps,
                linear,
            )
            for _ in range(num_layers)
        )
        self.norm_out = TerDiTOutNorm(cond_dim, dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self._initialize(initialization)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "TerDiTTransformer2DModel":
        """Return a freshly initialized model of a published size, such as `"terdit-600m-256"` or `"terdit-4.2b-512"`.

        Args:
            name (`str`): Key of `SIZES`.
            overrides: Init arguments that replace the preset's, such as `weight_format="packed"` or `num_classes=10`.

        Raises:
            ValueError: No such preset.
        """
        if name not in SIZES:
            raise ValueError(f"No preset {name!r}; there are {', '.join(map(repr, SIZES))}.")
        return cls(**{**SIZES[name], **overrides})

    @torch.no_grad()
    def _initialize(self, initialization: str) -> None:
        if initialization not in ("small_gain", "reference"):
            raise ValueError(f'`initialization` must be "small_gain" or "reference", got {initialization!r}.')
        reference = initialization == "reference"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TernaryLinear) and reference and module.weight_format == "float":
                nn.init.normal_(module.weight_scale)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_2.weight, std=0.02)
        for adaln in (module for module in self.modules() if isinstance(module, TerDiTAdaLN)):
            if (reference or not self.config.adaln_norm) and hasattr(adaln.linear, "weight"):
                nn.init.zeros_(adaln.linear.weight)
            if isinstance(adaln.norm, TerDiTRMSNorm) and not reference:
                nn.init.constant_(adaln.norm.weight, 0.1)
        for layer in (self.norm_out.linear, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def enable_cache(self, config) -> None:
        """Turn on a step cache; see [`~models.CacheMixin.enable_cache`]. Which ones help: docs/few_steps.md.

        Raises:
            ValueError: FasterCache's skipping of the unconditional half, which cannot tell that half here.
        """
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
            raise ValueError(
                "FasterCache leaves out the first half of a guided batch, which holds the labels here, and does not"
                " see inputs that are passed by position. For its attention half alone: `is_guidance_distilled=True`."
            )
        super().enable_cache(config)

    @property
    def null_label(self) -> int:
        """Row of the label table that stands for "no label"."""
        return self.config.num_classes

    def ternary_layers(self) -> dict[str, TernaryLinear]:
        """Return the ternary layers by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryLinear)}

    def pack(self) -> "TerDiTTransformer2DModel":
        """Every ternary layer to two bits per weight, in place; the model computes the same before and after.

        Raises:
            ValueError: The model is full precision (`ternary=False`), or a layer cannot be packed; then none is.
        """
        for name, layer in self._layers_to_convert().items():
            try:
                layer.check_packable()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for layer in self.ternary_layers().values():
            layer.pack()
        self.register_to_config(weight_format="packed")
        return self

    def unpack(self) -> "TerDiTTransformer2DModel":
        """Every ternary layer to float format, in place, so that training can go on from the same codes."""
        for layer in self._layers_to_convert().values():
            layer.unpack()
        self.register_to_config(weight_format="float")
        return self

    @property
    def label_table(self) -> nn.Module:
        """The embedding of the labels, without what PEFT puts around it where an adapter trains rows."""
        return getattr(getattr(self.class_embed, "token_adapter", None), "base_layer", self.class_embed)

    @torch.no_grad()
    def add_classes(self, count: int = 1) -> "TerDiTTransformer2DModel":
        """Make room for new labels, in place, after the last one; all old labels keep their outputs.

        The null label is always row `num_classes`, so it moves up by `count`. The new rows start as copies of it: an
        untrained new label is drawn as no label at all.

        Args:
            count (`int`, defaults to 1): How many.

        Raises:
            ValueError: No positive number, or the label table has its own LoRA.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`count` must be a positive int, got {count!r}.")
        self._resize_classes(self.config.num_classes + count)
        return self

    def remove_classes(self, count: int = 1) -> "TerDiTTransformer2DModel":
        """Remove the last labels, in place: undo `add_classes`; all other labels keep their outputs.

        Args:
            count (`int`, defaults to 1): How many.

        Raises:
            ValueError: No label would be left, or the label table has its own LoRA.
        """
        null = self.config.num_classes
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < null:
            raise ValueError(f"`count` must be an int from 1 to {null - 1}, so that a class is left, got {count!r}.")
        self._resize_classes(null - count)
        return self

    def _resize_classes(self, num_classes: int) -> None:
        """Keep the first rows of the label table, fill up with copies of the null row, and end with the null row."""
        table, null = self.label_table, self.config.num_classes
        if type(table) is not nn.Embedding:
            raise ValueError(
                "The label table is in an adapter's `target_modules`, which fixes its size. Change the classes before"
                " adapters, or after `unload_lora()`."
            )
        kept = table.weight[: min(null, num_classes)]
        rows = torch.cat([kept, table.weight[null:].expand(num_classes + 1 - len(kept), -1)])
        table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(rows)
        self.register_to_config(num_classes=num_classes)

    def set_activation_bits(self, bits: int | str | None) -> None:
        """Round the inputs of the packed layers to integers, for speed: the caller's choice, never saved.

        With 8 bits, `down_proj` stays at 16: its gated inputs have outliers, which would cost three times the error.
        For 8 bits there, too: `block.ff.down_proj.set_activation_bits(8)`.

        Args:
            bits (`int`, `str` or `None`): 16, 8, `"fp8"`, `None` (exact) or `"auto"`, see
                [`TernaryLinear.set_activation_bits`].

        Raises:
            ValueError: Another value; the model is full precision; or it was trained with 8-bit inputs and `bits` are
                others.
            ImportError: 8 or 16 on a CPU without numba.
        """
        if not self.config.ternary:
            raise ValueError(
                f"This model is full precision (ternary=False); it has no ternary layers that {bits=} could speed up."
                " Leave the call out."
            )
        trained = self.config.activation_bits is not None
        for name, layer in self.ternary_layers().items():
            gated = "down_proj" in name and not trained  # with an adapter "down_proj.base_layer"
            layer.set_activation_bits(16 if gated and bits == 8 else bits)

    def set_decoded_budget(self, budget: int | str | None) -> int:
        """Hold as many packed layers decoded as fit into a budget, for speed on a GPU, or of a small model on a CPU.

        Nothing of it is saved. A layer that is held decoded costs what a dense layer does, eight times the memory in
        half precision. Layers that compute in integers are left as they are.

        Args:
            budget (`int`, `str` or `None`): Bytes, or a string such as `"4GB"`. `None` or 0 takes it back.

        Returns:
            `int`: How many layers are held decoded.

        Raises:
            ValueError: Another value; the model is full precision, not packed, or its weights are elsewhere; it is
                float32 on a GPU, where packed layers are the faster ones; or all of its layers compute in integers.
        """
        most = size_in_bytes(budget)
        layers = self._layers_to_convert()
        for layer in layers.values():
            layer.hold_decoded(None)
        if most == 0:
            return 0
        dtype, device = self.dtype, self.device
        if self.config.weight_format != "packed":
            raise ValueError(f"A budget of {budget!r} for decoded layers needs a packed model. Call `pack()` first.")
        if device.type == "meta":
            raise ValueError(
                f"A budget of {budget!r} for decoded layers needs the weights, and they are on the meta device, as"
                " those of an offloaded model. Leave one of the two out."
            )
        if dtype == torch.float32 and device.type == "cuda":
            raise ValueError(
                "Decoded layers in float32 would be slower on a GPU than packed ones. Cast the model to bfloat16, or"
                f" leave the budget of {budget!r} out."
            )
        exact = [layer for layer in layers.values() if layer.computes_exactly(dtype)]
        if not exact:
            raise ValueError(
                f"All layers compute in integers on {device.type} in {dtype}, so a budget of {budget!r} would hold"
                " none decoded. Call `set_activation_bits(None)` first."
            )
        ahead = {id(block.adaln.linear) for block in self.transformer_blocks}  # type: ignore[union-attr]
        held = 0
        for layer in sorted(exact, key=lambda layer: id(layer) in ahead):
            size = layer.out_features * layer.in_features * dtype.itemsize
            if size <= most:
                layer.hold_decoded(dtype)
                most, held = most - size, held + 1
        return held

    @contextmanager
    def cuda_graphs(self) -> Iterator[None]:
        """Inside the `with` block, replay each forward pass as one CUDA graph, so that the host does not slow it down.

        There is a graph for each set of shapes and dtypes. Call `compile_repeated_blocks(fullgraph=True)` before,
        and one block's compile time is all it takes. Passes with gradients run without a graph.

        The graphs read the weights where they are: do not change, move or pack the model, or its adapters and
        activation bits, inside the block.

        Raises:
            ValueError: The model is not on a CUDA device, or has what a graph would leave out: offloading, a step
                cache, or another block of this kind.
        """
        if self.device.type != "cuda":
            raise ValueError(f'CUDA graphs need a model on a GPU; this one is on {self.device}. Call `.to("cuda")`.')
        replaced = getattr(self.forward, "__func__", None) is not type(self).forward
        if replaced or is_offloaded(self) or self.is_cache_enabled:
            raise ValueError(
                "CUDA graphs would leave out what this model runs in Python: offloading, a step cache, or another"
                " block of `cuda_graphs()`. Use one of them alone."
            )
        forward, names = self.forward, inspect.signature(self.forward)
        replayed = graphed(partial(forward, return_dict=False), self.device)

        def call(*args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[Tensor]:
            if torch.is_grad_enabled():
                return forward(*args, **kwargs)
            arguments = names.bind(*args, **kwargs).arguments
            return_dict = arguments.pop("return_dict", True)
            outputs = replayed(**arguments)
            return Transformer2DModelOutput(sample=outputs[0]) if return_dict else outputs

        self.forward = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.forward

    def _layers_to_convert(self) -> dict[str, TernaryLinear]:
        if not self.config.ternary:
            raise ValueError(
                "This model is full precision (ternary=False); it has no ternary weights to pack. Save it as it is."
            )
        return self.ternary_layers()

    def dequantize(self) -> "TerDiTTransformer2DModel":
        """A new full-precision model (`ternary=False`) with the dense weights `scale * T`; this one stays as it is."""
        if self.config.activation_bits is not None:
            raise ValueError(
                f"This model computes with {self.config.activation_bits}-bit activations, which a dense model does not"
                " do. Use it as it is."
            )
        refuse_adapters(self, "dequantizing it")
        with torch.device("meta"):  # draws no initial weights: for 4.2B that would take a minute
            dense = type(self).from_config(self.config, weight_format="float", ternary=False)
        dense = dense.to_empty(device=self.device)
        state_dict = {k: v for k, v in self.state_dict().items() if not k.rsplit(".", 1)[-1].startswith("weight_")}
        state_dict |= {f"{name}.weight": layer.dequantize() for name, layer in self.ternary_layers().items()}
        dense.load_state_dict(state_dict)
        return dense.to(self.dtype).train(self.training)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
        modulation: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (and variance) of noisy latents.

        Args:
            hidden_states (`torch.Tensor`): (B, C, h, w), in the model's dtype; h and w multiples of `patch_size`.
            timestep (`torch.Tensor`): (B,) or a scalar, int or float, 0 to 1000.
            class_labels (`torch.Tensor`): (B,), int, 0 to `num_classes`; `num_classes` is the null label.
            return_dict (`bool`): Whether to return an output object instead of a tuple.
            modulation (`torch.Tensor`, *optional*): (num_layers, B, 6 * D), `modulations` of `timestep` and
                `class_labels`, where it was computed ahead.

        Returns:
            [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] or `tuple`: `sample` (B, out_channels, h,
            w), in the dtype of `hidden_states`: the noise, then, with `learn_sigma`, the variance.

        Raises:
            ValueError: `hidden_states` is not of this model's shape, or the others are not of its batch size.
        """
        config = self.config
        patch = config.patch_size
        batch, channels, height, width = self._check_shape(hidden_states)
        self._check_condition(timestep, class_labels, batch)
        rows, columns = height // patch, width // patch

        # 1. Input: patches, positions, condition
        hidden_states = hidden_states.reshape(batch, channels, rows, patch, columns, patch)
        hidden_states = hidden_states.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, L, C*p*p)
        hidden_states = self.proj_in(hidden_states)  # (B, L, D)
        if config.pos_embed_type == "rope+sincos2d":
            hidden_states = hidden_states + sincos_2d(rows, columns, hidden_states.shape[-1], hidden_states)
        image_rotary_emb = get_1d_rotary_pos_embed(
            config.attention_head_dim, torch.arange(rows * columns, device=hidden_states.device), use_real=True
        )  # cos, sin: (L, D/H) float32

        temb = self._condition(timestep.reshape(-1).expand(batch), class_labels, hidden_states.dtype)  # (B, E)

        # 2. Blocks
        for index, block in enumerate(self.transformer_blocks):
            inputs = hidden_states, temb, image_rotary_emb, None if modulation is None else modulation[index]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)

        # 3. Output: tokens back to latents
        hidden_states = self.proj_out(self.norm_out(hidden_states, temb))  # (B, L, p*p*C')
        hidden_states = hidden_states.reshape(batch, rows, columns, patch, patch, self.out_channels)
        output = hidden_states.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)

        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)

    def _condition(self, timestep: Tensor, class_labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,), (B,) -> (B, E)."""
        return self.time_embed(self.time_proj(timestep).to(dtype)) + self.class_embed(class_labels)

    def modulations(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Compute the adaLN vectors of all blocks, which depend on nothing else.

        Args:
            timestep (`torch.Tensor`): (B,), int or float.
            class_labels (`torch.Tensor`): (B,), int.

        Returns:
            `torch.Tensor`: (num_layers, B, 6 * D), in the model's dtype; the `modulation` of `forward`.
        """
        temb = self._condition(timestep, class_labels, self.dtype)
        return torch.stack([block.adaln(temb) for block in self.transformer_blocks])  # type: ignore[operator]

    def adaln_ahead(self, timesteps: Tensor, class_labels: Iterable[int]) -> "AdaLNAhead":
        """Prepare adaLN vectors for the steps of a sampler, see [`AdaLNAhead`]."""
        return AdaLNAhead(self, timesteps, class_labels)

    def _check_shape(self, hidden_states: Tensor) -> tuple[int, int, int, int]:
        channels, patch = self.config.in_channels, self.config.patch_size
        is_float = isinstance(hidden_states, Tensor) and hidden_states.is_floating_point()
        shape = tuple(hidden_states.shape) if is_float else ()
        if len(shape) != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch or not all(shape):
            given = shape if is_float else reference.describe(hidden_states)
            raise ValueError(
                f"`hidden_states` must be (batch, {channels}, height, width) with sides that divide by {patch}, in the"
                f" model's dtype, got {given}."
            )
        return shape

    @staticmethod
    def _check_condition(timestep: Tensor, class_labels: Tensor, batch: int) -> None:
        # Not whether a label is in range: that would wait for a GPU at every step. The pipeline looks at labels.
        if not isinstance(timestep, Tensor) or timestep.numel() not in (1, batch):
            raise ValueError(
                f"`timestep` must be a tensor of shape ({batch},) or a scalar, got {reference.describe(timestep)}."
            )
        whole = isinstance(class_labels, Tensor) and class_labels.dtype in (torch.int64, torch.int32)
        if not whole or class_labels.dim() > 1 or class_labels.numel() not in (1, batch):
            raise ValueError(
                f"`class_labels` must be an int64 or int32 tensor of shape ({batch},), got"
                f" {reference.describe(class_labels)}."
            )


class AdaLNAhead:
    """adaLN vectors of every block, computed for many sampling steps at once, and for each label once.

    A step then costs no decoding of the adaLN weights, which are a fifth of the model. Where matmuls of more rows sum
    in another order, the vectors differ from those of `forward` in their last bits.

    Args:
        transformer ([`TerDiTTransformer2DModel`]): Must not change while this is in use.
        timesteps (`torch.Tensor`): (S,), of the steps in their order, on the model's device.
        class_labels (`Iterable[int]`): All labels that steps will ask for.
        max_bytes (`int`, defaults to 32 MiB): Memory for the vectors of the steps that are computed at once.
    """

    def __init__(
        self,
        transformer: TerDiTTransformer2DModel,
        timesteps: Tensor,
        class_labels: Iterable[int],
        max_bytes: int = 32 * 2**20,
    ):
        config = transformer.config
        self.transformer, self.timesteps = transformer, timesteps
        self.labels = torch.tensor(sorted(set(class_labels)), device=timesteps.device)  # (U,)
        width = config.num_attention_heads * config.attention_head_dim
        step_bytes = config.num_layers * len(self.labels) * 6 * width * transformer.dtype.itemsize
        self.steps_at_once = max(1, max_bytes // step_bytes)
        self.first: int | None = None
        self.vectors: Any = None

    def __call__(self, step: int, class_labels: Tensor) -> Tensor:
        """Return the `modulation` of `forward` at a step: (num_layers, B, 6 * D) for class_labels (B,)."""
        first = step - step % self.steps_at_once
        if first != self.first:
            self.vectors = None  # the last steps' memory before the next ones'
            timesteps = self.timesteps[first : first + self.steps_at_once]  # (S',)
            rows = timesteps.repeat_interleave(len(self.labels)), self.labels.repeat(len(timesteps))
            vectors = self.transformer.modulations(*rows)  # (num_layers, S' * U, 6 * D)
            self.vectors, self.first = vectors.unflatten(1, (len(timesteps), len(self.labels))), first
        return self.vectors[:, step - first, torch.searchsorted(self.labels, class_labels)]


def sincos_2d(rows: int, columns: int, dim: int, like: Tensor) -> Tensor:
    """Fixed 2-D sine-cosine embedding, (rows * columns, dim): half the width for the column index, half for the row.

    Computed in float32, returned on the device and in the dtype of `like`.
    Source: "Attention Is All You Need" section 3.5, per axis as in MAE (https://arxiv.org/abs/2111.06377).
    """
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float32, device=like.device) / (dim // 4))  # (D/4,)
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=like.device),
        torch.arange(columns, dtype=torch.float32, device=like.device),
        indexing="ij",
    )
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]  # 2 x (L, D/4)
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).to(like.dtype)
