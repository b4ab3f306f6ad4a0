"""The activations of ``deq/activations.py`` as Triton functions of a block, in float32 or float64.

``value(x, NUMBER)`` is ``act(x)`` and ``derivative(x, NUMBER)`` is ``act'(x)``; NUMBER is a compile-time constant, so
that a kernel contains the one branch it uses. Triton has neither expm1, log1p nor tanh: the first two are Kahan's
identities on exp and log, whose rounding errors cancel, and every exponential is of a non-positive number, so that
nothing overflows.
"""

import math

import triton
import triton.language as tl
from deq.activations import ACTIVATIONS, INV_SQRT_2PI, LEAKY_SLOPE

IDENTITY = tl.constexpr(ACTIVATIONS["identity"].number)
RELU = tl.constexpr(ACTIVATIONS["relu"].number)
LEAKY_RELU = tl.constexpr(ACTIVATIONS["leaky_relu"].number)
ELU = tl.constexpr(ACTIVATIONS["elu"].number)
GELU = tl.constexpr(ACTIVATIONS["gelu"].number)
SILU = tl.constexpr(ACTIVATIONS["silu"].number)
TANH = tl.constexpr(ACTIVATIONS["tanh"].number)
SIGMOID = tl.constexpr(ACTIVATIONS["sigmoid"].number)
SOFTPLUS = tl.constexpr(ACTIVATIONS["softplus"].number)

_LEAKY_SLOPE = tl.constexpr(LEAKY_SLOPE)
_INV_SQRT_2PI = tl.constexpr(INV_SQRT_2PI)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def value(x, NUMBER: tl.constexpr):
    """``act(x)``, elementwise."""
    if NUMBER == IDENTITY:
        y = x
    elif NUMBER == RELU:
        y = tl.where(x <= 0, 0.0, x)  # NaN stays NaN, as in torch
    elif NUMBER == LEAKY_RELU:
        y = tl.where(x > 0, x, x * _LEAKY_SLOPE)
    elif NUMBER == ELU:
        y = tl.where(x < 0, _expm1(tl.minimum(x, 0.0)), x)
    elif NUMBER == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif NUMBER == SILU:
        y = x * _sigmoid(x)
    elif NUMBER == TANH:
        t = _expm1(-2.0 * tl.abs(x))
        t = t / (2.0 + t)  # -tanh|x|
        y = tl.where(x < 0, t, -t)
    elif NUMBER == SIGMOID:
        y = _sigmoid(x)
    else:
        tl.static_assert(NUMBER == SOFTPLUS, "no such activation")
        y = tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))
    return y


@triton.jit
def derivative(x, NUMBER: tl.constexpr):
    """``act'(x)``, elementwise; 0 (leaky_relu: its slope) at the kink of the piecewise linear ones, as torch has it."""
    ones = tl.full(x.shape, 1.0, x.dtype)
    if NUMBER == IDENTITY:
        y = ones
    elif NUMBER == RELU:
        y = tl.where(x > 0, ones, 0.0)
    elif NUMBER == LEAKY_RELU:
        y = tl.where(x > 0, ones, ones * _LEAKY_SLOPE)
    elif NUMBER == ELU:
        y = tl.exp(tl.minimum(x, 0.0))
    elif NUMBER == GELU:
        y = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    elif NUMBER == SILU:
        y = _sigmoid(x) * (1.0 + x * _sigmoid(-x))
    elif NUMBER == TANH:
        t = tl.exp(-2.0 * tl.abs(x))
        y = 4.0 * t / ((1.0 + t) * (1.0 + t))
    elif NUMBER == SIGMOID:
        y = _sigmoid(x) * _sigmoid(-x)
    else:
        tl.static_assert(NUMBER == SOFTPLUS, "no such activation")
        y = _sigmoid(x)
    return y


@triton.jit
def _sigmoid(x):
    t = tl.exp(-tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` for x <= 0 (Kahan; Higham, Accuracy and Stability of Numerical Algorithms, 1.14.1)."""
    u = tl.exp(x)
    low = u - 1.0
    lost = (u == 1.0) | (low == -1.0)  # x is below half an ulp of 1, or exp(x) is
    y = low * (x / tl.log(tl.where(lost, 0.5, u)))
    return tl.where(lost, tl.maximum(x, -1.0), y)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for 0 <= x <= 1 (the same identity)."""
    u = 1.0 + x
    lost = u == 1.0
    y = tl.log(u) * (x / tl.where(lost, 1.0, u - 1.0))
    return tl.where(lost, x, y)
