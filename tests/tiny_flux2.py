"""A Flux2KleinPipeline of a hundred thousand weights with a text encoder and a tokenizer; nothing is downloaded."""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM


CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def tiny_tokenizer():
    """Byte-level tokens and no merges."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = Qwen2TokenizerFast(f"{folder}/vocab.json", f"{folder}/merges.txt", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_flux2_pipeline():
    """Pictures of 32 pixels; the prompt's embedding joins three hidden states of 32."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(8, 8, 8, 8), timestep_guidance_channels=32, guidance_embeds=False,
    ).eval()  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=32,
    ).eval()  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )
