"""The loss terms against the equations of their papers, written out on scalars in float64, and against diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from diffusers_terdit import losses


BETA = np.linspace(0.0001, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETA)
ALPHAS_CUMPROD = torch.from_numpy(ALPHA_BAR)
EDGES = [0, 1, 2, 500, 998, 999]


def posterior(t, x_0, x_t):
    """Mean and variance of q(x_{t-1} | x_t, x_0): eq. 7 of DDPM."""
    before = ALPHA_BAR[t - 1] if t > 0 else 1.0
    mean = math.sqrt(before) * BETA[t] / (1 - ALPHA_BAR[t]) * x_0
    mean += math.sqrt(1 - BETA[t]) * (1 - before) / (1 - ALPHA_BAR[t]) * x_t
    return mean, (1 - before) / (1 - ALPHA_BAR[t]) * BETA[t]


def model_variance(t, v):
    """Eq. 15 of Nichol & Dhariwal with v in [-1, 1] instead of [0, 1]."""
    lower = posterior(max(t, 1), 0.0, 0.0)[1]
    return BETA[t] ** ((1 + v) / 2) * lower ** ((1 - v) / 2)


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    return 0.5 * (math.log(var_p / var_q) + (var_q + (mean_q - mean_p) ** 2) / var_p - 1)


def bin_probability(x_0, mean, variance):
    """Eq. 13 of DDPM."""

    def cdf(x):
        return 0.5 * math.erfc((mean - x) / math.sqrt(2 * variance))

    return (1.0 if x_0 > 0.999 else cdf(x_0 + 1 / 255)) - (0.0 if x_0 < -0.999 else cdf(x_0 - 1 / 255))


def bound(t, x_0, noise, noise_pred, v):
    """Bits of one value of one sample."""
    x_t = math.sqrt(ALPHA_BAR[t]) * x_0 + math.sqrt(1 - ALPHA_BAR[t]) * noise
    x_0_pred = (x_t - math.sqrt(1 - ALPHA_BAR[t]) * noise_pred) / math.sqrt(ALPHA_BAR[t])
    mean_p, variance_p = posterior(t, x_0_pred, x_t)[0], model_variance(t, v)
    if t == 0:
        return -math.log2(bin_probability(x_0, mean_p, variance_p))
    return gaussian_kl(*posterior(t, x_0, x_t), mean_p, variance_p) / math.log(2)


def make_batch(timesteps, channels=2, size=(3, 5), error=1.0, seed=0):
    """8-bit data with both ends of the range in it, noise, a model output and timesteps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(timesteps), channels, *size)
    samples = torch.randint(0, 256, shape, generator=generator) / 127.5 - 1
    samples[:, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    noise = torch.randn(shape, generator=generator)
    noise_pred = noise + error * torch.randn(shape, generator=generator)
    v = 2 * torch.rand(shape, generator=generator) - 1
    return torch.cat([noise_pred, v], dim=1), samples, noise, torch.tensor(timesteps)


def reference_bound(model_output, samples, noise, timesteps):
    noise_pred, v = model_output.chunk(2, dim=1)
    rows = zip(timesteps.tolist(), samples, noise, noise_pred, v, strict=True)
    return torch.tensor(
        [
            np.mean([bound(t, *values) for values in zip(*(row.flatten().tolist() for row in tensors), strict=True)])
            for t, *tensors in rows
        ]
    )


def test_formulas_agree_with_numerical_integration():
    # The equations above are the reference of this file, so they are checked too: KL and bins as plain integrals.
    mean_q, var_q, mean_p, var_p = 0.3, 0.5, -0.2, 0.8
    x = np.linspace(-12, 12, 200_001)

    def log_density(mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))

    log_q, log_p = log_density(mean_q, var_q), log_density(mean_p, var_p)
    kl = np.sum(np.exp(log_q) * (log_q - log_p)) * (x[1] - x[0])
    assert gaussian_kl(mean_q, var_q, mean_p, var_p) == pytest.approx(kl, rel=1e-6)
    inside = np.abs(x - 0.6) < 1 / 255
    mass = np.sum(np.exp(log_p[inside])) * (x[1] - x[0])
    assert bin_probability(0.6, mean_p, var_p) == pytest.approx(mass, rel=2e-2)


@pytest.mark.parametrize("error", [0.0, 0.2, 1.0, 2.5])
def test_variational_bound_matches_the_equations(error):
    batch = make_batch([*EDGES, *range(3, 999, 83)], error=error)
    actual = losses.variational_bound(*batch, ALPHAS_CUMPROD)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), reference_bound(*batch), rtol=2e-5, atol=2e-7)


def test_table_of_a_scheduler_is_precise_enough():
    # It is float32: the difference of its neighbors, beta, has 3 to 4 digits at the low end.
    batch = make_batch(list(range(0, 1000, 9)))
    actual = losses.variational_bound(*batch, DDPMScheduler().alphas_cumprod)
    torch.testing.assert_close(actual, losses.variational_bound(*batch, ALPHAS_CUMPROD), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0, 8.0])
@pytest.mark.parametrize("mean", [-1.0, -0.31, 0.0, 0.998, 1.4])
def test_probabilities_of_the_256_values_sum_to_one(mean, v):
    samples = (torch.arange(256) / 127.5 - 1).view(256, 1, 1)
    noise = torch.zeros(256, 1, 1)
    noise_pred = (samples - mean) * math.sqrt(ALPHA_BAR[0] / (1 - ALPHA_BAR[0]))  # so that p's mean is `mean`
    output = torch.cat([noise_pred, torch.full_like(noise, v)], dim=1)
    bits = losses.variational_bound(output, samples, noise, torch.zeros(256, dtype=torch.long), ALPHAS_CUMPROD)
    assert torch.exp2(-bits.double()).sum().item() == pytest.approx(1, abs=1e-5)


def test_latents_outside_the_data_range_fall_into_the_outer_bins():
    timesteps = torch.zeros(4, dtype=torch.long)
    samples = torch.tensor([-3.0, -1.2, 1.2, 3.0]).view(4, 1, 1)
    batch = torch.zeros(4, 2, 1), samples, torch.full_like(samples, 0.5), timesteps
    torch.testing.assert_close(
        losses.variational_bound(*batch, ALPHAS_CUMPROD).double(), reference_bound(*batch), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("error", [3.0, 5.0, 8.0])
def test_bins_far_from_the_mean_keep_their_digits(error):
    # 4, 7 and 11 standard deviations away, on both sides; the reference keeps its digits on the one below.
    samples, noise, v = torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), torch.full((2, 1, 1), -1.0)
    output = torch.cat([torch.tensor([-error, error]).view(2, 1, 1), v], dim=1)
    bits = losses.variational_bound(output, samples, noise, torch.tensor([0, 0]), ALPHAS_CUMPROD).tolist()
    assert bits[0] == bits[1] == pytest.approx(bound(0, 0.0, 0.0, -error, -1.0), rel=1e-5)


def test_only_the_variance_learns_from_the_bound():
    model_output, *batch = make_batch(EDGES)
    model_output.requires_grad_()
    losses.variational_bound(model_output, *batch, ALPHAS_CUMPROD).sum().backward()
    noise_grad, variance_grad = model_output.grad.chunk(2, dim=1)
    assert torch.equal(noise_grad, torch.zeros_like(noise_grad))
    assert (variance_grad.flatten(1).abs().sum(1) > 0).all()


def test_noise_learns_from_the_squared_error_alone():
    model_output, samples, noise, timesteps = make_batch(EDGES)
    model_output.requires_grad_()
    losses.diffusion_loss(model_output, samples, noise, timesteps, ALPHAS_CUMPROD).sum().backward()
    expected = 2 * (model_output.detach()[:, :2] - noise) / noise[0].numel()
    torch.testing.assert_close(model_output.grad[:, :2], expected)


def test_variance_gradient_is_the_slope_of_the_equations():
    model_output, *batch = make_batch([0, 1, 2, 500], channels=1, size=(2, 3))
    model_output.requires_grad_()
    losses.variational_bound(model_output, *batch, ALPHAS_CUMPROD).sum().backward()
    step = torch.zeros_like(model_output, dtype=torch.float64)
    for index in np.ndindex(4, 2, 3):
        where = (index[0], 1, *index[1:])
        step[where] = 1e-5
        output = model_output.detach().double()
        slope = (reference_bound(output + step, *batch) - reference_bound(output - step, *batch)).sum() / 2e-5
        step[where] = 0
        assert model_output.grad[where].item() == pytest.approx(slope.item(), rel=2e-4, abs=1e-8)


@pytest.mark.parametrize("v", [-60.0, -1.0, 60.0])
@pytest.mark.parametrize("error", [0.0, 30.0, 3000.0])
def test_loss_and_gradient_stay_finite(error, v):
    model_output, samples, noise, timesteps = make_batch(EDGES, error=error)
    model_output[:, 2:] = v
    model_output.requires_grad_()
    loss = losses.diffusion_loss(model_output, samples, noise, timesteps, ALPHAS_CUMPROD)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(model_output.grad).all()


def test_samples_of_a_batch_do_not_mix():
    batch = make_batch([*EDGES, 0, 7])
    alone = [losses.diffusion_loss(*(x[i : i + 1] for x in batch), ALPHAS_CUMPROD) for i in range(8)]
    torch.testing.assert_close(losses.diffusion_loss(*batch, ALPHAS_CUMPROD), torch.cat(alone), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_arithmetic_is_float32_whatever_the_inputs(dtype):
    model_output, samples, noise, timesteps = make_batch(EDGES)
    low = [x.to(dtype) for x in (model_output, samples, noise)]
    expected = losses.diffusion_loss(*(x.float() for x in low), timesteps, ALPHAS_CUMPROD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = losses.diffusion_loss(*low, timesteps.int(), ALPHAS_CUMPROD)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("t", [1, 2, 10, 300, 999])
@pytest.mark.parametrize("v", [-1.0, -0.3, 1.0])
def test_scheduler_samples_from_the_gaussian_that_the_bound_scores(t, v):
    # The mean and standard deviation of scheduler.step, by a straight line through its samples over its own noise.
    scheduler = DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)
    x_0, noise, noise_pred, shape = 0.25, -0.8, 0.6, (1, 1, 64, 64)
    samples, added = torch.full(shape, x_0), torch.full(shape, noise)
    noisy = scheduler.add_noise(samples, added, torch.tensor([t]))
    output = torch.cat([torch.full(shape, noise_pred), torch.full(shape, v)], dim=1)
    previous = scheduler.step(output, t, noisy, generator=torch.Generator().manual_seed(0)).prev_sample
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    std, mean = np.polyfit(drawn.double().flatten(), previous.double().flatten(), 1)
    expected = gaussian_kl(*posterior(t, x_0, noisy.double().mean().item()), mean, std**2) / math.log(2)
    actual = losses.variational_bound(output, samples, added, torch.tensor([t]), scheduler.alphas_cumprod)
    # The tolerance is the scheduler's: its float32 table gives beta to about 3 digits where it is small.
    assert actual.item() == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_scheduler_ends_at_the_mean_that_the_bound_scores():
    # At t = 0 the scheduler adds no noise; the bound puts its Gaussian around the same mean.
    scheduler = DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)
    output, samples, noise, timesteps = make_batch([0], channels=1, size=(1, 3))
    noisy = scheduler.add_noise(samples, noise, timesteps)
    mean = scheduler.step(output, 0, noisy).prev_sample.flatten().tolist()
    v = output[0, 1].flatten().tolist()
    bits = [
        -math.log2(bin_probability(x, m, model_variance(0, v)))
        for x, m, v in zip(samples.flatten().tolist(), mean, v, strict=True)
    ]
    actual = losses.variational_bound(output, samples, noise, timesteps, scheduler.alphas_cumprod)
    assert actual.item() == pytest.approx(np.mean(bits), rel=1e-3)


def test_diffusion_loss_is_the_sum_of_its_terms():
    output, samples, noise, timesteps = make_batch(EDGES)
    mse = losses.mean_squared_error(output[:, :2], noise)
    np.testing.assert_allclose(mse, ((output[:, :2] - noise).numpy() ** 2).mean((1, 2, 3)), rtol=1e-6)
    vb = losses.variational_bound(output, samples, noise, timesteps, ALPHAS_CUMPROD)
    assert torch.equal(losses.diffusion_loss(output, samples, noise, timesteps, ALPHAS_CUMPROD), mse + vb)
    weight = losses.min_snr_weight(timesteps, ALPHAS_CUMPROD, 2.0)
    weighted = losses.diffusion_loss(output, samples, noise, timesteps, ALPHAS_CUMPROD, snr_gamma=2.0)
    assert torch.equal(weighted, weight * mse + vb)
    assert torch.equal(losses.diffusion_loss(output[:, :2], samples, noise, timesteps, ALPHAS_CUMPROD), mse)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_matches_the_paper(gamma):
    scheduler, timesteps = DDPMScheduler(beta_schedule="linear"), torch.arange(1000)
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    weight = losses.min_snr_weight(timesteps, ALPHAS_CUMPROD, gamma)
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight, np.minimum(snr, gamma) / snr, rtol=1e-6)
    snr = compute_snr(scheduler, timesteps)
    from_scheduler = losses.min_snr_weight(timesteps, scheduler.alphas_cumprod, gamma)
    torch.testing.assert_close(from_scheduler, snr.clamp(max=gamma) / snr, rtol=2e-3, atol=0)
    assert losses.min_snr_weight(torch.tensor([1]), torch.tensor([0.5, 0.0]), gamma).item() == 1  # of pure noise


@pytest.mark.parametrize("sigmas", [[0.0, 0.25, 1.0], [0.004, 0.5, 0.999]])
def test_flow_matching_path_is_the_schedulers(sigmas):
    _, samples, noise, _ = make_batch([0, 0, 0])
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sorted(sigmas, reverse=True))
    noisy, velocity, timestep = losses.flow_matching_inputs(samples, noise, scheduler.sigmas[:3])
    torch.testing.assert_close(timestep, scheduler.timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(samples, scheduler.timesteps, noise))
    torch.testing.assert_close(velocity, noise - samples)


def test_scheduler_returns_to_the_samples_along_the_velocity():
    _, samples, noise, _ = make_batch([0, 0])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    hidden_states, velocity, timestep = losses.flow_matching_inputs(samples, noise, torch.ones(2))
    assert torch.equal(hidden_states, noise)
    assert timestep[0] == scheduler.timesteps[0]
    for t in scheduler.timesteps:
        hidden_states = scheduler.step(velocity, t, hidden_states).prev_sample
    torch.testing.assert_close(hidden_states, samples, rtol=0, atol=1e-5)


def test_training_target_is_that_of_the_scheduler():
    _, samples, noise, timesteps = make_batch([3, 900])
    scheduler = DDPMScheduler()
    actual = losses.training_target(scheduler, samples, noise, timesteps)
    expected = (scheduler.add_noise(samples, noise, timesteps), noise, timesteps)
    assert all(torch.equal(value, other) for value, other in zip(actual, expected, strict=True))
    sigmas, scheduler = torch.tensor([0.1, 0.9]), FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    actual = losses.training_target(scheduler, samples, noise, sigmas)
    expected = losses.flow_matching_inputs(samples, noise, sigmas, 500)
    assert all(torch.equal(value, other) for value, other in zip(actual, expected, strict=True))


def test_flow_matching_computes_in_float32():
    _, samples, noise, _ = make_batch([0, 0])
    low = samples.bfloat16(), noise.bfloat16(), torch.tensor([0.1, 0.9], dtype=torch.float64)
    actual = losses.flow_matching_inputs(*low)
    for value, expected in zip(actual, losses.flow_matching_inputs(*(x.float() for x in low)), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


ARGUMENTS = ["model_output", "original_samples", "noise", "timesteps", "alphas_cumprod"]


def test_whatever_does_not_fit_is_a_value_error_that_names_it():
    """Each way to fail a check; the table of messages has one for each."""
    batch = dict(zip(ARGUMENTS, (*make_batch([3, 4], size=(4, 4)), ALPHAS_CUMPROD), strict=True))
    zeros, longs = torch.zeros, {"dtype": torch.long}
    for argument, values in {
        "model_output": (zeros(2, 3, 4, 4), zeros(2, 8, 4, 4), zeros(1, 4, 4, 4)),
        "original_samples": (zeros(2, 2, 4, 5),),
        "noise": (zeros(2, 1, 4, 4),),
        "timesteps": (zeros(1, **longs), zeros(2, 1, **longs), zeros((), **longs), zeros(2), zeros(2).byte()),
        "alphas_cumprod": (zeros(1), zeros(2, 1000), zeros(1000, **longs)),
    }.items():
        for value in values:
            for loss in (losses.variational_bound, losses.diffusion_loss):
                with pytest.raises(ValueError, match=rf"`{argument}`|one shape"):
                    loss(**batch | {argument: value})
    samples = zeros(2, 1, 4)
    with pytest.raises(ValueError, match="one shape"):
        losses.mean_squared_error(zeros(2), zeros(2))
    for sigmas in (zeros(3), zeros(2, **longs)):
        with pytest.raises(ValueError, match="sigmas"):
            losses.flow_matching_inputs(samples, samples, sigmas)
