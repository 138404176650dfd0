"""Loss terms that diffusers leaves to the trainer: learned variance, min-SNR weights, flow matching.

A model with `learn_sigma` returns two halves on its channel dimension, the noise and the variance values v, one per
latent value. Its loss (`diffusion_loss`) is `L_hybrid = L_simple + 0.001 L_vlb` of Nichol & Dhariwal, where L_vlb sums
one term per step. A timestep drawn uniformly out of T estimates that sum by T times its own term, and 0.001 T is 1 for
the 1000 steps of this family, so both terms are added as they are. That is what ADM and DiT compute. For another T
they still add the two, and so does this module; the factor T / 1000 belongs to their rescaled variant only.

Every function works in float32, under autocast too, and returns one value per sample: the trainer weights and
averages. `alphas_cumprod` is a scheduler's table, `DDPMScheduler.alphas_cumprod`, best kept on the samples' device.
"""

import math
from typing import Any

import torch
from torch import Tensor


# Half the distance of two 8-bit values in data scaled to [-1, 1].
HALF_BIN = 1 / 255


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, averaged over everything but the batch.

    Args:
        prediction (`torch.Tensor`): (B, C, ...), any float dtype.
        target (`torch.Tensor`): (B, C, ...), any float dtype.

    Returns:
        `torch.Tensor`: (B,), float32.

    Source: L_simple, eq. 14 of DDPM (https://arxiv.org/abs/2006.11239), where both are noise.
    Raises: ValueError if the shapes differ or have no channel dimension.
    """
    _check_samples(prediction=prediction, target=target)
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def variational_bound(
    model_output: Tensor, original_samples: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    r"""One term of the variational bound, to train the variance: the noise prediction gets no gradient from it.

    For t > 0 it is \(KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))\) of two Gaussians. The log-variance of p lies
    (v + 1) / 2 of the way from that of q to \(\log \beta_t\). At t = 0, where the variance of q is zero, that of t = 1
    stands in for it, and the term is the negative log-likelihood of \(x_0\) in bins of 8-bit data; a value beyond
    -0.999 or 0.999 owns all that is outside. VAE latents are no 8-bit data; DiT bins them so too. The normal
    distribution function is exact, where ADM and DiT approximate it by tanh.

    Args:
        model_output (`torch.Tensor`): (B, 2C, ...), predicted noise and v, any float dtype.
        original_samples (`torch.Tensor`): (B, C, ...), \(x_0\), images in [-1, 1] or scaled latents.
        noise (`torch.Tensor`): (B, C, ...), what `scheduler.add_noise` mixed into them, in float32.
        timesteps (`torch.Tensor`): (B,), int32 or int64 in [0, T).
        alphas_cumprod (`torch.Tensor`): (T,), float, falling, strictly between 0 and 1.

    Returns:
        `torch.Tensor`: (B,), float32, bits per dimension.

    Source: eq. 15 of https://arxiv.org/abs/2102.09672; eq. 7, 12 and 13 of https://arxiv.org/abs/2006.11239.
    Raises: ValueError for shapes that do not fit together or timesteps that are no integers.
    """
    _check_samples(original_samples=original_samples, noise=noise)
    batch, channels, *size = noise.shape
    if model_output.shape != (batch, 2 * channels, *size):
        raise ValueError(
            f"`model_output` must hold predicted noise and variance, shape {(batch, 2 * channels, *size)}, "
            f"got {tuple(model_output.shape)}. A model without `learn_sigma` has no variational bound to train."
        )
    _check_timesteps(timesteps, alphas_cumprod, batch)

    noise_pred, variance_values = model_output.float().chunk(2, dim=1)  # (B, C, ...) each
    min_log, log_range, error_scale = (
        table[timesteps.to(noise.device)].view(-1, *[1] * (noise.ndim - 1))  # (B, 1, ...)
        for table in _posterior_tables(alphas_cumprod, noise.device)
    )
    # x_t cancels in the difference of the two means, which leaves the noise's error (eq. 12). At t = 0 it is the
    # difference of x_0 and the mean of p.
    deviation = error_scale * (noise_pred.detach() - noise.float())
    fraction = (variance_values + 1) / 2
    log_ratio = -fraction * log_range  # of the variances of q and p
    log_variance = min_log - log_ratio
    kl = 0.5 * (torch.expm1(log_ratio) - log_ratio + deviation.square() * torch.exp(-log_variance))

    nll = _discretized_nll(original_samples.float(), deviation, log_variance)
    first = (timesteps.to(noise.device) == 0).view_as(min_log)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def min_snr_weight(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight of the noise error, min(SNR, gamma) / SNR: below 1 where there is little noise.

    Args:
        timesteps (`torch.Tensor`): (B,), int32 or int64 in [0, T).
        alphas_cumprod (`torch.Tensor`): (T,), float, falling, below 1.
        gamma (`float`): The signal-to-noise ratio from which on weights fall.

    Returns:
        `torch.Tensor`: (B,), float32 in (0, 1].

    Source: https://arxiv.org/abs/2303.09556, for noise prediction.
    Raises: ValueError if `gamma` is not positive, or for timesteps that are no integers.
    """
    if not gamma > 0:
        raise ValueError(f"`gamma` must be positive, got {gamma}.")
    _check_timesteps(timesteps, alphas_cumprod, timesteps.numel())
    signal = _float64(alphas_cumprod)
    weight = (gamma * (1 - signal) / signal).clamp(max=1)
    return weight.float().to(timesteps.device)[timesteps]


def diffusion_loss(
    model_output: Tensor,
    original_samples: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """Loss of a noise-predicting model: squared error, plus the variational bound if the model learns the variance.

    Args:
        model_output (`torch.Tensor`): (B, 2C, ...) with `learn_sigma`, (B, C, ...) without, any float dtype.
        original_samples (`torch.Tensor`): (B, C, ...), images in [-1, 1] or scaled latents.
        noise (`torch.Tensor`): (B, C, ...), what `scheduler.add_noise` added to them.
        timesteps (`torch.Tensor`): (B,), int32 or int64 in [0, T).
        alphas_cumprod (`torch.Tensor`): (T,), float.
        snr_gamma (`float`, *optional*): Weight the squared error, not the bound, by `min_snr_weight`.

    Returns:
        `torch.Tensor`: (B,), float32.

    Source: L_hybrid, eq. 16 of https://arxiv.org/abs/2102.09672; see the head of this module for its factor.
    Raises: ValueError for shapes that do not fit together or timesteps that are no integers.
    """
    _check_samples(original_samples=original_samples, noise=noise)
    loss = mean_squared_error(model_output[:, : noise.shape[1]], noise)
    if snr_gamma is not None:
        loss = loss * min_snr_weight(timesteps.to(noise.device), alphas_cumprod, snr_gamma)
    if model_output.shape == noise.shape:
        return loss
    return loss + variational_bound(model_output, original_samples, noise, timesteps, alphas_cumprod)


def flow_matching_inputs(
    original_samples: Tensor, noise: Tensor, sigmas: Tensor, num_train_timesteps: int = 1000
) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy samples, the velocity to predict for them, and their timesteps: rectified flow.

    The convention of `FlowMatchEulerDiscreteScheduler`: a straight path from the sample (sigma 0) to noise (sigma 1).
    The loss is `mean_squared_error(model_output, velocity)`.

    Args:
        original_samples (`torch.Tensor`): (B, C, ...), any float dtype.
        noise (`torch.Tensor`): (B, C, ...), standard normal.
        sigmas (`torch.Tensor`): (B,), float in [0, 1].
        num_train_timesteps (`int`): The scheduler's.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: noisy samples (B, C, ...), velocity (B, C, ...) and
        timestep (B,) in [0, num_train_timesteps], all float32.

    Source: https://arxiv.org/abs/2209.03003; https://arxiv.org/abs/2403.03206, section 3.
    Raises: ValueError for shapes that do not fit together or sigmas that are no floats.
    """
    _check_samples(original_samples=original_samples, noise=noise)
    if sigmas.shape != noise.shape[:1] or not sigmas.is_floating_point():
        raise ValueError(f"`sigmas` must be ({len(noise)},) float, got {tuple(sigmas.shape)} {sigmas.dtype}.")
    original_samples, noise, sigmas = original_samples.float(), noise.float(), sigmas.float()
    sigma = sigmas.view(-1, *[1] * (noise.ndim - 1))  # (B, 1, ...)
    return (1 - sigma) * original_samples + sigma * noise, noise - original_samples, sigmas * num_train_timesteps


def training_target(
    scheduler: Any, original_samples: Tensor, noise: Tensor, time: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy samples, the target of the prediction, and the timesteps to give to the model.

    A scheduler with `add_noise` is trained to predict the noise; one with `scale_noise`, of flow matching, to predict
    the velocity (`flow_matching_inputs`).

    Args:
        scheduler: Of diffusers, such as `DDPMScheduler` or `FlowMatchEulerDiscreteScheduler`.
        original_samples (`torch.Tensor`): (B, C, ...), images in [-1, 1] or scaled latents.
        noise (`torch.Tensor`): (B, C, ...), standard normal.
        time (`torch.Tensor`): (B,), timesteps, int in [0, T); for flow matching sigmas, float in [0, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: noisy samples (B, C, ...), target (B, C, ...), timesteps
        (B,).

    Raises: ValueError for a scheduler that predicts something else, or as `flow_matching_inputs`.
    """
    if hasattr(scheduler, "scale_noise"):
        return flow_matching_inputs(original_samples, noise, time, scheduler.config.num_train_timesteps)
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"`scheduler` predicts {scheduler.config.prediction_type!r}, and the losses of this module are for noise."
            ' Pass one with prediction_type="epsilon", or one for flow matching.'
        )
    return scheduler.add_noise(original_samples, noise, time), noise, time


def _posterior_tables(alphas_cumprod: Tensor, device: torch.device) -> Tensor:
    """Log-variance of q, its distance to log beta, and the mean's error per noise's error: (3, T), float32."""
    current = _float64(alphas_cumprod)
    previous = torch.cat([current.new_ones(1), current[:-1]])
    beta = (previous - current) / previous
    variance = beta * (1 - previous) / (1 - current)  # eq. 7; zero at t = 0
    variance = torch.cat([variance[1:2], variance[1:]])
    error_scale = beta / ((1 - beta) * (1 - current)).sqrt()
    return torch.stack([variance.log(), (beta / variance).log(), error_scale]).to(device, torch.float32)


def _float64(alphas_cumprod: Tensor) -> Tensor:
    # MPS has no float64.
    device = torch.device("cpu") if alphas_cumprod.device.type == "mps" else alphas_cumprod.device
    return alphas_cumprod.to(device=device, dtype=torch.float64)


def _discretized_nll(samples: Tensor, deviation: Tensor, log_variance: Tensor) -> Tensor:
    """Minus the log-probability, in nats, of the bin around each sample under N(samples - deviation, variance)."""
    inverse_std = torch.exp(-0.5 * log_variance)
    lower = torch.where(samples < -0.999, -torch.inf, (deviation - HALF_BIN) * inverse_std)
    upper = torch.where(samples > 0.999, torch.inf, (deviation + HALF_BIN) * inverse_std)
    # Bins below the mean are mirrored above it, where the difference of two small tails loses no digits.
    mirror = lower + upper < 0
    lower, upper = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
    probability = 0.5 * (torch.erfc(lower / math.sqrt(2)) - torch.erfc(upper / math.sqrt(2)))
    return -probability.clamp(min=torch.finfo(torch.float32).tiny).log()


def _check_samples(**samples: Tensor) -> None:
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in samples.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) < 2 for shape in shapes.values()):
        got = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items())
        raise ValueError(f"Expected tensors of one shape (B, C, ...), got {got}.")


def _check_timesteps(timesteps: Tensor, alphas_cumprod: Tensor, batch: int) -> None:
    if timesteps.shape != (batch,) or timesteps.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`timesteps` must be ({batch},) int32 or int64, got {tuple(timesteps.shape)} {timesteps.dtype}."
        )
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2 or not alphas_cumprod.is_floating_point():
        raise ValueError(
            "`alphas_cumprod` must be a float table of at least two timesteps, shape (T,), "
            f"got {tuple(alphas_cumprod.shape)} {alphas_cumprod.dtype}."
        )
