"""The direct methods, one class a structure of W: what ``z = act(W z + c)`` needs of it and nothing else.

A method holds its weight's own tensors (``parts``) and works on rows c, z, g, u (B, m), for batched weights (S, B, m),
in float32 or float64:

``name, what``                      of the plan: the map in a word or two, and why it was chosen
``why_not(activation)``             None, or why this weight has no exact solution by this method
``solve(c, activation, start)``     the equilibrium: a :class:`Result`
``masked(s, g)``                    ``u = s * (W u + g)``, exact too: the adjoint of a solve is this with W^T
``apply(z)``                        ``W z`` of every row, differentiable in z and the parts
``outer(u, z)``                     the gradient of ``<u, W z>`` in every part
``T``                               the method of W^T
``refuses_samples``                 the compiled kernels give samples that are not finite a residual of NaN, and are
                                    right at any scale of a sample
``defers``                          a solve on a GPU reads nothing of the samples there (:func:`is_deferred`), and of a
                                    weight what decides whether its solution is unique, once a version
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _library, _triton, cache, recycle
from ..activations import ACTIVATIONS
from ..modes import is_captured
from ..products import multiply
from ..reference import one_by_one
from . import roots


class Result(NamedTuple):
    """z or u; the residual of every row, infinity where z left the range of its dtype; evaluations (an int for all
    rows, or a tensor); the derivative at the solution where the method knows it anyway."""

    z: Tensor
    residual: Tensor
    iterations: Tensor | int = 1
    derivative: Tensor | None = None


def is_deferred(like: Tensor) -> bool:
    """Whether looking at elements would wait for the device: then all is computed that may be needed."""
    return like.is_cuda


def row_norm(z: Tensor) -> Tensor:
    """2-norm of every row, float64."""
    if is_deferred(z):
        return torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64)
    norm = torch.linalg.vector_norm(z, dim=-1).double()
    low, high = (1e-15, 1e18) if z.dtype == torch.float32 else (1e-146, 1e153)
    if not bool(((norm > low) & (norm < high)).all()):
        largest = z.abs().amax(-1) if z.numel() else norm
        if not bool(((norm > low) & (norm < high) | (largest == 0)).all()):  # squares out of the range of the dtype
            unit = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0).unsqueeze(-1)
            norm = torch.linalg.vector_norm(z / unit, dim=-1).double() * unit.squeeze(-1)
    return norm


def is_finite(t: Tensor) -> bool:
    """Are all elements finite? By their largest magnitude: a twentieth of the price of ``isfinite`` of every one."""
    return t.numel() == 0 or bool(torch.isfinite(t.detach().abs().amax()))


def relative_residual(f: Tensor, z: Tensor) -> Tensor:
    """``||f - z|| / ||f||`` of every row in their dtype; infinity for NaN."""
    step, size = row_norm(f - z), row_norm(f)
    return torch.where(step > 0, step / size, step).nan_to_num(nan=torch.inf).to(z.dtype)


def is_compiled(like: Tensor) -> bool:
    return _library.compiled is not None and like.device.type == "cpu"


def has_kernels(like: Tensor) -> bool:
    """Whether the Triton kernels for structured weights take such a tensor."""
    return like.is_cuda and like.dtype == torch.float32 and _triton.why_not(str(like.device)) == ""


def rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@dataclass(frozen=True, eq=False)
class Linear:
    """Identity activation, any W (m, m) or (S, m, m): ``z = (I - W)^-1 c`` by one factorisation for all rows.

    ``inverts``: by the explicit inverse, found again by content, so that the next solve is one product; else by LU.
    """

    W: Tensor
    inverts: bool
    is_transposed: bool = False
    tol: float = 0.0

    name: ClassVar[str] = "direct"
    refuses_samples: ClassVar[bool] = False
    defers: ClassVar[bool] = True

    @property
    def what(self) -> str:
        how = "the inverse of I - W, remembered" if self.inverts else "one LU factorisation of I - W"
        return f"direct: the identity activation makes the problem linear; {how}, serves every sample"

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.W,)

    def of(self, W: Tensor) -> "Linear":
        return Linear(W, self.inverts, self.is_transposed, self.tol)

    @property
    def T(self) -> "Linear":
        return Linear(self.W, self.inverts, not self.is_transposed, self.tol)

    def apply(self, z: Tensor) -> Tensor:
        return multiply(z, self.W if self.is_transposed else self.W.mT)

    def outer(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (multiply(z.mT, u) if self.is_transposed else multiply(u.mT, z),)

    def why_not(self, activation: str) -> str | None:
        return None if activation == "identity" else f"W is dense and the activation is {activation!r}"

    def solve(self, c: Tensor, activation: str, start: Tensor | None = None) -> Result:
        z = self._divide(c)
        if is_deferred(c):  # one refinement, of the samples that it makes better
            f = self.apply(z) + c
            before, finer = relative_residual(f, z), z + self._divide(f - z)
            residual = relative_residual(self.apply(finer) + c, finer)
            better = residual < before
            return Result(torch.where(better.unsqueeze(-1), finer, z), torch.where(better, residual, before))
        for _ in range(2):
            f = self.apply(z) + c
            residual = relative_residual(f, z)
            left = ~(residual <= self.tol)
            if not bool(left.any()):
                break
            finer = z + self._divide(f - z)  # refinement: what is left is again such a problem
            z = torch.where(left.unsqueeze(-1), finer, z)
        else:
            residual = relative_residual(self.apply(z) + c, z)
        return Result(z, residual)

    def masked(self, s: Tensor, g: Tensor) -> Result:
        return self.solve(g, "identity")  # s is the derivative of the identity

    def _divide(self, c: Tensor) -> Tensor:
        """``(I - W)^-1 c``, or with W^T."""
        if self.inverts:
            inverse = cache.remembered(self.W, "inverse of I - W", self._invert)
            return multiply(c, inverse if self.is_transposed else inverse.mT)
        lu, pivots = cache.remembered(self.W, "LU of I - W", self._factor)
        solve = partial(torch.linalg.lu_solve, left=False, adjoint=not self.is_transposed)
        if lu.dim() == 2:
            return solve(lu, pivots, c)
        return one_by_one(lambda *matrices: (solve(*matrices),), lu, pivots, c)[0]

    def _factor(self) -> tuple[Tensor, Tensor]:
        if not is_deferred(self.W):
            refuse_non_finite("W", self.W)
        return self._of_shifted(torch.linalg.lu_factor_ex)[:2]

    def _invert(self) -> Tensor:
        if not is_deferred(self.W):
            refuse_non_finite("W", self.W)
        return self._of_shifted(torch.linalg.inv_ex)[0]

    def _of_shifted(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``function`` of ``I - W``."""
        shifted = torch.eye(self.W.shape[-1], dtype=self.W.dtype, device=self.W.device) - self.W.detach()
        return function(shifted) if shifted.dim() == 2 else one_by_one(function, shifted)


class _Packed(NamedTuple):
    panels: Tensor
    diagonal: Tensor
    least: float  # element of the diagonal
    most: float


@dataclass(frozen=True, eq=False)
class Triangular:
    """The lower triangle of W (m, m), or its transpose: one substitution, output by output for all rows at once."""

    W: Tensor
    strict: bool
    is_transposed: bool = False
    backend: str = "auto"

    name: ClassVar[str] = "substitution"
    refuses_samples: ClassVar[bool] = True
    defers: ClassVar[bool] = True
    what: ClassVar[str] = (
        "substitution: output i of a lower triangular W needs only the outputs before it and one scalar root"
    )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.W,)

    def of(self, W: Tensor) -> "Triangular":
        return self if W is self.W else replace(self, W=W)

    @property
    def T(self) -> "Triangular":
        return replace(self, is_transposed=not self.is_transposed)

    @property
    def _lower(self) -> Tensor:
        return torch.tril(self.W, diagonal=-1 if self.strict else 0)

    def apply(self, z: Tensor) -> Tensor:
        return z @ (self._lower if self.is_transposed else self._lower.mT)

    def outer(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        product = z.mT @ u if self.is_transposed else u.mT @ z
        return (torch.tril(product, diagonal=-1 if self.strict else 0),)

    def why_not(self, activation: str) -> str | None:
        if is_captured(self.W):  # where it has no unique root the status tells
            return None
        if self.strict:
            if has_kernels(self.W) or self.backend == "cuda":  # which do not look for NaN
                cache.remembered(self.W, ("bounds", self.strict), self._bounds)
            return None
        if is_compiled(self.W) and self.W.dtype in (torch.float32, torch.float64):
            least, most = self._packed.least, self._packed.most
        else:
            least, most = cache.remembered(self.W, ("bounds", self.strict), self._bounds)
        return why_not_unique("the diagonal of W", activation, least, most, self.W.detach().diagonal())

    def _bounds(self) -> tuple[float, float]:
        refuse_non_finite("W", self._lower)
        least, most = torch.stack(torch.aminmax(self.W.detach().diagonal())).tolist()
        return least, most

    def solve(self, c: Tensor, activation: str, start: Tensor | None = None) -> Result:
        if (found := self._on_gpu(c, activation, None)) is not None:
            return found
        if not is_compiled(c):
            refuse_non_finite("W", self._lower)
            z = roots.substitute(self._lower, c, activation)
            x = self.apply(z) + c
            return Result(z, relative_residual(ACTIVATIONS[activation].value(x), z))
        entry = ACTIVATIONS[activation]
        return self._run(c, None, entry.number, derives=entry.derivative_of_value is None)

    def masked(self, s: Tensor, g: Tensor) -> Result:
        if (found := self._on_gpu(g, None, s)) is not None:
            return found
        if is_compiled(g):
            return self._run(g, s, -1)
        triangle = self._lower.mT if self.is_transposed else self._lower
        u = roots.substitute_masked(triangle, s, g, upper=self.is_transposed)
        return Result(u, relative_residual(s * (self.apply(u) + g), u))

    def _on_gpu(self, c: Tensor, activation: str | None, mask: Tensor | None) -> Result | None:
        """By the CUDA kernel where it is the backend, else by Triton's; None where neither takes such a tensor."""
        A = self.W.detach().mT if self.is_transposed else self.W.detach()
        how = {"mask": mask, "strict": self.strict, "upper": self.is_transposed}
        if self.backend == "cuda":
            from ..backends import cuda

            if (found := cuda.substitute(A, c, activation, **how)) is not None:
                return Result(*found)
        if not has_kernels(c):
            return None
        from deq.kernels import triangular  # Triton takes a second to import

        return Result(*triangular.substitute(A, c, activation, **how))

    def masked_of_value(self, z: Tensor, activation: str, g: Tensor) -> Result:
        """``masked`` with s = act' taken from z = act(.) inside the kernel."""
        return self._run(g, z, ACTIVATIONS[activation].number)

    def _run(self, c: Tensor, mask: Tensor | None, activation: int, derives: bool = False) -> Result:
        packed = self._packed
        return _substitute(packed.panels, packed.diagonal, c, mask, activation, derives, self.is_transposed)

    @cached_property
    def _packed(self) -> _Packed:
        return cache.remembered(self.W, ("triangle", self.strict, self.is_transposed), self._pack)

    def _pack(self) -> _Packed:
        m = self.W.shape[0]
        panels = self.W.new_empty(_library.compiled.deq_cpu_triangle_elements(m))
        diagonal = self.W.new_empty(m)
        torch.ops.deq.pack_triangle_.default(
            self.W.detach(), panels, diagonal, int(self.strict), int(self.is_transposed)
        )
        if not is_finite(panels):
            refuse_non_finite("W", self._lower)
        least, most = (float(bound) for bound in torch.aminmax(diagonal))
        return _Packed(panels, diagonal, least, most)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """``W = diag(d)``, d (m,): every element is a scalar equation."""

    d: Tensor

    name: ClassVar[str] = "closed form"
    refuses_samples: ClassVar[bool] = True
    defers: ClassVar[bool] = True
    what: ClassVar[str] = "closed form: a diagonal W leaves one scalar equation an element"

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.d,)

    def of(self, d: Tensor) -> "Diagonal":
        return Diagonal(d)

    @property
    def T(self) -> "Diagonal":
        return self

    def apply(self, z: Tensor) -> Tensor:
        return self.d * z

    def outer(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return ((u * z).sum(0),)

    def why_not(self, activation: str) -> str | None:
        return why_not_diagonal(self.d, activation)

    def solve(self, c: Tensor, activation: str, start: Tensor | None = None) -> Result:
        entry = ACTIVATIONS[activation]
        return solve_diagonal(self.d.detach(), c, activation, derives=entry.derivative_of_value is None)

    def masked(self, s: Tensor, g: Tensor) -> Result:
        u = s * g / (1 - s * self.d)
        return Result(u, relative_residual(s * (self.d * u + g), u))


def solve_diagonal(d: Tensor, x: Tensor, activation: str, derives: bool = False) -> Result:
    """``z = act(d z + x)`` of every element of x (B, m); with ``derives`` also ``act'(d z + x)``."""
    entry = ACTIVATIONS[activation]
    if has_kernels(x):
        from deq.kernels import diagonal

        z, residual, derivative = diagonal.solve_diagonal(d, x, activation, derives)
        return Result(z, residual, derivative=derivative)
    if is_compiled(x):
        return _substitute(x.new_empty(0), d.contiguous(), x, None, entry.number, derives, False)
    z, p = roots.scalar_root(d, x, activation)
    residual = relative_residual(entry.value(d * z + x), z)
    return Result(z, residual, derivative=entry.derivative(p) if derives else None)


def _substitute(
    packed: Tensor, diagonal: Tensor, c: Tensor, mask: Tensor | None, activation: int, derives: bool, reversed: bool
) -> Result:
    none = c.new_empty(0)
    z = recycle.empty_like(c)
    derivative = recycle.empty_like(c) if derives else none
    residual = c.new_empty(c.shape[0])
    mask = none if mask is None else rows_contiguous(mask)
    torch.ops.deq.substitute_.default(
        packed, diagonal, rows_contiguous(c), mask, z, derivative, residual, activation, int(reversed)
    )
    return Result(z, residual, derivative=derivative if derives else None)


def why_not_diagonal(d: Tensor, activation: str) -> str | None:
    if is_captured(d):  # where one has no unique root the status tells
        return None
    least, most = cache.remembered(d, "bounds", lambda: torch.stack(torch.aminmax(d.detach())).tolist())
    if not (least > -torch.inf and most < torch.inf):
        refuse_non_finite("d", d)
    return why_not_unique("d", activation, least, most, d)


def why_not_unique(name: str, activation: str, least: float, most: float, diagonal: Tensor) -> str | None:
    """Why ``z = act(d z + x)`` has no unique root for some element of ``diagonal``, all in [least, most]; or None."""
    if roots.has_unique_root(activation, least, most):
        return None
    if activation == "identity" and not bool((diagonal == 1).any()):
        return None
    return f"z = {activation}(d z + x) has more than one root, or none, for {name} in [{least:.6g}, {most:.6g}]"


def refuse_non_finite(name: str, value: Tensor) -> None:
    """ValueError naming the first NaN or infinity of a weight's tensor, if there is one."""
    bad = (~torch.isfinite(value.detach())).nonzero()
    if bad.numel():
        place = tuple(bad[0].tolist())
        raise ValueError(f"{name} must be finite; {name}{list(place)} is {value[place].item()}")
