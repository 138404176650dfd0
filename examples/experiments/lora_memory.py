"""Peak memory of LoRA training with packed and other frozen weights: two steps of one image, each in a new process.

OMP_NUM_THREADS=1 python examples/experiments/lora_memory.py --preset terdit-600m-256
"""

import argparse
import resource
import subprocess
import sys

import torch
from peft import LoraConfig

from common import table
from diffusers_terdit import TerDiTTransformer2DModel, losses
from diffusers_terdit.models.transformer_terdit import SIZES


IMPORTS = "none: the imports alone"
WEIGHTS = [IMPORTS, "packed bfloat16", "packed float32", "dense bfloat16", "dense float32", "float float32"]


def train(weights: str, preset: str) -> None:
    """Train an adapter of rank 8 in all ternary layers; a fresh packed layer is as large as a trained one."""
    kind, dtype = weights.split()
    torch.set_default_dtype(getattr(torch, dtype))
    options = {"ternary": False} if kind == "dense" else {"weight_format": kind}
    transformer = TerDiTTransformer2DModel.from_preset(preset, **options)
    torch.set_default_dtype(torch.float32)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj", "adaln.linear"]
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    transformer.train().enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([weight for weight in transformer.parameters() if weight.requires_grad])
    side = transformer.config.sample_size
    for _ in range(2):
        latents = torch.randn(1, 4, side, side, dtype=transformer.dtype)
        output = transformer(latents, torch.tensor([500]), torch.tensor([1])).sample.float()
        losses.mean_squared_error(output[:, :4], latents).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SIZES, default="terdit-600m-256")
    parser.add_argument("--weights", choices=WEIGHTS, help="measure these alone, in this process")
    args = parser.parse_args(argv)
    if args.weights:
        if args.weights != IMPORTS:
            train(args.weights, args.preset)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    rows = []
    for weights in WEIGHTS:
        command = [sys.executable, __file__, "--preset", args.preset, "--weights", weights]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append([weights, f"{float(printed.split()[-1]):.2f}"])
    print(table(["frozen weights", "peak, GB"], rows))


if __name__ == "__main__":
    main()
