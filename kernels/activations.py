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
_GELU_MOST = tl.constexpr(ACTIVATIONS["gelu"].lipschitz)
_SILU_MOST = tl.constexpr(ACTIVATIONS["silu"].lipschitz)
_SIGMOID_MOST = tl.constexpr(ACTIVATIONS["sigmoid"].lipschitz)
_INV_SQRT_2PI = tl.constexpr(INV_SQRT_2PI)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
# Chebyshev series on (a - 3.75) / (a + 3.75) of (1 + 2 a) exp(a^2) erfc(a), a >= 0; the same as in csrc/cpu/vec.h.
_ERFC = tl.constexpr(
    (
        1.1775789345674017541,
        -0.0045900545806464773309,
        -0.084249133366517915584,
        0.059209939998191890498,
        -0.026658668435305752277,
        0.0090749976707052650939,
        -0.0024131635404176081909,
        0.00049077583652580863229,
        -0.000069169733025012063671,
        4.1390279860730101675e-6,
        7.7403830661984906686e-7,
        -2.1886401049234395661e-7,
        1.0764999465670910377e-8,
        4.5219598112182868979e-9,
        -7.7544002088313511065e-10,
        -6.3180883408866844944e-11,
        2.8687950109306698981e-11,
        1.945586854577734723e-13,
        -9.6546967484334389059e-13,
        3.2525481481487398415e-14,
        3.3478119482868053878e-14,
        -1.8645628804193131015e-15,
        -1.2507950530688647085e-15,
        7.418235256624043463e-17,
    )
)


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
        y = x * _normal(x)[0]
    elif NUMBER == SILU:
        y = x * _sigmoid(x)
    elif NUMBER == TANH:
        a = -2.0 * tl.abs(x)
        e = tl.exp(a)
        large = e < 0.5  # where 1 - tanh|x| is the better number: csrc/cpu/vec.h says by how much
        y = tl.where(large, 2.0 * e, -_expm1(a)) / (1.0 + e)
        y = tl.where(large, 1.0 - y, y)
        y = tl.where(x < 0, -y, y)
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
        cdf, bell = _normal(x)
        y = cdf + x * bell * _INV_SQRT_2PI
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
def least_slope(d, NUMBER: tl.constexpr):
    """A lower bound of ``1 - d act'``, elementwise; for the smooth activations."""
    if NUMBER == GELU:  # act'(-x) = 1 - act'(x)
        y = 1.0 - tl.maximum(d * _GELU_MOST, d - d * _GELU_MOST)
    elif NUMBER == SILU:
        y = 1.0 - tl.maximum(d * _SILU_MOST, d - d * _SILU_MOST)
    elif NUMBER == SIGMOID:
        y = 1.0 - tl.maximum(d * _SIGMOID_MOST, 0.0)
    else:
        y = 1.0 - tl.maximum(d, 0.0)
    return y


@triton.jit
def _sigmoid(x):
    t = tl.exp(-tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)


@triton.jit
def _normal(x):
    """``erfc(-x / sqrt(2)) / 2``, as ``1 + erf`` would lose every digit on the negative side, and ``exp(-x^2 / 2)``."""
    TERMS: tl.constexpr = 13 if x.dtype == tl.float32 else 24
    a = tl.minimum(tl.abs(x) * _SQRT_HALF, 30.0)  # where both are 0; keeps a * a finite
    bell = tl.exp(-a * a)
    w = 2.0 * ((a - 3.75) / (a + 3.75))
    b = tl.zeros(x.shape, x.dtype)
    before = b
    for n in tl.static_range(TERMS - 1, 0, -1):  # Clenshaw's recurrence
        b, before = w * b - before + _ERFC[n], b
    tail = 0.5 * bell * (0.5 * w * b - before + _ERFC[0]) / (1.0 + 2.0 * a)
    return tl.where(x > 0, 1.0 - tail, tail), bell


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
