"""torchdeq's losses and Jacobian estimates."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..nn.stability import jacobian_penalty, spectral_radius
from .arguments import refuse

WeightFunction = Callable[..., float]


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Hutchinson estimate of ``||J||_F^2`` over the number of elements of z0; f0 = f(z0) with its graph."""
    return jacobian_penalty(f0, z0, vecs, create_graph)


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """The last vector (like z0) and the spectral radius (B,) of the Jacobian of f0 with respect to z0."""
    radius, vector = spectral_radius(f0, z0, n_iters)
    return vector, radius


_weights: dict[str, WeightFunction] = {
    "exp": lambda n, k, gamma=0.8: gamma ** (n - k - 1),
    "linear": lambda n, k, gamma=0.9, bias=0.0: 1 - (n - k - 1) / n * gamma + bias,
    "const": lambda n, k, c=1.0: c,
}


def register_weight_func(name: str, func: WeightFunction) -> None:
    """Make ``func(n, k, **options)``, the weight of the k-th of n states, known to fp_correction."""
    if not callable(func):
        raise TypeError(f"func must be callable; got {type(func).__name__}")
    _weights[name] = func


def fp_correction(
    crit: Callable[..., Tensor], args: Sequence, weight_func: str = "exp", return_loss_values: bool = False, **kwargs
) -> Tensor | tuple[Tensor, list[float]]:
    """``sum_k w(n, k) crit(*args_k)`` over n states on the way to a fixed point.

    args: what crit takes, each a tensor for all states or a list with one for each. kwargs: of the weight function.
    return_loss_values: also the n losses as numbers.
    """
    if weight_func not in _weights:
        refuse("fp_correction", "weight_func", weight_func, _weights)
    columns = [each if isinstance(each, (list, tuple)) else [each] for each in args]
    if not all(columns) or not columns:
        raise ValueError("args must hold a tensor, or a list of at least one, for everything that crit takes")
    n = max(map(len, columns))
    losses = [crit(*(column[k % len(column)] for column in columns)) for k in range(n)]
    total = sum(_weights[weight_func](n, k, **kwargs) * loss for k, loss in enumerate(losses))
    return (total, [loss.item() for loss in losses]) if return_loss_values else total
