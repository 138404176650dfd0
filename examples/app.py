"""A page to sample a model by hand, and to watch it denoise.

    pip install gradio
    python examples/app.py --model emoji         # a bundled name, a pipeline folder or a Hub id

It runs on this machine, loads nothing from the network (but a Hub model) and reports to nobody. A page for others
(`--server_name 0.0.0.0`) takes no uploads, lets 20 requests wait, and limits what each may ask for. See docs/app.md.
"""

import argparse
import base64
import html
import io
import math
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C is one line from here on, also in the seconds that the imports take.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"app: interrupted\n") and os._exit(130))

try:
    import gradio as gr
except ImportError:
    sys.exit("The app needs Gradio: pip install gradio")

import torch
from PIL import Image

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.arguments import ACTIVATION_BITS, DTYPES, Parser, activation_bits, at_least, dtype, not_negative
from diffusers_terdit.cli import load_pipeline, run_program, usable_device
from diffusers_terdit.hub.model_card import human_bytes
from diffusers_terdit.pipelines.schedulers import scheduler_by_name


# By what the model predicts; the list on the page begins with the pipeline's own scheduler.
NOISE_SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
MAX_SEED = 2**31 - 1
PREVIEW_SHARE = 0.1  # of the time at most goes into previews: a VAE may take as long as a step
MIN_SIDE = 64  # pixels; smaller images are shown with sharp pixels
MAX_WAITING = 20  # requests
MAX_SHARED = 1000  # images x steps of a request, where others wait for it
FIRST = "joy"  # the class that the page starts with, where the model has it
NUM_EXAMPLES = 10  # classes to click on
LOCAL = ("127.0.0.1", "localhost", "::1")

CSS = """
.gradio-container { max-width: 1080px !important; margin: auto;
    --block-info-text-color: var(--body-text-color); --body-text-color-subdued: var(--body-text-color); }
#new-seed { align-self: center; }
#facts p { margin: 0; }
.terdit-images { display: grid; gap: 12px; }
.terdit-images figure { margin: 0; }
.terdit-images img { width: 100%; display: block; border-radius: 6px; border: 1px solid var(--border-color-primary); }
.terdit-images img.sharp { image-rendering: pixelated; }
.terdit-images figcaption, .terdit-status { font-size: 13px; }
.terdit-images figcaption { padding-top: 3px; }
.terdit-bar { height: 4px; margin: 14px 0 6px; border-radius: 2px; background: var(--border-color-primary); }
.terdit-bar div { height: 100%; border-radius: 2px; background: var(--color-accent); }
.terdit-status { margin: 0; font-variant-numeric: tabular-nums; }
.terdit-empty { display: grid; place-items: center; min-height: 320px; border-radius: 6px;
    border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
"""

# What is typed replaces the class that is there. Gradio and the click place the cursor first.
SELECT = "() => { setTimeout(() => document.querySelector('#class input').select(), 50); }"


@dataclass
class Settings:
    """Request of a visitor: image i of `num_images` has seed `seed + i`."""

    label: int
    seed: int
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str


@dataclass
class Update:
    """The images after `step` of `steps` model calls' worth of denoising; `final` after the last one, or a stop."""

    images: list[Image.Image]
    step: int
    steps: int
    seconds: float
    final: bool = False


class Sampler:
    """A pipeline that many visitors share: one samples at a time, with their own scheduler and settings."""

    def __init__(self, pipe: TerDiTPipeline):
        self.pipe = pipe
        flow = str(pipe.prediction_type).startswith("flow")
        own, names = type(pipe.scheduler).__name__, FLOW_SCHEDULERS if flow else NOISE_SCHEDULERS
        self.schedulers = list(dict.fromkeys([own, *names]))
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def stop(self, visitor: str | None) -> None:
        """End the sampling of a visitor after the step that is running."""
        if (event := self._stops.get(visitor or "")) is not None:
            event.set()

    def sample(self, settings: Settings, visitor: str | None = None) -> Iterator[Update]:
        """Yield updates from a thread that ends when the caller stops listening."""
        updates: queue.Queue[Update | Exception] = queue.Queue()
        stop = self._stops[visitor or ""] = threading.Event()

        def work() -> None:
            try:
                with self._lock:
                    updates.put(self._sample(settings, updates, stop))
            except Exception as error:
                updates.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                update = updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.final:
                    return
        finally:
            stop.set()
            thread.join()
            if self._stops.get(visitor or "") is stop:
                del self._stops[visitor or ""]

    def _sample(self, settings: Settings, updates: queue.Queue, stop: threading.Event) -> Update:
        scheduler = scheduler_by_name(settings.scheduler, self.pipe.scheduler, self.pipe.prediction_type)
        shared = self.pipe
        pipe = TerDiTPipeline(
            shared.transformer, scheduler, shared.vae, shared.config.id2label, shared.config.guidance_channels
        )
        pipe.set_progress_bar_config(disable=True)
        start = last = time.perf_counter()
        cost, steps_done = 0.0, 0

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal last, cost, steps_done
            steps_done = step + 1
            if stop.is_set():
                pipe._interrupt = True
            elif (begin := time.perf_counter()) - last >= max(0.05, cost / PREVIEW_SHARE):
                images = self._preview(scheduler, tensors["latents"], timestep)
                updates.put(Update(images, step + 1, pipe.num_timesteps, begin - start))
                last = time.perf_counter()
                cost = last - begin
            return tensors

        images = pipe(
            [settings.label],
            num_images_per_prompt=settings.num_images,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(settings.num_images)],
            callback_on_step_end=on_step_end,
        ).images
        return Update(images, steps_done, pipe.num_timesteps, time.perf_counter() - start, final=True)

    @torch.no_grad()
    def _preview(self, scheduler: Any, latents: torch.Tensor, timestep: Any) -> list[Image.Image]:
        """(B, C, h, w) noisy latents as images, brought to an image's variance where the scheduler's have more."""
        if hasattr(scheduler, "scale_model_input"):
            latents = scheduler.scale_model_input(latents, timestep)
        vae = self.pipe.vae
        if vae is not None:
            latents = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()
        return self.pipe.image_processor.postprocess(latents, output_type="pil")


def data_url(image: Image.Image) -> str:
    """Encode a picture without loss: the page shows the pipeline's own bits."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def show(update: Update, settings: Settings, name: str) -> str:
    """HTML of an update: the images, how far it is, how long it took."""
    columns = min(4, math.ceil(math.sqrt(len(update.images))))
    figures = []
    for i, image in enumerate(update.images):
        seed = settings.seed + i
        sharp = " class='sharp'" if min(image.size) < MIN_SIDE else ""
        alt = html.escape(f"{name}, seed {seed}", quote=True)
        figures.append(
            f"<figure><img{sharp} src='{data_url(image)}' alt='{alt}'><figcaption>seed {seed}</figcaption></figure>"
        )
    done = update.step == update.steps
    state = "done" if done else "stopped" if update.final else "running"
    words = f"step {update.step} of {update.steps}" if not done else f"{update.steps} steps"
    status = (
        f"{html.escape(name)}: {words}, {update.seconds:.1f} s"
        f" ({1000 * update.seconds / max(update.step, 1):.0f} ms per step)"
        + (", stopped: the noise that is left was not removed" if state == "stopped" else "")
    )
    return (
        f"<div class='terdit-images' style='grid-template-columns: repeat({columns}, 1fr)'>{''.join(figures)}</div>"
        f"<div class='terdit-bar'><div style='width: {100 * update.step / update.steps:.0f}%'></div></div>"
        f"<p class='terdit-status' data-state='{state}'>{status}</p>"
    )


def facts(pipe: TerDiTPipeline, name: str) -> str:
    """Describe the model's size in one line."""
    transformer, config = pipe.transformer, pipe.transformer.config
    layers = transformer.ternary_layers().values()
    ternary = sum(layer.in_features * layer.out_features for layer in layers)
    codes = sum(layer.weight_packed.nbytes for layer in layers if layer.weight_format == "packed")
    zeros = sum(int((layer.ternary_weight(torch.int8) == 0).sum()) for layer in layers)
    total = sum(parameter.nbytes for parameter in transformer.parameters())
    width = config.num_attention_heads * config.attention_head_dim
    return (
        f"{name}: {config.num_layers} layers of width {width}, {config.num_classes} classes. "
        + (f"{ternary:,} ternary weights" if ternary else "full precision")
        + (f" in {human_bytes(codes)}" if codes else "")
        + (f", {zeros / ternary:.0%} of them zero" if ternary else "")
        + f", {human_bytes(total)} of weights in memory ({str(transformer.dtype).removeprefix('torch.')}"
        + (" for those that are not ternary)." if ternary else ").")
    )


def names_of(pipe: TerDiTPipeline) -> dict[int, str]:
    """The first name of every class."""
    id2label = pipe.config.id2label or {}
    return {i: id2label.get(str(i), f"class {i}").split(",")[0] for i in range(pipe.transformer.config.num_classes)}


def pictures(
    sampler: Sampler,
    names: dict[int, str],
    label: int | None,
    seed: float | None,
    num_images: float,
    steps: float,
    guidance: float,
    scheduler: str,
    visitor: str | None = None,
    most: float = math.inf,
) -> Iterator[str]:
    """Yield the HTML for the values of the page's fields; raise what the page shows as an error."""
    if num_images * steps > most:
        raise gr.Error(
            f"This page is for several visitors: images x steps may be {most}, got {num_images} x {steps}.",
            print_exception=False,
        )
    if label is None:
        raise gr.Error("Choose a class: none is chosen.", print_exception=False)
    if seed is None or seed != int(seed) or not 0 <= seed <= MAX_SEED:
        raise gr.Error(f"The seed must be a whole number from 0 to {MAX_SEED}, got {seed}.", print_exception=False)
    settings = Settings(label, int(seed), int(num_images), int(steps), guidance, scheduler)
    try:
        for update in sampler.sample(settings, visitor):
            yield show(update, settings, names[label])
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def build(
    pipe: TerDiTPipeline,
    name: str,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    most: float = math.inf,
) -> gr.Blocks:
    """Build the page.

    Args:
        pipe ([`TerDiTPipeline`]): Shared by all visitors.
        name (`str`): Model name in the title.
        num_inference_steps (`int`), guidance_scale (`float`): Initial values; default what the model recommends.
        most (`float`): Images x steps of a request.
    """
    sampler, defaults = Sampler(pipe), pipe.sampling_defaults
    num_inference_steps = num_inference_steps or defaults["num_inference_steps"]
    guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    id2label = pipe.config.id2label or {}
    classes = [(id2label.get(str(i), f"class {i}"), i) for i in range(pipe.transformer.config.num_classes)]
    classes.sort(key=lambda item: item[0].casefold() if id2label else "")
    names = names_of(pipe)

    def generate(
        label: int, seed: float, num_images: float, steps: float, guidance: float, scheduler: str, request: gr.Request
    ) -> Iterator[str]:
        yield from pictures(
            sampler, names, label, seed, num_images, steps, guidance, scheduler, request.session_hash, most
        )

    def stop(request: gr.Request) -> None:
        sampler.stop(request.session_hash)

    with gr.Blocks(title=f"TerDiT: {name}", analytics_enabled=False) as page:
        gr.Markdown("# Ternary diffusion")
        gr.Markdown(facts(pipe, name), elem_id="facts")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                label = gr.Dropdown(
                    classes,
                    value=pipe.labels.get(FIRST, classes[0][1]),
                    label="Class",
                    info="Type to search.",
                    elem_id="class",
                )
                with gr.Row():
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", scale=2
                    )
                    new_seed = gr.Button("New seed", elem_id="new-seed", min_width=90, scale=1)
                num_images = gr.Slider(1, 16, 4, step=1, label="Images", info="The next image has the next seed.")
                steps = gr.Slider(1, 250, num_inference_steps, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(
                    1,
                    10,
                    guidance_scale,
                    step=0.1,
                    label="Guidance",
                    info="1 is off; more is truer to the class.",
                )
                scheduler = gr.Dropdown(sampler.schedulers, value=sampler.schedulers[0], label="Scheduler")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                    halt = gr.Button("Stop", elem_id="stop", min_width=90)
                some = range(0, len(classes), max(1, len(classes) // NUM_EXAMPLES))[:NUM_EXAMPLES]
                gr.Examples(
                    [[classes[i][1]] for i in some],
                    label,
                    label="Or try one of these classes",
                    example_labels=[names[classes[i][1]] for i in some],
                    api_visibility="private",
                )
            with gr.Column(scale=3, min_width=320):
                picture = gr.HTML(
                    "<div class='terdit-empty'>Choose a class and press Generate.</div>", elem_id="picture"
                )
        new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=seed, queue=False, api_visibility="private")
        start.click(
            generate,
            [label, seed, num_images, steps, guidance, scheduler],
            picture,
            concurrency_limit=1,
            show_progress="hidden",
            api_name="generate",
        )
        halt.click(stop, queue=False, show_progress="hidden", api_visibility="private")
        label.focus(js=SELECT, queue=False, api_visibility="private")
        page.unload(stop)  # a closed tab
    return page.queue(max_size=MAX_WAITING)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Open a page to sample a model by hand.")
    parser.add_argument("--model", default="emoji", help="The model: a bundled name, a pipeline folder or a Hub id.")
    parser.add_argument(
        "--dtype",
        type=dtype,
        choices=DTYPES,
        default="float32",
        help="Data type of the computation; fp32, bf16 and fp16 work, too.",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="Device as torch names it: cpu, cuda, cuda:1, xpu, mps. auto picks the best one available.",
    )
    parser.add_argument(
        "--activation_bits",
        type=activation_bits,
        choices=ACTIVATION_BITS,
        help="Round inputs of ternary layers, for speed: to integers, or to fp8 on a GPU that has it. Without"
        " it, only bfloat16 on a CPU may do so.",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=at_least(1, 250),
        help="Steps that the page starts with. Without it, what the model recommends.",
    )
    parser.add_argument(
        "--guidance_scale",
        type=not_negative,
        help="Guidance that the page starts with. Without it, what the model recommends.",
    )
    parser.add_argument(
        "--server_name",
        default="127.0.0.1",
        help="Address to listen on. 0.0.0.0 is the local network; images x steps of a request are then at most"
        f" {MAX_SHARED}.",
    )
    parser.add_argument(
        "--server_port", type=at_least(1, 65535), help="Port. Without it, the first free one from 7860."
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = usable_device(args.device)
    pipe = load_pipeline(args.model, args.dtype).to(device)
    if args.activation_bits:
        pipe.transformer.set_activation_bits(args.activation_bits)
    most = math.inf if args.server_name in LOCAL else MAX_SHARED
    page = build(pipe, args.model, args.num_inference_steps, args.guidance_scale, most)
    _, url, _ = page.launch(
        server_name=args.server_name,
        server_port=args.server_port,
        share=False,
        max_file_size=1,  # Gradio takes uploads on every page
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        prevent_thread_lock=True,
        quiet=True,  # it would advertise a public link
    )
    print(f"{args.model} is at {url} until you press Ctrl-C.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(run_program(Path(__file__).stem, main))
