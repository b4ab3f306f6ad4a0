"""The table of activations: everything the engine knows about ``act`` in ``z = act(W z + c)``.

One row here, one struct in ``csrc/activations.h`` and one branch in ``kernels/activations.py`` add an activation;
``tests/test_activations.py`` compares the three languages. ``number`` is the id that C++ and Triton use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01  # torch's default negative slope
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)


@dataclass(frozen=True)
class Activation:
    """One elementwise activation.

    ``value(x)`` and ``derivative(x)`` take the pre-activation and are differentiable torch expressions;
    ``derivative_of_value(y)`` gives the same derivative from ``y = value(x)`` where that is possible (monotone
    activations), so that a solve needs to keep nothing but its equilibrium. ``homogeneous`` says
    ``value(a x) = a value(x)`` for every ``a > 0``; ``lipschitz`` is ``sup |derivative|``.
    """

    name: str
    number: int
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    derivative_of_value: Callable[[Tensor], Tensor] | None
    homogeneous: bool
    lipschitz: float


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_step(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, LEAKY_SLOPE))


def _gelu(x: Tensor) -> Tensor:
    """``x Phi(x)`` by erfc: torch's ``1 + erf`` loses every digit on the negative side, where a solve then cannot
    converge (width 1, c = -2.7 in float32 stalled at a residual of 1.2e-5)."""
    return 0.5 * x * torch.special.erfc(x * -math.sqrt(0.5))


def _gelu_derivative(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _tanh_derivative(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    return 1.0 - y * y


def _sigmoid_derivative(x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    return y * (1.0 - y)


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's default threshold of 20 would put a step of 2e-9 into float64."""
    return F.softplus(x, threshold=40.0)


# sup |d/dx gelu| and sup |d/dx silu| are attained at sqrt(2) and near 2.3994; both to 1e-9.
_TABLE = (
    Activation("identity", 0, lambda x: x.clone(), torch.ones_like, torch.ones_like, True, 1.0),
    Activation("relu", 1, F.relu, _step, _step, True, 1.0),
    Activation("leaky_relu", 2, F.leaky_relu, _leaky_step, _leaky_step, True, 1.0),
    Activation(
        "elu",
        3,
        F.elu,
        lambda x: torch.where(x > 0, torch.ones_like(x), torch.exp(torch.clamp(x, max=0.0))),
        lambda y: torch.where(y > 0, torch.ones_like(y), y + 1.0),
        False,
        1.0,
    ),
    Activation("gelu", 4, _gelu, _gelu_derivative, None, False, 1.128904145),
    Activation("silu", 5, F.silu, _silu_derivative, None, False, 1.099839320),
    Activation("tanh", 6, torch.tanh, _tanh_derivative, lambda y: 1.0 - y * y, False, 1.0),
    Activation("sigmoid", 7, torch.sigmoid, _sigmoid_derivative, lambda y: y * (1.0 - y), False, 0.25),
    Activation("softplus", 8, _softplus, torch.sigmoid, lambda y: -torch.expm1(-y), False, 1.0),
)
ACTIVATIONS = {entry.name: entry for entry in _TABLE}


def get_activation(name: str) -> Activation:
    """The table row called ``name``; ``ValueError`` naming the known ones otherwise."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}") from None
