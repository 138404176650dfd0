"""NaN and infinity end a run with the step and the layer, not with a black picture."""

import pytest
import torch


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_step_and_layer_are_named(self, tiny_pipeline, weight_format):
        pipe = tiny_pipeline(weight_format=weight_format)
        pipe.transformer.transformer_blocks[1].norm2.weight.data[3] = float("nan")
        with pytest.raises(
            ValueError, match=r"Step 1 of 3 \(timestep \d+\): layer transformer_blocks.1.norm2 gives NaN"
        ):
            pipe(3, num_inference_steps=3)
        assert pipe.current_timestep is None

    def test_a_later_step(self, tiny_pipeline):
        pipe = tiny_pipeline()

        def damage(pipe, step, timestep, kwargs):
            if step == 1:
                pipe.transformer.proj_out.bias.data[0] = float("inf")
            return kwargs

        with pytest.raises(ValueError, match=r"Step 3 of 4 .*: layer proj_out gives NaN or infinity in float32\. Its"):
            pipe(3, num_inference_steps=4, callback_on_step_end=damage)

    @pytest.mark.gpu
    @pytest.mark.parametrize("step", [1, 2, 4])
    def test_a_gpu_reports_the_step_that_failed_though_it_looks_one_step_late(self, tiny_pipeline, step):
        pipe = tiny_pipeline(weight_format="packed").to("cuda")
        calls = []

        def damage(module, inputs):
            calls.append(module)
            if len(calls) == step:
                module.bias.data[0] = float("inf")

        pipe.transformer.proj_out.register_forward_pre_hook(damage)
        with pytest.raises(ValueError, match=rf"Step {step} of 4 .*: layer proj_out gives NaN or infinity in float32"):
            pipe(3, num_inference_steps=4)
        assert len(calls) == min(step + 1, 4) + 1  # one step is queued before the look; another call finds the layer

    def test_half_precision_that_overflows_says_what_to_use(self, tiny_pipeline):
        pipe = tiny_pipeline(weight_format="packed").to(dtype=torch.float16)
        pipe.transformer.proj_in.bias.data.fill_(60000.0)
        pipe.transformer.proj_in.weight.data.fill_(60000.0)
        with pytest.raises(
            ValueError, match=r"layer proj_in gives NaN or infinity in float16\. Try bfloat16 or float32"
        ):
            pipe(3, num_inference_steps=2)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_latents(self, tiny_pipeline, value):
        pipe = tiny_pipeline()
        latents = torch.randn(1, 3, 8, 8)
        latents[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"Step 1 of 2 .* starts from latents with NaN or infinity"):
            pipe(3, num_inference_steps=2, latents=latents)

    def test_a_callbacks_latents(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r"Step 2 of 3 .* starts from latents with NaN"):
            tiny_pipeline()(
                3, num_inference_steps=3,
                callback_on_step_end=lambda pipe, i, t, kwargs: {"latents": kwargs["latents"] * float("nan")},
            )  # fmt: skip

    def test_a_vae(self, tiny_pipeline):
        pipe = tiny_pipeline(vae=True)
        pipe.vae.post_quant_conv.bias.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="The VAE in float32 gives NaN or infinity"):
            pipe(3, num_inference_steps=2)

    def test_no_hook_stays(self, tiny_pipeline):
        pipe = tiny_pipeline()
        bias = pipe.transformer.proj_out.bias.data
        kept = bias.clone()
        expected = pipe(3, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="layer proj_out"):
            pipe(3, num_inference_steps=2)
        assert not any(module._forward_hooks for module in pipe.transformer.modules())
        bias.copy_(kept)
        again = pipe(3, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        assert torch.equal(again, expected)
