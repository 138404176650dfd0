"""Ternary arithmetic, the layer, the losses."""

import numpy as np
import torch
from diffusers import DDPMScheduler
from message_table import REASON, Fixed, Row

from diffusers_terdit import TernaryLinear, losses, pack_ternary, ternarize, unpack_ternary
from diffusers_terdit.ops import float_linear, integer_linear, linear, reference, ternary_linear
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.pipelines.schedulers import default_scheduler


ones = torch.ones
CODES = torch.zeros(2, 8, dtype=torch.uint8)  # of an (8, 8) matrix
X, T = ones(2, 4, 8, 8), torch.tensor([1, 2])
ALPHAS = default_scheduler().alphas_cumprod


def no_numba(w):
    w.monkeypatch.setattr(choose, "integer_kernels", dict)
    w.monkeypatch.setattr(choose, "find_spec", lambda name: None)
    TernaryLinear(8, 8, weight_format="packed").set_activation_bits(16)


def trained_with_8_bits(w):
    TernaryLinear(8, 8, activation_bits=8).set_activation_bits(16)


def nan_weight(w):
    layer = TernaryLinear(8, 8)
    layer.weight.data[0, 0] = float("nan")
    layer.pack()


# fmt: off
ROWS = [
    # ops
    Row("op-vector", lambda w: ternary_linear(ones(2, 8), CODES[0], ones(1)), ValueError,
        "(8,)", "must be a matrix", REASON),
    Row("op-input", lambda w: ternary_linear(ones(2, 7), CODES, ones(1)), ValueError,
        "(2, 7), torch.float32", "8 features in its last dimension", REASON),
    Row("op-scale", lambda w: ternary_linear(ones(2, 8), CODES, ones(3)), ValueError,
        "(3,)", "must be floating point of shape (1,), (8, 1) or (8, 8 / group)", REASON),
    Row("op-bias", lambda w: ternary_linear(ones(2, 8), CODES, ones(1), ones(5)), ValueError,
        "(5,)", "must be floating point of shape (8,)", REASON),
    Row("op-float-codes", lambda w: ternary_linear(ones(2, 8), ones(8, 8), ones(1)), ValueError,
        "torch.float32", "must be uint8", "`pack_ternary`"),
    Row("op-codes-as-floats", lambda w: float_linear(ones(2, 8), CODES, ones(1)), ValueError,
        "torch.uint8", "must be floating point", "`ternary_linear` takes packed codes"),
    Row("op-integer-float-codes", lambda w: integer_linear(ones(2, 8), ones(8, 8), ones(1)), ValueError,
        "torch.float32", "must be uint8", "`pack_ternary`"),
    Row("op-requested-bits", lambda w: linear(ones(2, 8), CODES, ones(1), requested_bits=4), ValueError,
        "got 4", '`requested_bits` must be None, 8, 16 or "auto"', REASON),
    Row("op-integer-bits", lambda w: integer_linear(ones(2, 8), CODES, ones(1), bits=4), ValueError,
        "bits=4", "need 8 bits, or 16 and at most 65,536 inputs", REASON),
    Row("ternarize-granularity", lambda w: ternarize(ones(4, 8), "column"), ValueError,
        "'column'", 'must be "tensor", "row" or a positive int', REASON),
    Row("ternarize-group", lambda w: ternarize(ones(4, 8), 3), ValueError,
        "groups of 3", "must be a multiple of the scale group", REASON),
    Row("ternarize-vector", lambda w: ternarize(ones(3)), ValueError,
        "(3,), torch.float32", "takes a non-empty floating-point matrix", REASON),
    Row("ternarize-none", lambda w: ternarize(None), ValueError,
        "NoneType", "takes a non-empty floating-point matrix", REASON),
    Row("ternarize-array", lambda w: ternarize(np.ones((4, 4))), ValueError,
        "ndarray", "takes a non-empty floating-point matrix", REASON),
    Row("pack-rows", lambda w: pack_ternary(ones(6, 8)), ValueError,
        "(6, 8)", "multiple of 4", "Keep this layer in float format, or pad its outputs."),
    Row("pack-none", lambda w: pack_ternary(None), ValueError,
        "NoneType", "needs a matrix", REASON),
    Row("pack-values", lambda w: pack_ternary(torch.full((4, 4), 0.25)), ValueError,
        "0.25", "takes values in {-1, 0, +1}", "call `ternarize` on the weight first"),
    Row("pack-nan", lambda w: pack_ternary(torch.full((4, 4), float("nan"))), ValueError,
        "got nan", "takes values in {-1, 0, +1}", "call `ternarize` on the weight first"),
    Row("pack-complex", lambda w: pack_ternary(ones(4, 4, dtype=torch.complex64)), ValueError,
        "torch.complex64", "takes values in {-1, 0, +1}", "call `ternarize` on the weight first"),
    Row("unpack-floats", lambda w: unpack_ternary(ones(4, 4)), ValueError,
        "torch.float32", "takes a uint8 matrix (out_features / 4, in_features)", REASON),
    Row("unpack-string", lambda w: unpack_ternary("weights"), ValueError,
        "got str", "takes a uint8 matrix (out_features / 4, in_features)", REASON),
    Row("quantize-bits", lambda w: reference.quantize_activations(ones(2, 8), 5), ValueError,
        "got 5", "`bits` must be 8 or 16", REASON),

    # the layer
    Row("layer-activation-bits", lambda w: TernaryLinear(8, 8, activation_bits=4), ValueError,
        "got 4", "`activation_bits` must be None or 8", REASON),
    Row("layer-format", lambda w: TernaryLinear(8, 8, weight_format="int8"), ValueError,
        "'int8'", '`weight_format` must be "float" or "packed"', REASON),
    Row("layer-sizes", lambda w: TernaryLinear(0, 8), ValueError,
        "in_features=0", "needs at least one input and output, as ints", REASON),
    Row("layer-size-none", lambda w: TernaryLinear(8, None), ValueError,
        "out_features=None", "needs at least one input and output, as ints", REASON),
    Row("layer-size-string", lambda w: TernaryLinear("8", 8), ValueError,
        "in_features='8'", "needs at least one input and output, as ints", REASON),
    Row("layer-size-float", lambda w: TernaryLinear(8.0, 8), ValueError,
        "in_features=8.0", "needs at least one input and output, as ints", REASON),
    Row("layer-bits", lambda w: TernaryLinear(8, 8).set_activation_bits("8"), ValueError,
        "got '8'", '`bits` must be None, 8, 16 or "auto"', REASON),
    Row("layer-trained-bits", trained_with_8_bits, ValueError,
        "got 16", "was trained with 8-bit inputs", 'pass 8 or "auto"'),
    Row("layer-numba", no_numba, ImportError,
        "16 bits", "need numba", "pip install 'diffusers-terdit[cpu]'"),
    Row("layer-outputs", lambda w: TernaryLinear(8, 6, weight_format="packed"), ValueError,
        "got 6", "to be a multiple of 4", "Keep this layer in float format, or pad its outputs."),
    Row("layer-nan", nan_weight, ValueError,
        Fixed("NaN or infinity"), "round to none of {-1, 0, +1}", "Take one from before training diverged."),
    Row("layer-input", lambda w: TernaryLinear(8, 8)(ones(2, 8, dtype=torch.int64)), ValueError,
        "torch.int64", "must be floating point with 8 features", REASON),

    # losses
    Row("loss-shapes", lambda w: losses.mean_squared_error(X, X[:1]), ValueError,
        "`target` (1, 4, 8, 8)", "Expected tensors of one shape (B, C, ...)", REASON),
    Row("loss-none", lambda w: losses.mean_squared_error(None, X), ValueError,
        "`prediction` ()", "Expected tensors of one shape (B, C, ...)", REASON),
    Row("loss-variance", lambda w: losses.variational_bound(X, X, X, T, ALPHAS), ValueError,
        "got (2, 4, 8, 8)", "must hold predicted noise and variance, shape (2, 8, 8, 8)",
        "A model without `learn_sigma` has no variational bound to train."),
    Row("loss-gamma", lambda w: losses.min_snr_weight(T, ALPHAS, float("nan")), ValueError,
        "got nan", "`gamma` must be positive", REASON),
    Row("loss-sigmas", lambda w: losses.flow_matching_inputs(X, X, T), ValueError,
        "torch.int64", "`sigmas` must be (2,) float", REASON),
    Row("loss-prediction", lambda w: losses.training_target(DDPMScheduler(prediction_type="sample"), X, X, T),
        ValueError, "'sample'", "the losses of this module are for noise", 'Pass one with prediction_type="epsilon"'),
    Row("loss-timesteps", lambda w: losses.diffusion_loss(X, X, X, T.float(), ALPHAS, 5.0), ValueError,
        "torch.float32", "`timesteps` must be (2,) int32 or int64", REASON),
    Row("loss-alphas", lambda w: losses.diffusion_loss(X, X, X, T, ALPHAS[:1], 5.0), ValueError,
        "(1,) torch.float32", "must be a float table of at least two timesteps", REASON),
]
