"""The layer ``z = act(W z + U x + b)``."""

import inspect

import torch
from torch import Tensor, nn

from ..activations import get_activation
from ..closures import in_transform
from ..modes import has_autocast, no_autocast
from ..options import check, unknown_option
from ..plan import make_plan
from ..products import linear
from ..solution import Solution
from ..solve import solve
from .weight_modules import WEIGHTS, WeightModule

SOLVE_OPTIONS = tuple(
    name for name, p in inspect.signature(solve).parameters.items() if p.kind is p.KEYWORD_ONLY and name != "z0"
)


class Injection(nn.Linear):
    """``U x + b``: torch's linear layer by :mod:`deq.products`, drawn with variance 1 / in_features and no bias."""

    def reset_parameters(self) -> None:
        """Also for who resets every module of a model by itself, as after ``to_empty``."""
        super().reset_parameters()  # what it draws is drawn over: seeds give the layers that they always gave
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        self.weight.normal_(0.0, self.in_features**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class EquilibriumLinear(nn.Module):
    """Maps x (..., in_features) to the equilibrium z (..., width) of ``z = act(W z + U x + b)``.

    in_features, width: sizes of x and z, at least 1.
    activation: a name of ``deq.activations.ACTIVATIONS``.
    weight: how W is parametrised. "dense": free. "contractive": ||W||_2 <= 0.95. "monotone": ``sym(I - W) >= 0.1 I``.
        "lower_triangular" and "diagonal": ``|W_ii| <= 0.95``. "diagonal_low_rank": ``diag(d) + P Q^T`` of rank 16. Or
        a module whose call returns a structure of ``deq.weights``, like ``deq.nn.MonotoneWeight(width, mu=0.5)``.
        All but dense and diagonal_low_rank keep exactly one equilibrium whatever training does ("monotone" not for
        gelu and silu); every one of them starts where the plain iteration converges.
    bias: whether b exists.
    options: keyword arguments of ``deq.solve`` other than z0, used in every call.

    ``layer(x, z0=None)`` solves from z0 (..., width) or zero. Gradients reach x, U, b, the parameters of W and follow
    ``torch.is_grad_enabled()``, in training and evaluation alike. ``layer.solution`` is the last Solution, detached
    (None where torch.func is used inside torch.compile), after torch.vmap with the batches as its first dimensions; it
    is neither saved nor copied with the layer. Under autocast only ``U x + b`` runs in the lower precision.

    Parameters: ``injection.weight`` U (width, in_features), drawn with variance 1 / in_features so that c has the
    variance of x; ``injection.bias`` b (width,), zero; ``weight.*``, see :mod:`deq.nn.weight_modules`.
    Raises TypeError for an unknown option or one of the wrong type, ValueError for other arguments that cannot be.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        activation: str = "relu",
        weight: str | nn.Module = "dense",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__()
        for name, value in (("in_features", in_features), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        for item in options.items():
            if item[0] not in SOLVE_OPTIONS:
                raise TypeError(unknown_option("deq.nn.EquilibriumLinear", item, SOLVE_OPTIONS))
        _check_values(activation, options)
        self.in_features = in_features
        self.width = width
        self.activation = activation
        self.options = options
        self.solution: Solution | None = None
        lipschitz = get_activation(activation).lipschitz
        self.weight = _make_weight(weight, width, lipschitz, device, dtype)
        self.injection = Injection(in_features, width, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters afresh from torch's global generator."""
        self.weight.reset_parameters()
        self.injection.draw()

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), in_features last; got {tuple(x.shape)}")
        dtype = self.injection.weight.dtype
        if x.dtype != dtype and not has_autocast(x.device.type):
            raise TypeError(f"x must have the dtype of the layer, {dtype}; got {x.dtype}")
        c = self.injection(x)
        if isinstance(z0, Tensor) and has_autocast(x.device.type):  # what a layer under it made has another dtype
            z0 = z0.to(dtype)
        with no_autocast(x.device.type):
            W = self.weight()
            solution = solve(W, c.to(W.dtype), self.activation, z0=z0, **self.options)
        # A graph cannot hand out what belongs to a transform of torch.func inside of it.
        self.solution = None if torch.compiler.is_compiling() and in_transform() else solution.detach()
        return solution.z

    def __getstate__(self) -> dict:
        return {**self.__dict__, "solution": None}

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"in_features={self.in_features}, width={self.width}, activation={self.activation!r}{options}"


def _make_weight(weight: str | nn.Module, width: int, lipschitz: float, device, dtype) -> nn.Module:
    if isinstance(weight, nn.Module):
        if getattr(weight, "width", width) != width:
            raise ValueError(f"weight must be of width {width}; got a {type(weight).__name__} of width {weight.width}")
        return weight.to(device=device, dtype=dtype)
    if not isinstance(weight, str) or weight not in WEIGHTS:
        known = ", ".join(map(repr, WEIGHTS))
        raise ValueError(f"weight must be one of {known}, or a module that returns a structure; got {weight!r}")
    kind: type[WeightModule] = WEIGHTS[weight]
    return kind(width, lipschitz, device=device, dtype=dtype)


def _check_values(activation: str, options: dict) -> None:
    """As every call will, but for what depends on the machine and the dtype, which the layer may still change."""
    every = solve.__kwdefaults__ | options
    check(*(every[name] for name in ("tol", "max_iter", "backward", "on_failure")))
    planned = {name: every[name] for name in ("solver", "criterion", "backend")}
    for name, value in planned.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {value!r}")
    make_plan(
        dtype="float32",
        device="cpu",
        activation=activation,
        compiled=True,
        why_no_triton="",
        why_no_cuda="",
        **planned,
    )
