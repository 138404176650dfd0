"""Threads: a model under many pipelines gives the bits that it gives alone; a pipeline serves one call at a time."""

import copy
import importlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.ops import has_integer_kernel


IN_USE = "This pipeline is in use by another call that is still running"
SECONDS = 60  # after which a test fails instead of waiting


def sample(pipe, seed=0, labels=(1, 2), **kwargs):
    """Latents where there is no VAE, because nothing is clamped in them."""
    output_type = "latent" if pipe.vae is None else "pt"
    arguments = {"num_inference_steps": 4, "output_type": output_type}
    return pipe(list(labels), generator=torch.Generator().manual_seed(seed), **arguments | kwargs).images


def another(pipe):
    """What the message of the refusal says."""
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other


def at_once(*functions):
    """Results, or the exceptions, of functions that start together in a thread each."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait(SECONDS)
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions, timeout=SECONDS))


class Running:
    """A call of `pipe` in another thread that has stopped after its first step, until the block ends."""

    def __init__(self, pipe, **kwargs):
        self.reached, self.go_on, self.images = threading.Event(), threading.Event(), None

        def wait(pipe, step, timestep, tensors):
            self.reached.set()
            assert self.go_on.wait(SECONDS)
            return tensors

        def run():
            self.images = sample(pipe, callback_on_step_end=wait, **kwargs)

        self.thread = threading.Thread(target=run)

    def __enter__(self):
        self.thread.start()
        assert self.reached.wait(SECONDS)
        return self

    def __exit__(self, *args):
        self.go_on.set()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float32, None), (torch.float32, 8), (torch.bfloat16, 16), (torch.float16, None)],
    ids=str,
)
def test_one_model_under_a_pipeline_per_thread_gives_the_bits_that_each_gives_alone(tiny_pipeline, dtype, bits):
    if bits is not None and not has_integer_kernel("cpu"):
        pytest.skip("needs integer kernels")
    pipe = tiny_pipeline(True, weight_format="packed").to(dtype)
    pipe.transformer.set_activation_bits(bits)
    works = [
        {"seed": 0},
        {"seed": 1, "labels": range(10), "guidance_scale": 1.0},
        {"seed": 2, "height": 32, "width": 16, "num_inference_steps": 7},
        {"seed": 3, "labels": [3], "num_images_per_prompt": 3, "guidance_scale": 2.0},
    ]
    pipes = [pipe, another(pipe), another(pipe), another(pipe)]
    pipes[3].scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    alone = [sample(p, **work) for p, work in zip(pipes, works, strict=True)]
    if bits is not None:
        importlib.import_module("diffusers_terdit.ops.cpu.integer").compiled.cache_clear()  # all load them at once
    for _ in range(2):
        functions = [lambda p=p, work=work: sample(p, **work) for p, work in zip(pipes, works, strict=True)]
        together = at_once(*functions)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_during_a_call_a_second_one_is_refused_and_others_copies_and_saving_work(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline(weight_format="packed")
    expected, other = sample(pipe, callback_on_step_end=lambda *args: args[3]), sample(another(pipe), seed=1)
    with Running(pipe) as running:
        with pytest.raises(RuntimeError, match=IN_USE):
            sample(pipe, num_inference_steps=2, guidance_scale=1.0)
        pipe.save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        copies = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), another(TerDiTPipeline.from_pipe(pipe))
        for free in (another(pipe), loaded, *copies):
            assert torch.equal(sample(free, seed=1), other)
    assert torch.equal(running.images, expected)
    assert torch.equal(sample(pipe, seed=1), other)


def test_calls_without_an_order_are_right_or_refused(tiny_pipeline):
    pipe = tiny_pipeline()
    expected = [sample(pipe, seed=seed, guidance_scale=1.0 + seed) for seed in range(4)]
    results = [[] for _ in range(4)]

    def work(seed):
        for _ in range(6):
            try:
                results[seed].append(sample(pipe, seed=seed, guidance_scale=1.0 + seed))
            except RuntimeError as error:
                results[seed].append(str(error))

    at_once(*[lambda seed=seed: work(seed) for seed in range(4)])
    pictures = 0
    for seed, result in enumerate(results):
        assert len(result) == 6
        for item in result:
            if isinstance(item, str):
                assert IN_USE in item
            else:
                assert torch.equal(item, expected[seed])
                pictures += 1
    assert pictures >= 4


def test_a_callback_that_calls_its_own_pipeline_is_refused(tiny_pipeline):
    pipe = tiny_pipeline()

    def callback(pipe, step, timestep, tensors):
        with pytest.raises(RuntimeError, match=IN_USE):
            sample(pipe)
        assert sample(another(pipe)).isfinite().all()
        return tensors

    images = sample(pipe, callback_on_step_end=callback)
    assert torch.equal(images, sample(pipe, callback_on_step_end=lambda *args: args[3]))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_call_that_ends_in_an_error_leaves_the_pipeline_free(tiny_pipeline, monkeypatch, error):
    pipe = tiny_pipeline(vae=True)
    expected = sample(pipe)

    def fail(*args, **kwargs):
        raise error

    with pytest.raises(error):
        sample(pipe, callback_on_step_end=fail)
    for place, name in (("transformer", "forward"), ("scheduler", "step"), ("vae", "decode")):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(pipe, place), name, fail)
            with pytest.raises(error):
                sample(pipe)
    for refused in ({"labels": [99]}, {"num_inference_steps": 0}):
        with pytest.raises(ValueError, match=r"out of range|positive int"):
            sample(pipe, **refused)
    assert torch.equal(sample(pipe), expected)
