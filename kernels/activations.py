"""The activations of ``deq/activations.py`` as Triton functions of a block, in float32 or float64.

``value(x, NUMBER)`` is ``act(x)`` and ``derivative(x, NUMBER)`` is ``act'(x)``; NUMBER is a compile-time constant, so
that a kernel contains the one branch it uses. Triton has no expm1, log1p and tanh that its interpreter knows too, so
they are built here from exp and short series. Every exponential is of a non-positive number: nothing overflows.
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
        y = tl.where(x > 20.0, x, tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))))  # torch's threshold
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
    """``exp(x) - 1`` for x <= 0; where the difference would cancel, Taylor's series to the last bit of x's dtype."""
    TERMS: tl.constexpr = 7 if x.dtype == tl.float32 else 13
    y = tl.full(x.shape, 1.0, x.dtype)
    for n in tl.static_range(TERMS, 1, -1):
        y = 1.0 + x * (1.0 / n) * y
    return tl.where(x > -0.35, x * y, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """``log(1 + x) = 2 atanh(x / (2 + x))`` for 0 <= x <= 1; the series converges like 9^-n there."""
    TERMS: tl.constexpr = 7 if x.dtype == tl.float32 else 16
    s = x / (2.0 + x)
    y = tl.zeros(x.shape, x.dtype)
    for n in tl.static_range(TERMS, 0, -1):
        y = y * (s * s) + 1.0 / (2 * n - 1)
    return 2.0 * s * y
