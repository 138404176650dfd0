import copy
import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.models.transformer_terdit import AdaLNAhead
from diffusers_terdit.pipelines.schedulers import default_scheduler


# Some schedulers of diffusers 0.42 hand torch tensors to numpy, in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

SWAPS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    DEISMultistepScheduler,
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, class_labels=(1, 2), seed=0, **kwargs):
    """Two images in four steps, as tensors."""
    arguments = {"num_inference_steps": 4, "output_type": "pt", "generator": seeded(seed)}
    return pipe(list(class_labels), **arguments | kwargs).images


def watch(pipe):
    """Record what every forward of the transformer is given."""
    calls = []

    def hook(module, args, kwargs):
        names = ["hidden_states", "timestep", "class_labels"]
        calls.append(SimpleNamespace(**dict(zip(names, args, strict=False)), **kwargs))

    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def labels_seen(pipe, class_labels, **kwargs):
    calls = watch(pipe)
    sample(pipe, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **kwargs, class_labels=class_labels)
    return calls[0].class_labels.tolist()


class TestLabels:
    @pytest.mark.parametrize(
        ("class_labels", "expected"),
        [
            (7, [7]),
            ("seven", [7]),
            (" SEVEN ", [7]),
            ([7, "one"], [7, 1]),
            (("one", 0), [1, 0]),
            (torch.tensor(3), [3]),
            (torch.tensor([[3, 4], [5, 6]], dtype=torch.uint8), [3, 4, 5, 6]),
            (np.array([3, 4]), [3, 4]),
            (np.int64(3), [3]),
            ([np.int32(3), torch.tensor(4), [5, ("six", [np.array([7])])]], [3, 4, 5, 6, 7]),
            (["zero", "nought"], [0, 0]),
            (np.array(["one", "two"]), [1, 2]),
            (range(3), [0, 1, 2]),
        ],
        ids=repr,
    )
    def test_labels_may_be_ids_or_names_in_any_container(self, tiny_pipeline, class_labels, expected):
        pipe = tiny_pipeline()
        calls = watch(pipe)
        pipe(class_labels, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        assert calls[0].class_labels.tolist() == expected

    def test_labels_property_maps_every_name_to_its_id_in_order(self, tiny_pipeline):
        labels = tiny_pipeline().labels
        assert labels["seven"] == 7
        assert (labels["zero"], labels["nought"]) == (0, 0)
        assert len(labels) == 11
        assert list(labels) == sorted(labels)

    def test_every_name_in_labels_is_accepted(self, tiny_pipeline):
        pipe = tiny_pipeline(id2label={"0": "crane", "1": "crane", "2": "heron, grey heron"})
        assert [pipe.get_label_ids(name) for name in pipe.labels] == [[i] for i in pipe.labels.values()]

    def test_pipeline_without_names_has_no_labels_and_says_so(self, tiny_pipeline):
        pipe = tiny_pipeline(id2label={})
        assert pipe.labels == {}
        with pytest.raises(ValueError, match=r"no label names, so 'seven'"):
            pipe("seven")
        assert sample(pipe, num_inference_steps=1).shape == (2, 3, 8, 8)

    def test_unknown_name_is_refused_with_near_matches(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r"'seventh' is not a label.*'seven'.*pipe\.labels"):
            tiny_pipeline()("seventh")

    def test_unknown_name_with_nothing_near_points_to_all_labels(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r"'xyzzy' is not a label of this model\. All labels: `pipe\.labels`"):
            tiny_pipeline()("xyzzy")

    def test_name_of_two_classes_is_refused_with_both_ids(self, tiny_pipeline):
        pipe = tiny_pipeline(id2label={"1": "crane", "2": "heron", "5": "crane"})
        assert pipe.labels == {"crane (1)": 1, "crane (5)": 5, "heron": 2}
        with pytest.raises(ValueError, match=r"2 classes are named 'crane'.*\[1, 5\]"):
            pipe("crane")
        assert labels_seen(pipe, ["crane (5)", 1, "Heron"]) == [5, 1, 2]

    def test_names_that_differ_in_case_only_are_not_mixed_up(self, tiny_pipeline):
        pipe = tiny_pipeline(id2label={"1": "Turkey", "2": "turkey"})
        assert pipe.labels == {"Turkey": 1, "turkey": 2}
        assert pipe.get_label_ids(["Turkey", "turkey"]) == [1, 2]

    @pytest.mark.parametrize("label", [-1, 10, 1000])
    def test_id_out_of_range_is_refused_with_the_range(self, tiny_pipeline, label):
        # 10 is the null label of this model: not a class.
        with pytest.raises(ValueError, match=rf"{label} is out of range.*0 to 9"):
            tiny_pipeline()([0, label])

    @pytest.mark.parametrize(
        "label",
        [
            True,
            1.0,
            None,
            b"one",
            {"one": 1},
            np.float32(1),
            np.array([True]),
            torch.tensor([1.5]),
            torch.tensor(True),
        ],
        ids=repr,
    )
    def test_label_of_another_type_is_refused(self, tiny_pipeline, label):
        with pytest.raises(ValueError, match="class label is an int or a name"):
            tiny_pipeline()(label)

    @pytest.mark.parametrize("nothing", [[], (), [[]], torch.empty(0, dtype=torch.long)], ids=repr)
    def test_no_label_at_all_is_refused(self, tiny_pipeline, nothing):
        with pytest.raises(ValueError, match="`class_labels` is empty"):
            tiny_pipeline()(nothing)

    def test_int_keys_of_the_names_become_strings(self, tiny_pipeline):
        pipe = tiny_pipeline(id2label={3: "three"})
        assert pipe.config.id2label == {"3": "three"}
        assert pipe.get_label_ids("three") == [3]


class TestGuidance:
    @pytest.mark.parametrize(("scale", "rows"), [(4.0, 6), (1.01, 6), (1.0, 3), (0.5, 3), (0, 3), (-2.0, 3)])
    def test_guidance_off_runs_half_the_batch(self, tiny_pipeline, scale, rows):
        pipe = tiny_pipeline()
        calls = watch(pipe)
        sample(pipe, [1, 2, 3], guidance_scale=scale)
        assert [len(call.hidden_states) for call in calls] == [rows] * 4
        assert [len(call.class_labels) for call in calls] == [rows] * 4
        assert pipe.do_classifier_free_guidance == (rows == 6)

    def test_unconditional_half_has_the_null_label_and_the_same_latents(self, tiny_pipeline):
        pipe = tiny_pipeline()
        calls = watch(pipe)
        sample(pipe, [3, 4])
        for call in calls:
            assert call.class_labels.tolist() == [3, 4, 10, 10]
            assert torch.equal(*call.hidden_states.chunk(2))

    def test_null_label_follows_the_number_of_classes(self, tiny_pipeline):
        pipe = tiny_pipeline(num_classes=4)
        calls = watch(pipe)
        sample(pipe, [3, 0])
        assert calls[0].class_labels.tolist() == [3, 0, 4, 4]

    def test_scale_of_one_is_no_guidance(self, tiny_pipeline):
        pipe = tiny_pipeline()
        plain = sample(pipe, guidance_scale=1.0, output_type="latent")
        near = sample(pipe, guidance_scale=1 + 1e-6, output_type="latent")
        torch.testing.assert_close(near, plain, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("guidance_channels", [None, 1, 2, 3, 4])
    def test_channels_beyond_guidance_channels_are_not_guided(self, tiny_pipeline, guidance_channels):
        pipe = tiny_pipeline(guidance_channels=guidance_channels, in_channels=4, scheduler=DDIMScheduler())
        arguments = {"num_inference_steps": 1, "output_type": "latent"}
        guided, plain = (sample(pipe, guidance_scale=scale, **arguments) for scale in (4.0, 1.0))
        same = [torch.allclose(guided[:, c], plain[:, c], rtol=1e-4, atol=1e-4) for c in range(4)]
        assert same == [c >= (guidance_channels or 4) for c in range(4)]

    @pytest.mark.parametrize("guidance_channels", [0, -1, 5, 2.5, True])
    def test_impossible_guidance_channels_are_refused(self, tiny_pipeline, guidance_channels):
        with pytest.raises(ValueError, match=rf"`guidance_channels`.*{guidance_channels}"):
            tiny_pipeline(guidance_channels=guidance_channels, in_channels=4)

    def test_properties_tell_of_the_last_call(self, tiny_pipeline):
        pipe = tiny_pipeline()
        sample(pipe, guidance_scale=2.5, num_inference_steps=3)
        assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (2.5, 3, False)


class TestSampling:
    @pytest.mark.parametrize("vae", [False, True])
    def test_pipeline_is_the_plain_sampling_loop(self, tiny_pipeline, vae):
        pipe = tiny_pipeline(vae)
        channels = pipe.transformer.config.in_channels
        generator, scheduler = seeded(), default_scheduler()
        latents = torch.randn(2, channels, 8, 8, generator=generator)
        scheduler.set_timesteps(4)
        labels, null = torch.tensor([1, 2]), torch.tensor([10, 10])
        with torch.no_grad():
            for t in scheduler.timesteps:
                timestep = t.expand(2)
                cond = pipe.transformer(latents, timestep, labels).sample
                uncond = pipe.transformer(latents, timestep, null).sample
                noise = uncond[:, :channels] + 4.0 * (cond - uncond)[:, :channels]
                output = torch.cat([noise, cond[:, channels:]], dim=1)
                latents = scheduler.step(output, t, latents, generator=generator).prev_sample
            torch.testing.assert_close(sample(pipe, output_type="latent"), latents, rtol=1e-4, atol=1e-4)
            if vae:
                latents = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close(sample(pipe), (latents / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)

    def test_default_is_fifty_steps_at_guidance_four(self):
        defaults = {name: p.default for name, p in inspect.signature(TerDiTPipeline.__call__).parameters.items()}
        assert defaults["num_inference_steps"] == 50
        assert defaults["guidance_scale"] == 4.0

    def test_same_seed_gives_the_same_image_and_another_seed_another(self, tiny_pipeline):
        pipe = tiny_pipeline(weight_format="packed")
        first = sample(pipe)
        assert torch.equal(sample(pipe), first)
        assert not torch.equal(sample(pipe, seed=1), first)

    def test_packed_model_samples_the_same_bits_as_float(self, tiny_pipeline):
        assert torch.equal(sample(tiny_pipeline(weight_format="packed")), sample(tiny_pipeline()))

    @pytest.mark.parametrize("cls", [DDPMScheduler, EulerAncestralDiscreteScheduler])
    def test_one_generator_per_image_makes_an_image_independent_of_its_batch(self, tiny_pipeline, cls):
        pipe = tiny_pipeline(scheduler=cls.from_config(default_scheduler().config))
        together = sample(pipe, [1, 2, 3], generator=[seeded(i) for i in (5, 6, 7)])
        pair = sample(pipe, [3, 1], generator=[seeded(7), seeded(5)])
        alone = sample(pipe, [2], generator=seeded(6))
        alone_in_a_list = sample(pipe, [2], generator=[seeded(6)])
        torch.testing.assert_close(pair, together[[2, 0]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone, together[[1]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone_in_a_list, alone, rtol=1e-4, atol=1e-4)

    def test_images_of_one_label_stand_together(self, tiny_pipeline):
        pipe = tiny_pipeline()
        assert labels_seen(pipe, [3, 1], num_images_per_prompt=2) == [3, 3, 1, 1]
        generators = [seeded(i) for i in range(4)]
        images = sample(pipe, [3, 1], num_images_per_prompt=2, generator=generators)
        expected = sample(pipe, [3, 3, 1, 1], generator=[seeded(i) for i in range(4)])
        torch.testing.assert_close(images, expected)

    def test_given_latents_are_the_start(self, tiny_pipeline):
        pipe = tiny_pipeline()
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        before = latents.clone()
        generator = seeded()
        torch.randn(2, 3, 8, 8, generator=generator)  # what the pipeline would have drawn
        assert torch.equal(sample(pipe, latents=latents, generator=generator), sample(pipe))
        assert torch.equal(latents, before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_given_latents_of_another_dtype_are_read_as_float32(self, tiny_pipeline, dtype):
        images = sample(tiny_pipeline(), latents=torch.randn(2, 3, 8, 8, generator=seeded()).to(dtype))
        assert images.dtype == torch.float32
        assert images.isfinite().all()

    @pytest.mark.parametrize(("vae", "factor"), [(False, 1), (True, 2)])
    def test_height_and_width_are_pixels(self, tiny_pipeline, vae, factor):
        pipe = tiny_pipeline(vae)
        channels = 4 if vae else 3
        assert sample(pipe).shape == (2, 3, 8 * factor, 8 * factor)
        size = {"height": 4 * factor, "width": 12 * factor}
        assert sample(pipe, **size).shape == (2, 3, 4 * factor, 12 * factor)
        assert sample(pipe, **size, output_type="latent").shape == (2, channels, 4, 12)

    def test_default_size_follows_sample_size(self, tiny_pipeline):
        assert sample(tiny_pipeline(True, sample_size=4), num_inference_steps=1).shape[-2:] == (8, 8)

    def test_gradients_are_not_recorded(self, tiny_pipeline):
        assert not sample(tiny_pipeline(), output_type="latent").requires_grad

    def test_progress_bar_counts_the_steps_and_can_be_switched_off(self, tiny_pipeline, capsys):
        pipe = tiny_pipeline()
        sample(pipe)
        assert capsys.readouterr().err == ""
        pipe.set_progress_bar_config(disable=False, desc="Denoising")
        sample(pipe)
        error = capsys.readouterr().err
        assert "Denoising" in error
        assert "4/4" in error

    def test_step_cache_saves_work_and_starts_empty_in_every_call(self, tiny_pipeline):
        pipe, blocks = tiny_pipeline(), []
        pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: blocks.append(1))
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        first, computed = sample(pipe), len(blocks)
        assert computed < 4
        assert torch.equal(sample(pipe), first)
        assert len(blocks) == 2 * computed

    def test_step_caches_can_ask_for_the_timestep(self, tiny_pipeline):
        pipe, seen = tiny_pipeline(), []
        assert pipe.current_timestep is None
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(int(pipe.current_timestep)))
        sample(pipe)
        hook.remove()
        assert seen == pipe.scheduler.timesteps.tolist()
        assert pipe.current_timestep is None

    def test_calls_do_not_leak_into_each_other(self, tiny_pipeline):
        pipe = tiny_pipeline()
        expected = sample(pipe)
        sample(pipe, num_inference_steps=7, guidance_scale=1.0, height=4)
        with pytest.raises(ValueError, match="height"):
            sample(pipe, height=3)
        assert torch.equal(sample(pipe), expected)


def step_by_step(pipe, *args, **kwargs):
    """Sample with a callback, which has adaLN computed in every step instead of ahead."""
    return sample(pipe, *args, callback_on_step_end=lambda pipe, i, t, kwargs: kwargs, **kwargs)


class TestModulations:
    """adaLN sees only timestep and label, so a call computes its outputs ahead, for many steps, once per label."""

    @pytest.fixture
    def rows(self, monkeypatch):
        """Rows of every call of `modulations`."""
        calls, original = [], TerDiTTransformer2DModel.modulations

        def spy(self, timestep, class_labels):
            calls.append(list(zip(timestep.tolist(), class_labels.tolist(), strict=True)))
            return original(self, timestep, class_labels)

        monkeypatch.setattr(TerDiTTransformer2DModel, "modulations", spy)
        return calls

    @pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
    def test_once_for_each_timestep_and_label(self, tiny_pipeline, rows, guidance_scale):
        pipe = tiny_pipeline()
        labels = [2, 7, 2, 2]
        images = sample(pipe, labels, guidance_scale=guidance_scale)
        (computed,) = rows
        unique = [2, 7] + ([10] if guidance_scale > 1 else [])
        assert computed == [(t, label) for t in pipe.scheduler.timesteps.tolist() for label in unique]
        expected = step_by_step(pipe, labels, guidance_scale=guidance_scale)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        assert len(rows) == 1

    @pytest.mark.parametrize(("steps_at_once", "sizes"), [(3.5, [3, 3, 1]), (0.5, [1] * 7), (100, [7])])
    def test_in_chunks_of_bounded_memory(self, tiny_model, rows, steps_at_once, sizes):
        model, timesteps = tiny_model("packed"), torch.arange(999, 0, -150)
        labels = torch.tensor([2, 7, 2, 10])
        step = 2 * 3 * 6 * 32 * 4  # bytes: layers, labels, modulation, float32
        ahead = AdaLNAhead(model, timesteps, labels.tolist(), max_bytes=int(steps_at_once * step))
        with torch.no_grad():
            found = [ahead(i, labels[1:]) for i in range(7)]
            assert [len(call) // 3 for call in rows] == sizes
            for timestep, modulation in zip(timesteps, found, strict=True):
                expected = model.modulations(timestep.expand(3), labels[1:])
                torch.testing.assert_close(modulation, expected, rtol=1e-5, atol=1e-6)

    def test_not_where_the_weights_are_elsewhere_between_forwards(self, tiny_pipeline, rows):
        expected = step_by_step(tiny_pipeline())
        for offload in (
            lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
            lambda pipe: cpu_offload(pipe.transformer, torch.device("cpu")),
            lambda pipe: pipe.transformer.enable_group_offload(
                torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            ),
        ):
            pipe = tiny_pipeline()
            offload(pipe)
            torch.testing.assert_close(sample(pipe), expected, rtol=1e-5, atol=1e-5)
        assert rows == []

    def test_a_callback_may_change_the_model_between_steps(self, tiny_pipeline):
        def damp(pipe, i, t, kwargs):
            with torch.no_grad():
                for block in pipe.transformer.transformer_blocks:
                    block.adaln.norm.weight.mul_(0.5)
            return {}

        seen = watch(pipe := tiny_pipeline())
        changed = sample(pipe, callback_on_step_end=damp)
        assert all(call.modulation is None for call in seen)
        assert not torch.allclose(changed, sample(tiny_pipeline()))


class TestOutputs:
    @pytest.mark.parametrize("vae", [False, True])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_image_types_agree_with_each_other(self, tiny_pipeline, vae, channels):
        if vae:
            pipe, channels, side = tiny_pipeline(True), 3, 16
        else:
            pipe, side = tiny_pipeline(in_channels=channels), 8
        pt, array, pil = (sample(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
        assert (pt.shape, pt.dtype) == ((2, channels, side, side), torch.float32)
        assert pt.min() >= 0
        assert pt.max() <= 1
        assert array.shape == (2, side, side, channels)
        assert np.allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-5)
        assert [(type(image), image.size, image.mode) for image in pil] == [
            (PIL.Image.Image, (side, side), "L" if channels == 1 else "RGB")
        ] * 2
        pixels = np.stack([np.asarray(image).reshape(side, side, channels) for image in pil])
        assert np.abs(pixels - array * 255).max() <= 0.51

    @pytest.mark.parametrize("channels", [2, 4, 5])
    def test_other_channel_counts_give_latents(self, tiny_pipeline, channels):
        pipe = tiny_pipeline(in_channels=channels)
        assert sample(pipe, output_type="latent").shape == (2, channels, 8, 8)

    def test_latents_are_not_clamped(self, tiny_pipeline):
        assert sample(tiny_pipeline(), output_type="latent").abs().max() > 1

    def test_output_object_and_tuple_hold_the_same(self, tiny_pipeline):
        pipe = tiny_pipeline()
        arguments = {"num_inference_steps": 2, "output_type": "pt"}
        output = pipe([1], generator=seeded(), **arguments)
        assert isinstance(output, ImagePipelineOutput)
        (images,) = pipe([1], generator=seeded(), return_dict=False, **arguments)
        assert torch.equal(images, output.images)

    def test_default_output_is_a_list_of_pil_images(self, tiny_pipeline):
        images = tiny_pipeline()(1, num_inference_steps=1).images
        assert isinstance(images, list)
        assert isinstance(images[0], PIL.Image.Image)


class TestCallbacks:
    def test_callback_sees_every_step_in_order(self, tiny_pipeline):
        pipe, seen = tiny_pipeline(), []

        def callback(given_pipe, step, timestep, kwargs):
            assert given_pipe is pipe
            seen.append((step, int(timestep), set(kwargs)))
            return kwargs

        sample(pipe, callback_on_step_end=callback)
        assert seen == [(i, t, {"latents"}) for i, t in enumerate((999, 666, 333, 0))]

    def test_callback_sees_float32_latents_that_are_the_result_at_the_end(self, tiny_pipeline):
        latents = []
        result = sample(
            tiny_pipeline(),
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, kwargs: latents.append(kwargs["latents"].clone()) or kwargs,
        )
        assert torch.equal(latents[-1], result)
        assert not torch.equal(latents[0], result)

    def test_callback_may_ask_for_no_tensor(self, tiny_pipeline):
        seen = []
        sample(
            tiny_pipeline(),
            callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs) or kwargs,
            callback_on_step_end_tensor_inputs=[],
        )
        assert seen == [{}] * 4

    def test_callback_may_replace_the_latents(self, tiny_pipeline):
        def zero_at_the_end(pipe, step, timestep, kwargs):
            return {"latents": torch.zeros_like(kwargs["latents"])} if step == pipe.num_timesteps - 1 else {}

        assert not sample(tiny_pipeline(), output_type="latent", callback_on_step_end=zero_at_the_end).any()

    def test_interrupt_skips_the_rest_of_the_steps(self, tiny_pipeline):
        pipe = tiny_pipeline()
        calls, states = watch(pipe), []

        def stop(pipe, step, timestep, kwargs):
            pipe._interrupt = step == 1
            states.append(kwargs["latents"].clone())
            return kwargs

        latents = sample(pipe, output_type="latent", callback_on_step_end=stop)
        assert len(calls) == len(states) == 2
        assert torch.equal(latents, states[1])
        assert pipe.interrupt
        sample(pipe)
        assert len(calls) == 2 + 4
        assert not pipe.interrupt

    def test_guidance_scale_may_change_between_steps(self, tiny_pipeline):
        def increase(pipe, step, timestep, kwargs):
            pipe._guidance_scale += 1.0
            return kwargs

        pipe = tiny_pipeline()
        images = sample(pipe, guidance_scale=2.0, callback_on_step_end=increase)
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
        assert not torch.equal(images, sample(pipe, guidance_scale=2.0))

    def test_guidance_may_be_switched_off_and_on_between_steps(self, tiny_pipeline):
        pipe = tiny_pipeline()
        calls = watch(pipe)

        def switch(pipe, step, timestep, kwargs):
            pipe._guidance_scale = [1.0, 1.0, 4.0, 4.0][step]
            return kwargs

        sample(pipe, callback_on_step_end=switch)
        assert [len(call.class_labels) for call in calls] == [4, 2, 2, 4]
        assert [len(call.hidden_states) for call in calls] == [4, 2, 2, 4]

    def test_pipeline_callbacks_bring_their_own_inputs(self, tiny_pipeline):
        class Halve(PipelineCallback):
            tensor_inputs = ["latents"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                callback_kwargs["latents"] = callback_kwargs["latents"] / 2
                return callback_kwargs

        def halve(pipe, step, timestep, kwargs):
            return {"latents": kwargs["latents"] / 2}

        pipe = tiny_pipeline()
        expected = sample(pipe, callback_on_step_end=halve)
        assert torch.equal(sample(pipe, callback_on_step_end=Halve(cutoff_step_ratio=0.5)), expected)
        twice = sample(pipe, callback_on_step_end=MultiPipelineCallbacks([Halve(0.5), Halve(0.5)]))
        assert not torch.equal(twice, expected)

    def test_unknown_callback_tensor_is_refused(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r"\['latents'\], got \['prompt_embeds'\]"):
            sample(tiny_pipeline(), callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


class TestSchedulers:
    @pytest.mark.parametrize("cls", SWAPS)
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    def test_other_schedulers_swap_in_and_get_the_noise_only(self, tiny_pipeline, cls, guidance_scale):
        pipe = tiny_pipeline(in_channels=4)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        latents = sample(pipe, output_type="latent", num_inference_steps=6, guidance_scale=guidance_scale)
        assert latents.shape == (2, 4, 8, 8)
        assert latents.isfinite().all()
        assert torch.equal(
            sample(pipe, output_type="latent", num_inference_steps=6, guidance_scale=guidance_scale), latents
        )

    @pytest.mark.parametrize("cls", SWAPS)
    def test_swapped_scheduler_samples_as_one_that_never_heard_of_a_variance(self, tiny_pipeline, cls):
        pipe = tiny_pipeline(in_channels=4)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        images = sample(pipe, output_type="latent", num_inference_steps=6, guidance_scale=1.0)

        config = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "linspace", "clip_sample": False}
        scheduler = cls(**{name: value for name, value in config.items() if name in inspect.signature(cls).parameters})
        scheduler.set_timesteps(6)
        generator = seeded()
        stochastic = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                model_input = scheduler.scale_model_input(latents, t)
                noise = pipe.transformer(model_input, t.expand(2), torch.tensor([1, 2])).sample[:, :4]
                latents = scheduler.step(noise, t, latents, **stochastic).prev_sample
        torch.testing.assert_close(images, latents, rtol=1e-4, atol=1e-4)

    def test_dpm_solver_plus_plus_guides_all_four_channels(self, tiny_pipeline):
        # Told of a learned variance, it would keep three of the four channels.
        pipe = tiny_pipeline(in_channels=4)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
        )
        assert sample(pipe, output_type="latent").shape == (2, 4, 8, 8)

    @pytest.mark.parametrize("cls", SWAPS)
    def test_swapping_back_to_ddpm_keeps_the_learned_variance(self, tiny_pipeline, cls):
        pipe = tiny_pipeline()
        expected = sample(pipe)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        sample(pipe)
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        assert pipe.scheduler.config.variance_type == "learned_range"
        assert torch.equal(sample(pipe), expected)

    def test_failed_call_keeps_the_learned_variance_of_a_swapped_scheduler(self, tiny_pipeline):
        def fail(pipe, step, timestep, kwargs):
            raise RuntimeError("stop")

        pipe = tiny_pipeline()
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(RuntimeError, match="stop"):
            sample(pipe, callback_on_step_end=fail)
        assert pipe.scheduler.config.variance_type == "learned_range"

    @pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fixed_small_log"])
    def test_ddpm_with_fixed_variance_drops_the_learned_one(self, tiny_pipeline, variance_type):
        pipe = tiny_pipeline()
        learned = sample(pipe, output_type="latent")
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
        fixed = sample(pipe, output_type="latent")
        assert fixed.shape == learned.shape
        assert (fixed - learned).abs().max() > 1e-3

    def test_learned_variance_changes_the_steps(self, tiny_pipeline):
        # The variance channels are the last ones of proj_out: shifting them must change the sampled images.
        pipe = tiny_pipeline()
        before = sample(pipe, output_type="latent")
        bias = pipe.transformer.proj_out.bias.data.view(2, 2, 6)
        bias[..., 3:] += 1.0
        assert (sample(pipe, output_type="latent") - before).abs().max() > 1e-3
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        noise_only = sample(pipe, output_type="latent")
        bias[..., 3:] -= 1.0
        assert torch.equal(sample(pipe, output_type="latent"), noise_only)

    def test_model_without_variance_runs_with_a_fixed_one(self, tiny_pipeline):
        scheduler = DDPMScheduler.from_config(default_scheduler().config, variance_type="fixed_small")
        assert sample(tiny_pipeline(scheduler=scheduler, learn_sigma=False)).isfinite().all()

    def test_model_without_variance_refuses_a_learned_one_with_the_remedy(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r'learn_sigma=False.*variance_type="fixed_small"'):
            sample(tiny_pipeline(learn_sigma=False))

    @pytest.mark.parametrize("cls", SWAPS)
    def test_model_without_variance_runs_with_every_scheduler(self, tiny_pipeline, cls):
        pipe = tiny_pipeline(learn_sigma=False)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        assert sample(pipe).isfinite().all()

    def test_default_scheduler_is_the_one_the_model_was_trained_for(self):
        config = default_scheduler().config
        assert config.num_train_timesteps == 1000
        assert (config.beta_schedule, config.beta_start, config.beta_end) == ("linear", 1e-4, 0.02)
        assert (config.variance_type, config.clip_sample, config.timestep_spacing) == (
            "learned_range", False, "linspace"
        )  # fmt: skip
        scheduler = default_scheduler()
        scheduler.set_timesteps(250)
        assert (scheduler.timesteps[0], scheduler.timesteps[-1]) == (999, 0)


class TestDtypes:
    def test_half_precision_model_keeps_float32_latents(self, tiny_pipeline):
        pipe, seen = tiny_pipeline(weight_format="packed").to(torch.bfloat16), []
        calls = watch(pipe)

        def callback(pipe, step, timestep, kwargs):
            seen.append(kwargs["latents"].dtype)
            return kwargs

        images = sample(pipe, callback_on_step_end=callback)
        assert set(seen) == {torch.float32}
        assert {call.hidden_states.dtype for call in calls} == {torch.bfloat16}
        assert images.dtype == torch.float32

    def test_start_noise_of_a_half_precision_model_is_drawn_in_float32(self, tiny_pipeline):
        pipe, drawn = tiny_pipeline(weight_format="packed").to(torch.bfloat16), []
        original = pipe.prepare_latents
        pipe.prepare_latents = lambda *args: drawn.append(original(*args)) or drawn[-1]
        sample(pipe, [1, 2])
        assert torch.equal(drawn[0], torch.randn(2, 3, 8, 8, generator=seeded()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("vae", [False, True])
    def test_casting_the_pipeline_casts_all_but_scales_and_codes(self, tiny_pipeline, vae, dtype):
        pipe = tiny_pipeline(vae, weight_format="packed")
        expected = sample(pipe, output_type="latent")
        assert pipe.to(dtype) is pipe
        assert pipe.dtype == pipe.transformer.dtype == dtype
        for name, tensor in pipe.transformer.state_dict().items():
            kept = {"weight_scale": torch.float32, "weight_packed": torch.uint8}
            assert tensor.dtype == kept.get(name.split(".")[-1], dtype), name
        latents = sample(pipe, output_type="latent")
        assert latents.dtype == torch.float32
        assert ((latents - expected).abs().mean() / expected.abs().mean()).item() < 0.1
        assert np.isfinite(sample(pipe, output_type="np")).all()

    def test_vae_may_have_another_dtype_than_the_transformer(self, tiny_pipeline):
        pipe = tiny_pipeline(True, weight_format="packed")
        pipe.transformer.to(torch.bfloat16)
        assert sample(pipe).dtype == torch.float32
        pipe.transformer.float()
        pipe.vae.to(torch.bfloat16)
        assert sample(pipe).dtype == torch.float32


def same_pipeline(a, b):
    assert torch.equal(sample(a, ["seven", 2]), sample(b, ["seven", 2]))
    assert a.config.id2label == b.config.id2label
    assert a.config.guidance_channels == b.config.guidance_channels
    assert type(a.scheduler) is type(b.scheduler)
    assert (a.vae is None) == (b.vae is None)


class TestSaving:
    @pytest.mark.parametrize("cls", [TerDiTPipeline, DiffusionPipeline])
    @pytest.mark.parametrize("vae", [False, True])
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_saved_pipeline_samples_the_same_bits(self, tiny_pipeline, tmp_path, weight_format, vae, cls):
        pipe = tiny_pipeline(vae, weight_format=weight_format, guidance_channels=2)
        pipe.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is TerDiTPipeline
        assert loaded.transformer.config.weight_format == weight_format
        same_pipeline(loaded, pipe)

    @pytest.mark.parametrize("save", [{"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=str)
    def test_every_way_to_save_loads_again(self, tiny_pipeline, tmp_path, save):
        pipe = tiny_pipeline(weight_format="packed")
        pipe.save_pretrained(tmp_path, **save)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, variant=save.get("variant"))
        loaded.set_progress_bar_config(disable=True)
        same_pipeline(loaded, pipe)

    @pytest.mark.parametrize("use_safetensors", [None, False])
    def test_the_vae_may_be_a_pickle(self, tiny_pipeline, tmp_path, use_safetensors):
        pipe = tiny_pipeline(vae=True)
        pipe.save_pretrained(tmp_path)
        (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        pipe.vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, use_safetensors=use_safetensors)
        loaded.set_progress_bar_config(disable=True)
        same_pipeline(loaded, pipe)

    def test_saved_swapped_scheduler_comes_back(self, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline()
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        sample(pipe)
        pipe.save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.scheduler.config.variance_type == "learned_range"
        same_pipeline(loaded, pipe)

    def test_index_names_the_package_and_no_list(self, tiny_pipeline, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == "TerDiTPipeline"
        assert index["transformer"] == ["diffusers_terdit", "TerDiTTransformer2DModel"]
        assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
        assert index["vae"] == [None, None]
        assert index["id2label"]["7"] == "seven"
        # The host takes every list in this file for a component.
        assert {key for key, value in index.items() if isinstance(value, list)} == {"transformer", "scheduler", "vae"}

    @pytest.mark.parametrize("vae", [False, True])
    def test_loading_warns_of_nothing(self, tiny_pipeline, tmp_path, caplog, vae):
        tiny_pipeline(vae, weight_format="packed", guidance_channels=2).save_pretrained(tmp_path)
        caplog.clear()
        TerDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []

    def test_auto_model_finds_the_transformer(self, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline(weight_format="packed")
        pipe.save_pretrained(tmp_path)
        for model in (
            AutoModel.from_pretrained(str(tmp_path), subfolder="transformer"),
            AutoModel.from_pretrained(str(tmp_path / "transformer")),
            TerDiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer"),
        ):
            assert type(model) is TerDiTTransformer2DModel
            assert all(torch.equal(t, pipe.transformer.state_dict()[n]) for n, t in model.state_dict().items())

    # DiffusionPipeline does not know which components are optional, and loads the saved VAE all the same.
    @pytest.mark.parametrize(
        ("cls", "names"),
        [(TerDiTPipeline, ["transformer", "scheduler", "vae"]), (DiffusionPipeline, ["transformer", "scheduler"])],
    )
    def test_components_may_be_passed_to_from_pretrained(self, tiny_pipeline, tiny_model, tmp_path, cls, names):
        pipe = tiny_pipeline(True)
        pipe.save_pretrained(tmp_path)
        pipe.register_modules(transformer=tiny_model(seed=5), scheduler=DDIMScheduler())
        loaded = cls.from_pretrained(tmp_path, **{name: pipe.components[name] for name in names})
        loaded.set_progress_bar_config(disable=True)
        assert [loaded.components[name] is pipe.components[name] for name in names] == [True] * len(names)
        assert sample(loaded).shape == (2, 3, 16, 16)

    def test_vae_may_be_left_out_on_loading(self, tiny_pipeline, tmp_path):
        tiny_pipeline(True).save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, vae=None)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.vae is None
        assert sample(loaded, output_type="latent").shape == (2, 4, 8, 8)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_loading_in_half_precision_equals_casting(self, tiny_pipeline, tmp_path, dtype):
        pipe = tiny_pipeline(True, weight_format="packed")
        pipe.save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, dtype=dtype)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.vae.dtype == dtype
        same_pipeline(loaded, pipe.to(dtype))

    def test_components_may_have_dtypes_of_their_own(self, tiny_pipeline, tmp_path):
        tiny_pipeline(True, weight_format="packed").save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16, "vae": torch.float32})
        assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)

    def test_low_memory_loading_may_be_switched_off(self, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline(weight_format="packed")
        pipe.save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        loaded.set_progress_bar_config(disable=True)
        same_pipeline(loaded, pipe)

    @pytest.mark.parametrize("device_map", ["cpu", "balanced"])
    def test_device_map_loads_the_same(self, tiny_pipeline, tmp_path, device_map):
        pipe = tiny_pipeline(weight_format="packed")
        pipe.save_pretrained(tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path, device_map=device_map)
        loaded.set_progress_bar_config(disable=True)
        same_pipeline(loaded, pipe)

    def test_from_pipe_shares_the_components(self, tiny_pipeline):
        pipe = tiny_pipeline(guidance_channels=2)
        other = TerDiTPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        assert other.transformer is pipe.transformer
        assert other.config.guidance_channels == 2
        assert other.labels == pipe.labels

    def test_save_load_save_writes_the_same_index(self, tiny_pipeline, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        tiny_pipeline(True, guidance_channels=3).save_pretrained(first)
        TerDiTPipeline.from_pretrained(first).save_pretrained(second)
        for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
            assert (first / name).read_text() == (second / name).read_text()

    @pytest.mark.parametrize("kind", [str, Path])
    def test_missing_folder_is_an_error_that_names_it(self, tmp_path, kind):
        with pytest.raises((OSError, ValueError), match="nowhere"):
            TerDiTPipeline.from_pretrained(kind(tmp_path / "nowhere"), local_files_only=True)

    def test_deepcopy_samples_the_same(self, tiny_pipeline):
        pipe = tiny_pipeline(weight_format="packed")
        assert torch.equal(sample(copy.deepcopy(pipe)), sample(pipe))


class TestOffloading:
    """From CPU to CPU: the hooks run, the copies between devices do not."""

    @pytest.mark.parametrize("vae", [False, True])
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_model_offloading_changes_no_bit(self, tiny_pipeline, vae, weight_format):
        pipe = tiny_pipeline(vae, weight_format=weight_format)
        expected = step_by_step(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(step_by_step(pipe), expected)

    @pytest.mark.parametrize("vae", [False, True])
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_sequential_offloading_changes_no_bit(self, tiny_pipeline, vae, weight_format):
        # What `enable_sequential_cpu_offload` does; itself it asks for "cpu:0", which accelerate cannot place.
        pipe = tiny_pipeline(vae, weight_format=weight_format)
        expected = step_by_step(pipe)
        for component in filter(None, (pipe.transformer, pipe.vae)):
            cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
        for _ in range(2):
            assert torch.equal(step_by_step(pipe), expected)
            assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}

    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    @pytest.mark.parametrize(
        "group", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
    )
    def test_group_offloading_changes_no_bit(self, tiny_pipeline, weight_format, group):
        pipe = tiny_pipeline(True, weight_format=weight_format)
        expected = step_by_step(pipe)
        pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **group)
        for _ in range(2):
            assert torch.equal(step_by_step(pipe), expected)

    def test_components_go_to_the_device_in_order_of_use(self):
        assert TerDiTPipeline.model_cpu_offload_seq == "transformer->vae"


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"guidance_scale": math.nan}, "`guidance_scale` must be finite, got nan"),
            ({"guidance_scale": math.inf}, "`guidance_scale` must be finite, got inf"),
            ({"guidance_scale": "4"}, "`guidance_scale` must be a number, got '4'"),
            ({"guidance_scale": None}, "`guidance_scale` must be a number, got None"),
            ({"guidance_scale": True}, "`guidance_scale` must be a number, got True"),
            ({"num_inference_steps": 0}, "`num_inference_steps` must be a positive int, got 0"),
            ({"num_inference_steps": -1}, "`num_inference_steps` must be a positive int, got -1"),
            ({"num_inference_steps": 2.5}, r"`num_inference_steps` must be a positive int, got 2\.5"),
            ({"num_inference_steps": True}, "`num_inference_steps` must be a positive int, got True"),
            ({"num_inference_steps": None}, "`num_inference_steps` must be a positive int, got None"),
            ({"num_inference_steps": 1001}, "1001"),
            ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be a positive int, got 0"),
            ({"height": 7}, "positive multiples of 2 pixels, got 7 x 8"),
            ({"width": 9}, "positive multiples of 2 pixels, got 8 x 9"),
            ({"height": 0}, "positive multiples of 2 pixels, got 0 x 8"),
            ({"height": -8}, "positive multiples of 2 pixels, got -8 x 8"),
            ({"height": 8.0}, "`height` and `width`"),
            ({"width": "8"}, "`height` and `width`"),
            ({"generator": [torch.Generator()]}, "Got 1 generators for 2 images"),
            ({"generator": [torch.Generator()] * 3}, "Got 3 generators for 2 images"),
            ({"generator": []}, "Got 0 generators for 2 images"),
            ({"generator": 0}, "`generator`"),
            ({"generator": [0, 1]}, "`generator`"),
            ({"latents": torch.zeros(1, 3, 8, 8)}, r"shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"),
            ({"latents": torch.zeros(2, 3, 8, 10)}, r"shape \(2, 3, 8, 8\), got \(2, 3, 8, 10\)"),
            ({"latents": torch.zeros(2, 3, 8, 8), "num_images_per_prompt": 2}, r"shape \(4, 3, 8, 8\)"),
            ({"latents": np.zeros((2, 3, 8, 8))}, "`latents` must be a tensor"),
            ({"output_type": "jpeg"}, "`output_type` must be .* got 'jpeg'"),
            ({"output_type": None}, "`output_type` must be .* got None"),
        ],
        ids=lambda value: re.sub(r"<(\S+) object at \w+>", r"\1", str(value))[:60].replace("\n", " "),  # no addresses
    )
    def test_impossible_argument_is_refused_by_value(self, tiny_pipeline, arguments, message):
        pipe = tiny_pipeline()
        calls = watch(pipe)
        with pytest.raises(ValueError, match=message):
            sample(pipe, **arguments)
        assert calls == []

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_four_channels_without_a_vae_are_not_an_image(self, tiny_pipeline, output_type):
        with pytest.raises(ValueError, match=r'no VAE and its model has 4 channels.*output_type="latent"'):
            sample(tiny_pipeline(in_channels=4), output_type=output_type)

    def test_vae_of_other_latents_is_refused(self, tiny_pipeline):
        with pytest.raises(ValueError, match="VAE has 4 latent channels, the transformer 3"):
            sample(tiny_pipeline(True, in_channels=3))

    def test_vae_makes_the_size_multiple_larger(self, tiny_pipeline):
        with pytest.raises(ValueError, match="multiples of 4 pixels, got 18 x 16"):
            sample(tiny_pipeline(True), height=18)

    def test_keys_of_the_names_must_be_ids(self, tiny_pipeline):
        with pytest.raises(ValueError, match="'one'"):
            tiny_pipeline(id2label={"one": "1"})

    @pytest.mark.parametrize("class_id", [10, 11])
    def test_name_of_a_class_the_model_lacks_is_refused(self, tiny_pipeline, class_id):
        # Id 10 would silently be the null label.
        with pytest.raises(ValueError, match=rf"{class_id}.*0 to 9"):
            tiny_pipeline(id2label={str(class_id): "eleven"})("eleven")
