"""Every scheduler of diffusers on the two bundled checkpoints: which draw pictures, and how good ones.

    OMP_NUM_THREADS=1 python examples/experiments/schedulers.py --output docs/schedulers.md   # minutes on one CPU core

The page is written from the figures of this run.
"""

import argparse
import inspect
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from common import root_mean_square, write_page
from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.evaluation.digits import digits_classifier
from diffusers_terdit.evaluation.measured import machine, now, sentence


STEPS = (25, 10)
NUM_IMAGES = 100
FACES = [3, 17, 29, 40, 56, 68, 77, 91, 104, 125]

FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}

# Schedulers that draw pictures with a model that predicts noise (`digits`), without a change of settings, and a note.
NOISE = {
    "DDPMScheduler": "the one used in training; the only kind that uses the predicted variance",
    "DDPMParallelScheduler": "the same",
    "DDIMScheduler": "",
    "DDIMParallelScheduler": "",
    "CogVideoXDDIMScheduler": "DDIM",
    "DEISMultistepScheduler": "",
    "DPMSolverMultistepScheduler": "DPM-Solver++: see [few steps](few_steps.md)",
    "DPMSolverSinglestepScheduler": "",
    "EulerDiscreteScheduler": "",
    "EulerAncestralDiscreteScheduler": "adds noise",
    "HeunDiscreteScheduler": "two evaluations per step",
    "KDPM2DiscreteScheduler": "two evaluations per step",
    "KDPM2AncestralDiscreteScheduler": "two evaluations per step; adds noise",
    "LCMScheduler": "adds noise; for distilled models",
    "LMSDiscreteScheduler": "",
    "PNDMScheduler": "a few more evaluations than steps",
    "SASolverScheduler": "adds noise",
    "TCDScheduler": "adds noise; for distilled models",
    "UniPCMultistepScheduler": "",
}

# Schedulers that do with a model that predicts a velocity (`emoji`), and what has to be set.
FLOW: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMapEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "LTXEulerAncestralRFScheduler": {},
    "DEISMultistepScheduler": FLOW_SIGMAS,
    "DPMSolverMultistepScheduler": FLOW_SIGMAS,
    "DPMSolverSinglestepScheduler": FLOW_SIGMAS,
    "SASolverScheduler": FLOW_SIGMAS,
    "UniPCMultistepScheduler": FLOW_SIGMAS,
}

# All others in diffusers 0.42.1, and why they cannot sample these models.
OTHERS = {
    "CMStochasticIterativeScheduler": "refused; for consistency models",
    "EDMEulerScheduler": "refused; for models with EDM's scaling of inputs and outputs",
    "EDMDPMSolverMultistepScheduler": "refused; the same",
    "CosineDPMSolverMultistepScheduler": "for models with EDM's scaling; needs `torchsde`",
    "IPNDMScheduler": "refused; its own noise schedule",
    "MiniMaxH3Scheduler": "refused; the velocity has the other sign, and timesteps are between 0 and 1",
    "SCMScheduler": "for distilled models of 1 or 2 steps",
    "PiflowScheduler": "for models that predict a policy in many channels",
    "HeliosScheduler": "its steps come in stages, which its own pipeline sets",
    "HeliosDMDScheduler": "the same",
    "DPMSolverSDEScheduler": "needs `torchsde`, which was not installed: not tried",
    "DPMSolverMultistepInverseScheduler": "goes from the picture to the noise",
    "DDIMInverseScheduler": "the same",
    "RePaintScheduler": "for inpainting: its step takes a mask",
    "CogVideoXDPMScheduler": "its step takes the last step's prediction, which its own pipeline passes",
    "KarrasVeScheduler": "its step takes a second sample; variance-exploding models",
    "ScoreSdeVeScheduler": "variance-exploding models; has no `step`",
    "DDPMWuerstchenScheduler": "continuous timesteps of another model",
    "UnCLIPScheduler": "cosine noise schedule only",
    "AmusedScheduler": "tokens, not pixels or latents",
    "BlockRefinementScheduler": "tokens, not pixels or latents",
    "DiscreteDDIMScheduler": "tokens, not pixels or latents",
    "EntropyBoundScheduler": "tokens, not pixels or latents",
    "VQDiffusionScheduler": "tokens, not pixels or latents",
    "RFD4ProteinaScheduler": "coordinates of proteins",
}


def scheduler_names() -> list[str]:
    """The scheduler classes of the installed diffusers."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    return sorted(name for name in names if inspect.isclass(getattr(diffusers, name, None)))


def pipeline(model: str) -> TerDiTPipeline:
    pipe = TerDiTPipeline.from_pretrained(bundled(model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: TerDiTPipeline, name: str, changes: dict[str, Any], labels: list[int], steps: int) -> Tensor:
    """(N, C, h, w) in [0, 1]: image i starts from its own noise, whatever the scheduler."""
    trained = pipe.scheduler
    pipe.scheduler = getattr(diffusers, name).from_config(trained.config, **changes)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    options = {"num_inference_steps": steps, "guidance_scale": 1.5, "output_type": "pt"}
    try:
        return pipe(labels, generator=generators, **options).images
    finally:
        pipe.scheduler = trained


def recognised(images: Tensor, labels: list[int]) -> float:
    """Share that the package's digits classifier reads as their label."""
    return (digits_classifier()(images)["logits"].argmax(1) == torch.tensor(labels)).float().mean().item()


def nearest_is_own(images: Tensor, reference: Tensor) -> float:
    """Share of images whose nearest reference image is the one of the same label; both (N, C, h, w)."""
    distances = torch.cdist(images.flatten(1), reference.flatten(1))
    return (distances.argmin(1) == torch.arange(len(images))).float().mean().item()


def noise_lines(count: int) -> list[str]:
    pipe, labels = pipeline("digits"), [i % 10 for i in range(count)]
    lines = []
    for name, note in NOISE.items():
        shares = [f"{100 * recognised(draw(pipe, name, {}, labels, steps), labels):.0f}" for steps in STEPS]
        lines.append(f"| `{name}` | {' | '.join(shares)} | {note} |")
    return lines


def flow_lines(labels: list[int]) -> list[str]:
    pipe, lines = pipeline("emoji"), []
    solution = draw(pipe, "FlowMatchEulerDiscreteScheduler", {}, labels, 100)
    for name, changes in FLOW.items():
        cells = []
        for steps in STEPS:
            images = draw(pipe, name, changes, labels, steps)
            own = 100 * nearest_is_own(images, solution)
            cells.append(f"{own:.0f} ({statistics.median(root_mean_square(images, solution)):.1f})")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {'flow sigmas, below' if changes else ''} |")
    return lines


def made() -> str:
    """When and where the page was made, its last line."""
    return f"{sentence(now())} Made on {machine()}."


def page(count: int = NUM_IMAGES, faces: list[int] = FACES) -> str:
    return write_page(
        "schedulers",
        version=re.match(r"[\d.]+\d", diffusers.__version__).group(),
        count=count,
        faces=len(faces),
        steps=STEPS,
        noise=noise_lines(count),
        flow=flow_lines(faces),
        others=OTHERS,
        made=made(),
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the page here instead of printing it")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # numpy's, about diffusers' schedulers
    text = page()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
