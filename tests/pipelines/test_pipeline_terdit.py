import copy
import inspect
import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
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
    """Two images in four steps, as tensors; latents where there is no VAE, because nothing is clamped in them."""
    output_type = "latent" if pipe.vae is None else "pt"
    arguments = {"num_inference_steps": 4, "output_type": output_type, "generator": seeded(seed)}
    return pipe(list(class_labels), **arguments | kwargs).images


def watch(pipe):
    """Record what every forward of the transformer is given."""
    calls = []

    def hook(module, args, kwargs):
        names = ["hidden_states", "timestep", "class_labels"]
        calls.append(SimpleNamespace(**dict(zip(names, args, strict=False)), **kwargs))

    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


class TestLabels:
    def test_labels_may_be_ids_or_names_in_any_container(self, tiny_pipeline):
        pipe = tiny_pipeline()
        for class_labels, expected in (
            (7, [7]),
            (" SEVEN ", [7]),
            (("one", 0), [1, 0]),
            (torch.tensor([[3, 4], [5, 6]], dtype=torch.uint8), [3, 4, 5, 6]),
            (np.int64(3), [3]),
            ([np.int32(3), torch.tensor(4), [5, ("six", [np.array([7])])]], [3, 4, 5, 6, 7]),
            (["zero", "nought"], [0, 0]),
            (np.array(["one", "two"]), [1, 2]),
            (range(3), [0, 1, 2]),
        ):
            calls = watch(pipe)
            pipe(class_labels, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
            assert calls[0].class_labels.tolist() == expected

    def test_labels_property_maps_every_name_to_its_id_in_order(self, tiny_pipeline):
        labels = tiny_pipeline().labels
        assert (labels["seven"], labels["zero"], labels["nought"]) == (7, 0, 0)
        assert len(labels) == 11
        assert list(labels) == sorted(labels)

    def test_every_name_in_labels_is_accepted_and_means_one_class(self, tiny_pipeline):
        for id2label, labels in (
            ({"0": "crane", "1": "crane", "2": "b, a heron"}, ["a heron", "b", "crane (0)", "crane (1)"]),
            ({"1": "Turkey", "2": "turkey"}, ["Turkey", "turkey"]),
            ({3: "three"}, ["three"]),
            ({}, []),
        ):
            pipe = tiny_pipeline(id2label=id2label)
            assert list(pipe.labels) == labels
            assert [pipe.get_label_ids(name) for name in pipe.labels] == [[i] for i in pipe.labels.values()]
            assert all(isinstance(key, str) for key in pipe.config.id2label)

    def test_whatever_is_no_label_is_refused(self, tiny_pipeline):
        pipe = tiny_pipeline()
        deep, itself = [], []
        itself += [itself, itself]
        for _ in range(5000):
            deep = [deep]
        types = True, 1.0, b"one", {"one": 1}, np.float32(1), np.array([True]), torch.tensor([1.5]), torch.tensor(True)
        for labels, message in (
            *((label, "class label is an int or a name") for label in types),
            *((nothing, "`class_labels` is empty") for nothing in ([], [[]], torch.empty(0, dtype=torch.long))),
            *(([0, label], rf"{label} is out of range.*0 to 9") for label in (-1, 10)),  # 10 is the null label
            *((labels, "Labels are lists in 9 lists, expected at most 8") for labels in (deep, itself)),
            *(({"one": labels}, r"got \{'one': \[\[\[\[.*\.\.\.") for labels in (deep, itself)),
            ("seventh", "'seventh' is not a label.*'seven'"),
            ("xyzzy", "'xyzzy' is not a label of this model. All labels: `pipe.labels`"),
        ):
            with pytest.raises(ValueError, match=message):
                pipe(labels)
        with pytest.raises(ValueError, match=r"A label name is a string, got \[\[\["):
            pipe.get_label_ids([deep])
        with pytest.raises(ValueError, match=r"10.*0 to 9"):  # it would silently be the null label
            tiny_pipeline(id2label={"10": "eleven"})("eleven")


class TestGuidance:
    @pytest.mark.parametrize(("scale", "rows"), [(4.0, 6), (1.01, 6), (1.0, 3), (0, 3), (-2.0, 3)])
    def test_guidance_off_runs_half_the_batch(self, tiny_pipeline, scale, rows):
        pipe = tiny_pipeline()
        calls = watch(pipe)
        sample(pipe, [1, 2, 3], guidance_scale=scale)
        assert [len(call.hidden_states) for call in calls] == [rows] * 4
        assert [len(call.class_labels) for call in calls] == [rows] * 4
        assert pipe.do_classifier_free_guidance == (rows == 6)
        assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (scale, 4, False)

    @pytest.mark.parametrize("num_classes", [10, 4])
    def test_unconditional_half_has_the_null_label_and_the_same_latents(self, tiny_pipeline, num_classes):
        pipe = tiny_pipeline(num_classes=num_classes)
        calls = watch(pipe)
        sample(pipe, [3, 0])
        for call in calls:
            assert call.class_labels.tolist() == [3, 0, num_classes, num_classes]
            assert torch.equal(*call.hidden_states.chunk(2))

    @pytest.mark.parametrize("guidance_channels", [None, 1, 3, 4])
    def test_channels_beyond_guidance_channels_are_not_guided(self, tiny_pipeline, guidance_channels):
        pipe = tiny_pipeline(guidance_channels=guidance_channels, in_channels=4, scheduler=DDIMScheduler())
        guided, near, plain = (
            sample(pipe, guidance_scale=scale, num_inference_steps=1) for scale in (4.0, 1 + 1e-6, 1.0)
        )
        same = [torch.allclose(guided[:, c], plain[:, c], rtol=1e-4, atol=1e-4) for c in range(4)]
        assert same == [c >= (guidance_channels or 4) for c in range(4)]
        torch.testing.assert_close(near, plain, rtol=1e-4, atol=1e-4)

    def test_impossible_guidance_channels_are_refused(self, tiny_pipeline):
        for guidance_channels in (0, -1, 5, 2.5, True):
            with pytest.raises(ValueError, match=rf"`guidance_channels`.*{guidance_channels}"):
                tiny_pipeline(guidance_channels=guidance_channels, in_channels=4)


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
        images = sample(pipe, output_type="pt")
        torch.testing.assert_close(images, (latents / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("own", "steps", "guidance"),
        [
            (None, 50, 4.0),
            ({"num_inference_steps": 3}, 3, 4.0),
            ({"guidance_scale": 1.5}, 50, 1.5),
            ({"num_inference_steps": 2, "guidance_scale": 1}, 2, 1),
        ],
        ids=str,
    )
    def test_a_call_takes_the_settings_that_the_model_recommends(
        self, tiny_pipeline, tmp_path, caplog, own, steps, guidance
    ):
        tiny_pipeline(sampling_defaults=own).save_pretrained(tmp_path)
        pipe = load(tmp_path)
        assert not caplog.records
        assert pipe.sampling_defaults == {"num_inference_steps": steps, "guidance_scale": guidance}
        pipe(1, output_type="latent")
        assert (pipe.num_timesteps, pipe.guidance_scale) == (steps, guidance)
        pipe(1, num_inference_steps=1, guidance_scale=2.5, output_type="latent")
        assert (pipe.num_timesteps, pipe.guidance_scale) == (1, 2.5)

    @pytest.mark.parametrize(
        "wrong", [{"steps": 3}, 3, {"num_inference_steps": 0}, {"guidance_scale": "high"}, {"guidance_scale": np.nan}]
    )
    def test_impossible_recommendations_are_refused(self, tiny_pipeline, wrong):
        with pytest.raises(ValueError, match=r"must be a dict|must be a positive int|must be a number|finite"):
            tiny_pipeline(sampling_defaults=wrong)

    def test_guidance_without_label_dropout_is_told(self, tiny_pipeline, caplog):
        options = {"num_inference_steps": 1, "output_type": "latent"}
        tiny_pipeline()(3, guidance_scale=2, **options)
        tiny_pipeline(class_dropout_prob=0.0)(3, guidance_scale=1, **options)
        assert "label dropout" not in caplog.text
        tiny_pipeline(class_dropout_prob=0.0)(3, guidance_scale=2, **options)
        assert "trained without label dropout: guidance_scale=2 compares" in caplog.text

    def test_a_model_of_one_class_needs_no_label(self, tiny_pipeline):
        alone, several = tiny_pipeline(num_classes=1, id2label={}), tiny_pipeline()
        options = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "latent"}
        drawn = alone(generator=seeded(0), num_images_per_prompt=2, **options).images
        assert torch.equal(drawn, alone([0, 0], generator=seeded(0), **options).images)
        with pytest.raises(ValueError, match="`class_labels` is missing, and this model has 10 classes"):
            several(**options)

    def test_another_size_than_that_of_training_is_drawn_with_a_warning(self, tiny_pipeline, caplog):
        pipe = tiny_pipeline()
        sample(pipe)
        assert not caplog.records
        assert sample(pipe, height=16, width=8).shape[-2:] == (16, 8)
        assert "trained on images of 8 x 8 pixels. At 8 x 16 they may be distorted" in caplog.text

    def test_same_seed_gives_the_same_image_packed_or_not_and_another_seed_another(self, tiny_pipeline):
        pipe = tiny_pipeline(weight_format="packed")
        first = sample(pipe)
        assert not first.requires_grad
        assert torch.equal(sample(pipe), first)
        assert torch.equal(sample(tiny_pipeline()), first)
        assert torch.equal(sample(copy.deepcopy(pipe)), first)
        assert not torch.equal(sample(pipe, seed=1), first)

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
        images = sample(pipe, [3, 1], num_images_per_prompt=2, generator=[seeded(i) for i in range(4)])
        expected = sample(pipe, [3, 3, 1, 1], generator=[seeded(i) for i in range(4)])
        torch.testing.assert_close(images, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_given_latents_are_the_start_in_float32(self, tiny_pipeline, dtype):
        pipe = tiny_pipeline()
        latents = torch.randn(2, 3, 8, 8, generator=seeded()).to(dtype)
        before, generator = latents.clone(), seeded()
        torch.randn(2, 3, 8, 8, generator=generator)  # what the pipeline would have drawn
        assert torch.equal(sample(pipe, latents=latents, generator=generator), sample(pipe))
        assert torch.equal(latents, before)

    def test_the_encoder_may_be_taken_away(self, tiny_pipeline):
        pipe = tiny_pipeline(vae=True)
        expected = sample(pipe)
        pipe.vae.encoder = None
        assert torch.equal(sample(pipe.to("cpu")), expected)

    @pytest.mark.parametrize(("vae", "factor"), [(False, 1), (True, 2)])
    def test_height_and_width_are_pixels(self, tiny_pipeline, vae, factor):
        pipe = tiny_pipeline(vae)
        channels = 4 if vae else 3
        assert sample(pipe).shape == (2, 3, 8 * factor, 8 * factor)
        size = {"height": 4 * factor, "width": 12 * factor}
        assert sample(pipe, **size).shape == (2, 3, 4 * factor, 12 * factor)
        assert sample(pipe, **size, output_type="latent").shape == (2, channels, 4, 12)
        pipe = tiny_pipeline(vae, sample_size=4)
        assert sample(pipe, num_inference_steps=1).shape[-2:] == (4 * factor, 4 * factor)

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

    def test_impossible_arguments_are_refused_before_the_model_runs(self, tiny_pipeline):
        """Each way to fail a check; the table of messages has one for each."""
        pipe, generator, latents = tiny_pipeline(), torch.Generator(), torch.zeros(2, 3, 8, 8)
        calls = watch(pipe)
        for argument, values in {
            "guidance_scale": (np.inf, "4", True),
            "num_inference_steps": (-1, 2.5, True, 1001),
            "num_images_per_prompt": (0,),
            "height": (0, -8, 8.0),
            "width": (9, "8"),
            "generator": ([generator], [], [0, 1]),
            "latents": (latents[:1], torch.zeros(2, 3, 8, 10), latents.numpy()),
            "output_type": (None,),
        }.items():
            for value in values:
                with pytest.raises(ValueError, match=r"positive|generators? for 2|must be|1001"):
                    sample(pipe, **{argument: value})
        with pytest.raises(ValueError, match=r"shape \(4, 3, 8, 8\)"):
            sample(pipe, latents=latents, num_images_per_prompt=2)
        with pytest.raises(ValueError, match="multiples of 4 pixels, got 18 x 16"):
            sample(tiny_pipeline(True), height=18)
        assert calls == []


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
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
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
    @pytest.mark.parametrize(("vae", "channels"), [(True, 3), (False, 1), (False, 3)])
    def test_image_types_agree_with_each_other(self, tiny_pipeline, vae, channels):
        pipe = tiny_pipeline(True) if vae else tiny_pipeline(in_channels=channels)
        side = 16 if vae else 8
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

    def test_other_channel_counts_give_latents_that_are_not_clamped(self, tiny_pipeline):
        latents = sample(tiny_pipeline(in_channels=5))
        assert latents.shape == (2, 5, 8, 8)
        assert latents.abs().max() > 1

    def test_output_is_an_object_of_pictures_or_a_tuple(self, tiny_pipeline):
        pipe = tiny_pipeline()
        output = pipe([1], num_inference_steps=2, generator=seeded())
        assert isinstance(output, ImagePipelineOutput)
        assert isinstance(output.images[0], PIL.Image.Image)
        (images,) = pipe([1], num_inference_steps=2, generator=seeded(), return_dict=False)
        assert images == output.images


class TestCallbacks:
    def test_callback_sees_every_step_in_order_with_the_latents(self, tiny_pipeline):
        pipe, seen = tiny_pipeline(), []

        def callback(given_pipe, step, timestep, kwargs):
            assert given_pipe is pipe
            seen.append((step, int(timestep), *kwargs))
            latents.append(kwargs["latents"].clone())
            return kwargs

        latents = []
        result = sample(pipe, callback_on_step_end=callback)
        assert seen == [(i, t, "latents") for i, t in enumerate((999, 666, 333, 0))]
        assert torch.equal(latents[-1], result)
        assert not torch.equal(latents[0], result)

    def test_callback_may_ask_for_no_tensor_and_replace_the_latents(self, tiny_pipeline):
        def zero_at_the_end(pipe, step, timestep, kwargs):
            assert kwargs == {}
            return {"latents": torch.zeros(2, 3, 8, 8)} if step == pipe.num_timesteps - 1 else {}

        options = {"callback_on_step_end": zero_at_the_end, "callback_on_step_end_tensor_inputs": []}
        assert not sample(tiny_pipeline(), **options).any()

    def test_interrupt_skips_the_rest_of_the_steps(self, tiny_pipeline):
        pipe = tiny_pipeline()
        calls, states = watch(pipe), []

        def stop(pipe, step, timestep, kwargs):
            pipe._interrupt = step == 1
            states.append(kwargs["latents"].clone())
            return kwargs

        latents = sample(pipe, callback_on_step_end=stop)
        assert len(calls) == len(states) == 2
        assert torch.equal(latents, states[1])
        assert pipe.interrupt
        sample(pipe)
        assert len(calls) == 2 + 4
        assert not pipe.interrupt

    def test_guidance_may_change_and_be_switched_off_and_on_between_steps(self, tiny_pipeline):
        pipe = tiny_pipeline()
        calls = watch(pipe)

        def switch(pipe, step, timestep, kwargs):
            pipe._guidance_scale = [1.0, 1.0, 3.0, 4.0][step]
            return kwargs

        images = sample(pipe, guidance_scale=2.0, callback_on_step_end=switch)
        assert [len(call.class_labels) for call in calls] == [4, 2, 2, 4]
        assert [len(call.hidden_states) for call in calls] == [4, 2, 2, 4]
        assert pipe.guidance_scale == 4.0
        assert not torch.equal(images, sample(pipe, guidance_scale=2.0))

    def test_pipeline_callbacks_bring_their_own_inputs(self, tiny_pipeline):
        class Halve(PipelineCallback):
            tensor_inputs = ["latents"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                return {"latents": callback_kwargs["latents"] / 2}

        pipe = tiny_pipeline()
        expected = sample(pipe, callback_on_step_end=lambda pipe, i, t, kwargs: {"latents": kwargs["latents"] / 2})
        assert torch.equal(sample(pipe, callback_on_step_end=Halve(cutoff_step_ratio=0.5)), expected)
        both = MultiPipelineCallbacks([Halve(0.5), Halve(0.5)])
        assert not torch.equal(sample(pipe, callback_on_step_end=both), expected)


class TestSchedulers:
    @pytest.mark.parametrize(
        ("config", "name", "setting"),
        [
            ({}, "DDPMScheduler", {"variance_type": "learned_range"}),
            ({"prediction_type": "epsilon"}, "DDPMScheduler", {"variance_type": "fixed_small"}),
            ({"prediction_type": "v_prediction"}, "DDPMScheduler", {"prediction_type": "v_prediction"}),
            ({"prediction_type": "flow_prediction"}, "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
        ],
    )
    def test_without_a_scheduler_the_model_says_which(self, tiny_model, tmp_path, config, name, setting):
        model = tiny_model(**config, learn_sigma=not config)
        pipe = TerDiTPipeline(model, None)
        pipe.save_pretrained(tmp_path)
        for found in (pipe, TerDiTPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
            assert type(found.scheduler).__name__ == name
            assert setting.items() <= dict(found.scheduler.config).items()
            assert sample(found).isfinite().all()

    def test_a_call_with_a_generator_leaves_the_global_one_alone(self, tiny_pipeline):
        pipe = tiny_pipeline()
        before = torch.get_rng_state()
        sample(pipe)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("cls", SWAPS)
    def test_swapped_scheduler_samples_as_one_that_never_heard_of_a_variance(self, tiny_pipeline, cls):
        pipe = tiny_pipeline(in_channels=4)
        learned = sample(pipe)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        images = sample(pipe, num_inference_steps=6, guidance_scale=1.0)

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

        guided = sample(pipe, num_inference_steps=6)
        assert guided.isfinite().all()
        assert torch.equal(sample(pipe, num_inference_steps=6), guided)
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # and back
        assert pipe.scheduler.config.variance_type == "learned_range"
        assert torch.equal(sample(pipe), learned)
        noise_only = tiny_pipeline(learn_sigma=False)
        noise_only.scheduler = cls.from_config(noise_only.scheduler.config)
        assert sample(noise_only).isfinite().all()

    def test_dpm_solver_plus_plus_guides_all_four_channels_and_a_failed_call_keeps_the_learned_variance(
        self, tiny_pipeline
    ):
        # Told of a learned variance, it would keep three of the four channels.
        pipe = tiny_pipeline(in_channels=4)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
        )
        assert sample(pipe).shape == (2, 4, 8, 8)
        with pytest.raises(ZeroDivisionError):
            sample(pipe, callback_on_step_end=lambda *_: 1 / 0)
        assert pipe.scheduler.config.variance_type == "learned_range"

    def test_learned_variance_changes_the_steps_and_fixed_ones_drop_it(self, tiny_pipeline):
        # The variance channels are the last ones of proj_out: shifting them must change the sampled images.
        pipe = tiny_pipeline()
        before = sample(pipe)
        bias = pipe.transformer.proj_out.bias.data.view(2, 2, 6)
        bias[..., 3:] += 1.0
        assert (sample(pipe) - before).abs().max() > 1e-3
        bias[..., 3:] -= 1.0
        for variance_type in ("fixed_small", "fixed_large", "fixed_small_log"):
            pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
            fixed = sample(pipe)
            assert (fixed - before).abs().max() > 1e-3
            bias[..., 3:] += 1.0
            assert torch.equal(sample(pipe), fixed)
            bias[..., 3:] -= 1.0
            assert sample(tiny_pipeline(scheduler=pipe.scheduler, learn_sigma=False)).isfinite().all()


class TestDtypes:
    def test_half_precision_model_keeps_float32_latents_and_noise(self, tiny_pipeline):
        pipe, seen, drawn = tiny_pipeline(weight_format="packed").to(torch.bfloat16), [], []
        calls, original = watch(pipe), pipe.prepare_latents
        pipe.prepare_latents = lambda *args: drawn.append(original(*args)) or drawn[-1]
        note = lambda pipe, i, t, kwargs: seen.append(kwargs["latents"].dtype) or kwargs  # noqa: E731
        images = sample(pipe, callback_on_step_end=note)
        assert torch.equal(drawn[0], torch.randn(2, 3, 8, 8, generator=seeded()))
        assert set(seen) == {torch.float32}
        assert {call.hidden_states.dtype for call in calls} == {torch.bfloat16}
        assert images.dtype == torch.float32

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
        for component in (pipe.vae, pipe.transformer) if vae else ():  # each in a dtype of its own
            component.to(torch.float32 if component.dtype == dtype else dtype)
            assert sample(pipe).dtype == torch.float32


def load(folder, cls=TerDiTPipeline, **options):
    pipe = cls.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_pipeline(a, b):
    assert torch.equal(sample(a, ["seven", 2]), sample(b, ["seven", 2]))
    assert a.config.id2label == b.config.id2label
    assert a.config.guidance_channels == b.config.guidance_channels
    assert type(a.scheduler) is type(b.scheduler)
    assert (a.vae is None) == (b.vae is None)


class TestSaving:
    @pytest.mark.parametrize("vae", [False, True])
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_saved_pipeline_samples_the_same_bits(self, tiny_pipeline, tmp_path, caplog, weight_format, vae):
        pipe = tiny_pipeline(vae, weight_format=weight_format, guidance_channels=2)
        pipe.save_pretrained(tmp_path / "first")
        caplog.clear()
        for options in ({}, {"cls": DiffusionPipeline}, {"device_map": "balanced"}, {"low_cpu_mem_usage": False}):
            loaded = load(tmp_path / "first", **options)
            assert options or {record.levelname for record in caplog.records} <= {"INFO"}
            assert type(loaded) is TerDiTPipeline
            assert loaded.transformer.config.weight_format == weight_format
            same_pipeline(loaded, pipe)
        loaded.save_pretrained(tmp_path / "second")
        for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
            assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()

    @pytest.mark.parametrize("save", [{"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=str)
    def test_variants_and_shards_load_again_with_a_swapped_scheduler(self, tiny_pipeline, tmp_path, save):
        pipe = tiny_pipeline(weight_format="packed")
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        sample(pipe)
        pipe.save_pretrained(tmp_path, **save)
        loaded = load(tmp_path, variant=save.get("variant"))
        assert loaded.scheduler.config.variance_type == "learned_range"
        same_pipeline(loaded, pipe)

    @pytest.mark.parametrize("use_safetensors", [None, False])
    def test_the_vae_may_be_a_pickle(self, tiny_pipeline, tmp_path, use_safetensors):
        pipe = tiny_pipeline(vae=True)
        pipe.save_pretrained(tmp_path)
        (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        pipe.vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
        same_pipeline(load(tmp_path, use_safetensors=use_safetensors), pipe)

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

    # DiffusionPipeline does not know which components are optional, and loads the saved VAE all the same.
    @pytest.mark.parametrize(
        ("cls", "names"),
        [(TerDiTPipeline, ["transformer", "scheduler", "vae"]), (DiffusionPipeline, ["transformer", "scheduler"])],
    )
    def test_components_may_be_passed_to_from_pretrained(self, tiny_pipeline, tiny_model, tmp_path, cls, names):
        pipe = tiny_pipeline(True)
        pipe.save_pretrained(tmp_path)
        pipe.register_modules(transformer=tiny_model(seed=5), scheduler=DDIMScheduler())
        loaded = load(tmp_path, cls, **{name: pipe.components[name] for name in names})
        assert [loaded.components[name] is pipe.components[name] for name in names] == [True] * len(names)
        assert sample(loaded).shape == (2, 3, 16, 16)
        assert load(tmp_path, vae=None).vae is None

    def test_loading_in_half_precision_equals_casting(self, tiny_pipeline, tmp_path):
        pipe = tiny_pipeline(True, weight_format="packed")
        pipe.save_pretrained(tmp_path)
        loaded = load(tmp_path, dtype={"transformer": torch.bfloat16, "vae": torch.float32})
        assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
        loaded = load(tmp_path, dtype=torch.bfloat16)
        assert loaded.vae.dtype == torch.bfloat16
        same_pipeline(loaded, pipe.to(torch.bfloat16))
