"""Ternary arithmetic, the layer, the losses."""

import numpy as np
import torch
from diffusers import DDPMScheduler
from message_table import Fixed, Row

from diffusers_terdit import TernaryLinear, losses, pack_ternary, ternarize, unpack_ternary
from diffusers_terdit.ops import float_linear, integer_linear, linear, reference, ternary_linear
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.ops.gpu.choose import kernels
from diffusers_terdit.pipelines.schedulers import default_scheduler


ones = torch.ones
CODES = torch.zeros(2, 8, dtype=torch.uint8)  # of an (8, 8) matrix
X, T = ones(2, 4, 8, 8), torch.tensor([1, 2])
ALPHAS = default_scheduler().alphas_cumprod


def no_numba(w):
    w.monkeypatch.setattr(choose, "integer_kernels", dict)
    w.monkeypatch.setattr(choose, "has_numba", lambda: False)
    TernaryLinear(8, 8, weight_format="packed").set_activation_bits(16)


def first_call_in_a_capture(w):
    w.monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernels(torch.device("cuda", 7))


def trained_with_8_bits(w):
    TernaryLinear(8, 8, activation_bits=8).set_activation_bits(16)


def nan_weight(w):
    layer = TernaryLinear(8, 8)
    layer.weight.data[0, 0] = float("nan")
    layer.pack()


# fmt: off
ROWS = [
    # ops
    Row(lambda w: ternary_linear(ones(2, 8), CODES[0], ones(1)), "(8,)", "must be a matrix"),
    Row(lambda w: ternary_linear(ones(2, 7), CODES, ones(1)), "(2, 7), torch.float32",
        "8 features in its last dimension"),
    Row(lambda w: ternary_linear(ones(2, 8), CODES, ones(3)), "(3,)",
        "must be floating point of shape (1,), (8, 1) or (8, 8 / group)"),
    Row(lambda w: ternary_linear(ones(2, 8), CODES, ones(1), ones(5)), "(5,)", "must be floating point of shape (8,)"),
    Row(lambda w: ternary_linear(ones(2, 8), ones(8, 8), ones(1)), "torch.float32", "must be uint8", "`pack_ternary`"),
    Row(lambda w: float_linear(ones(2, 8), CODES, ones(1)), "torch.uint8", "must be floating point",
        "`ternary_linear` takes packed codes"),
    Row(lambda w: integer_linear(ones(2, 8), ones(8, 8), ones(1)), "torch.float32", "must be uint8", "`pack_ternary`"),
    Row(lambda w: linear(ones(2, 8), CODES, ones(1), requested_bits=4), "got 4",
        '`requested_bits` must be None, 8, 16, "fp8" or "auto"'),
    Row(lambda w: integer_linear(ones(2, 8), CODES, ones(1), bits=4), "bits=4",
        "need 8 bits, or 16 and at most 65,536 inputs"),
    Row(lambda w: ternarize(ones(4, 8), "column"), "'column'", 'must be "tensor", "row" or a positive int'),
    Row(lambda w: ternarize(ones(4, 8), 3), "groups of 3", "must be a multiple of the scale group"),
    Row(lambda w: ternarize(ones(3)), "(3,), torch.float32", "takes a non-empty floating-point matrix"),
    Row(lambda w: ternarize(None), "NoneType", "takes a non-empty floating-point matrix"),
    Row(lambda w: ternarize(np.ones((4, 4))), "ndarray", "takes a non-empty floating-point matrix"),
    Row(lambda w: pack_ternary(ones(6, 8)), "(6, 8)", "multiple of 4",
        "Keep this layer in float format, or pad its outputs."),
    Row(lambda w: pack_ternary(None), "NoneType", "needs a matrix"),
    Row(lambda w: pack_ternary(torch.full((4, 4), 0.25)), "0.25", "takes values in {-1, 0, +1}",
        "call `ternarize` on the weight first"),
    Row(lambda w: pack_ternary(torch.full((4, 4), float("nan"))), "got nan", "takes values in {-1, 0, +1}",
        "call `ternarize` on the weight first"),
    Row(lambda w: pack_ternary(ones(4, 4, dtype=torch.complex64)), "torch.complex64", "takes values in {-1, 0, +1}",
        "call `ternarize` on the weight first"),
    Row(lambda w: unpack_ternary(ones(4, 4)), "torch.float32", "takes a uint8 matrix (out_features / 4, in_features)"),
    Row(lambda w: unpack_ternary("weights"), "got str", "takes a uint8 matrix (out_features / 4, in_features)"),
    Row(lambda w: reference.quantize_activations(ones(2, 8), 5), "got 5", "`bits` must be 8 or 16"),

    # the layer
    Row(lambda w: TernaryLinear(8, 8, activation_bits=4), "got 4", "`activation_bits` must be None or 8"),
    Row(lambda w: TernaryLinear(8, 8, weight_format="int8"), "'int8'", '`weight_format` must be "float" or "packed"'),
    Row(lambda w: TernaryLinear(0, 8), "in_features=0", "needs at least one input and output, as ints"),
    Row(lambda w: TernaryLinear(8, None), "out_features=None", "needs at least one input and output, as ints"),
    Row(lambda w: TernaryLinear("8", 8), "in_features='8'", "needs at least one input and output, as ints"),
    Row(lambda w: TernaryLinear(8.0, 8), "in_features=8.0", "needs at least one input and output, as ints"),
    Row(lambda w: TernaryLinear(8, 8).set_activation_bits("8"), "got '8'",
        '`bits` must be None, 8, 16, "fp8" or "auto"'),
    Row(trained_with_8_bits, "got 16", "was trained with 8-bit inputs", 'pass 8 or "auto"'),
    Row(first_call_in_a_capture, "cuda:7", "cannot run inside the capture", "Call the model once", error=RuntimeError),
    Row(no_numba, "16 bits", "need numba", "pip install numba", error=ImportError),
    Row(lambda w: TernaryLinear(8, 6, weight_format="packed"), "got 6", "to be a multiple of 4",
        "Keep this layer in float format, or pad its outputs."),
    Row(nan_weight, Fixed("NaN or infinity"), "round to none of {-1, 0, +1}",
        "Take one from before training diverged."),
    Row(lambda w: TernaryLinear(8, 8)(ones(2, 8, dtype=torch.int64)), "torch.int64",
        "must be floating point with 8 features"),

    # losses
    Row(lambda w: losses.mean_squared_error(X, X[:1]), "`target` (1, 4, 8, 8)",
        "Expected tensors of one shape (B, C, ...)"),
    Row(lambda w: losses.mean_squared_error(None, X), "`prediction` ()", "Expected tensors of one shape (B, C, ...)"),
    Row(lambda w: losses.variational_bound(X, X, X, T, ALPHAS), "got (2, 4, 8, 8)",
        "must hold predicted noise and variance, shape (2, 8, 8, 8)",
        "A model without `learn_sigma` has no variational bound to train."),
    Row(lambda w: losses.min_snr_weight(T, ALPHAS, float("nan")), "got nan", "`gamma` must be positive"),
    Row(lambda w: losses.flow_matching_inputs(X, X, T), "torch.int64", "`sigmas` must be (2,) float"),
    Row(lambda w: losses.training_target(DDPMScheduler(prediction_type="sample"), X, X, T), "'sample'",
        "the losses of this module are for noise", 'Pass one with prediction_type="epsilon"'),
    Row(lambda w: losses.diffusion_loss(X, X, X, T.float(), ALPHAS, 5.0), "torch.float32",
        "`timesteps` must be (2,) int32 or int64"),
    Row(lambda w: losses.diffusion_loss(X, X, X, T, ALPHAS[:1], 5.0), "(1,) torch.float32",
        "must be a float table of at least two timesteps"),
]
