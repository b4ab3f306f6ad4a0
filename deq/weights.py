"""Weights: structures that ``deq.solve`` knows, and parametrisations that guarantee an equilibrium.

A structure stands in for the (m, m) matrix ``W`` of ``z = act(W z + c)``; ``dense()`` is that matrix, differentiable in
the structure's own tensors. The parametrisations turn unconstrained parameters into a ``W`` with a proved property.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .backward import SingleLevelFunction, at_one_level, is_batch_of_gradients, one_gradient_at_a_time
from .modes import no_autocast

EXACT_UP_TO = 192  # width up to which all eigenvalues cost less than the estimate and its certificate
KRYLOV_STEPS = 48  # relative error of the estimated norm below 0.6 % at any width here (Kuczynski, Wozniakowski 1992)
CERTIFICATE_SLACK = 1.01  # by how much the certified norm exceeds the estimated one


@dataclass(frozen=True, eq=False)
class Structure:
    """What all structures offer: ``structure`` (name), ``parts`` (the tensors that it consists of), ``width`` m,
    ``dtype``, ``device``, ``requires_grad`` and ``dense()`` (m, m)."""

    structure: ClassVar[str]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it consists of, the first of m rows."""
        raise NotImplementedError  # abstract: every subclass has its own

    @property
    def width(self) -> int:
        return self.parts[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether any of its tensors does."""
        return any(t.requires_grad for t in self.parts)

    def dense(self) -> Tensor:
        """The matrix (m, m) itself, differentiable in the fields."""
        raise NotImplementedError  # abstract: every subclass has its own

    def formed(self) -> Tensor:
        """``dense()`` without what its dtype would round: (m, m), in float32 where it is computed from 16 bits."""
        return self.dense()

    def like(self) -> Tensor:
        """A tensor of the shape, dtype and device of ``dense()``, of one undefined element."""
        return self.parts[0].detach().new_empty(()).expand(self.width, self.width)


@dataclass(frozen=True, eq=False)
class Dense(Structure):
    """``W`` (m, m), nothing known about it."""

    structure: ClassVar[str] = "dense"
    W: Tensor

    def __post_init__(self):
        _check_square("W", self.W)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.W,)

    def dense(self) -> Tensor:
        return self.W


@dataclass(frozen=True, eq=False)
class LowerTriangular(Structure):
    """The lower triangle of ``W`` (m, m), without its diagonal if ``strict``; the other entries are ignored."""

    structure: ClassVar[str] = "lower_triangular"
    W: Tensor
    strict: bool = False

    def __post_init__(self):
        _check_square("W", self.W)
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict must be True or False; got {self.strict!r}")

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.W,)

    def dense(self) -> Tensor:
        return torch.tril(self.W, diagonal=-1 if self.strict else 0)


@dataclass(frozen=True, eq=False)
class Diagonal(Structure):
    """``W = diag(d)``, d (m,)."""

    structure: ClassVar[str] = "diagonal"
    d: Tensor

    def __post_init__(self):
        _check_tensor("d", self.d, 1, "(m,)")

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.d,)

    def dense(self) -> Tensor:
        return torch.diag(self.d)


@dataclass(frozen=True, eq=False)
class DiagonalLowRank(Structure):
    """``W = diag(d) + P Q^T`` with d (m,), P and Q (m, r)."""

    structure: ClassVar[str] = "diagonal_low_rank"
    d: Tensor
    P: Tensor
    Q: Tensor

    def __post_init__(self):
        _check_tensor("d", self.d, 1, "(m,)")
        m = self.d.shape[0]
        for name, factor in (("P", self.P), ("Q", self.Q)):
            _check_tensor(name, factor, 2, "(m, r)")
            if factor.shape[0] != m:
                raise ValueError(f"{name} must be (m, r) with m = {m}, the length of d; got {tuple(factor.shape)}")
            if factor.dtype != self.d.dtype or factor.device != self.d.device:
                raise ValueError(
                    f"{name} must have the dtype and device of d, {self.d.dtype} on {self.d.device}; "
                    f"got {factor.dtype} on {factor.device}"
                )
        if self.P.shape != self.Q.shape:
            raise ValueError(f"P and Q must have the same rank; got P {tuple(self.P.shape)}, Q {tuple(self.Q.shape)}")

    @property
    def rank(self) -> int:
        return self.P.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.d, self.P, self.Q

    def dense(self) -> Tensor:
        return self.formed().to(self.dtype)

    def formed(self) -> Tensor:
        d, P, Q = self.d, self.P, self.Q
        if d.element_size() < 4:
            d, P, Q = d.float(), P.float(), Q.float()
        with no_autocast(d.device.type):  # which would round the product to 16 bits
            return torch.diag(d) + P @ Q.mT


def contractive(V: Tensor, bound: float = 0.95) -> Tensor:
    """``W = V min(1, bound / s)`` with a certified ``s >= ||V||_2``, so that ``||W||_2 <= bound``.

    V: (m, m), any floating dtype; W has the same dtype. Where ``s`` is not above the bound, ``W = V`` exactly. It
    exceeds ||V||_2 by 1 % (m > 192) or by rounding only; for the latter, bfloat16 takes 6 % at m = 256.
    With an activation of Lipschitz constant L and ``bound L < 1``, ``z -> act(W z + c)`` is a contraction in the
    2-norm: the equilibrium exists, is unique, and the plain iteration gains a factor of at least ``bound L`` per step.

    Proof of the bound: :func:`spectral_norm_bound` is at least ||V||_2. Rounding the product to the dtype of V with
    unit roundoff u and smallest subnormal t changes an entry by at most ``u |scale V_ij| + t / 2``, so
    ``||W||_2 <= scale (||V||_2 + u ||V||_F) + m t / 2`` with ``||V||_F <= sqrt(m) ||V||_2``, and ``scale`` makes the
    right side at most ``bound``. Differentiable once in V, wherever its largest singular value is simple or below the
    bound. Raises ValueError for a V that is not square or not finite and for a bound outside (0, 1).
    """
    _check_square("V", V)
    if not 0.0 < bound < 1.0:
        raise ValueError(f"bound must lie strictly between 0 and 1; got {bound!r}")
    kind = torch.finfo(V.dtype)
    target = bound - 0.5 * V.shape[0] * kind.smallest_normal * kind.eps
    largest = spectral_norm_bound(V) * (1.0 + 0.5 * kind.eps * V.shape[0] ** 0.5)
    scale = largest.new_tensor(target) / largest.clamp(
        min=target
    )  # of tensors: a Python number over one is not 1 for equals
    return (V.double() * scale).to(V.dtype)


def monotone(A: Tensor, B: Tensor, mu: float = 0.1) -> Tensor:
    """``W = (1 - mu) I - A^T A + B - B^T`` (m, m): ``sym(I - W) = mu I + A^T A >= mu I`` (Winston, Kolter 2020).

    A: (r, m) of any rank r, B: (m, m), same floating dtype; half precisions are formed in float32. For every
    nondecreasing 1-Lipschitz activation (all of the table but gelu and silu) the equilibrium exists, is unique and is
    Lipschitz in c. Proof: such an activation is the resolvent ``(1 + dF)^-1`` of a monotone ``dF``, hence
    ``z = act(W z + c)`` says ``0 in (I - W) z - c + dF(z)``, and this operator is strongly monotone with modulus mu.
    The plain iteration need not converge: ||W||_2 is not bounded. The inequality holds up to the rounding of W.
    Every W with ``sym(I - W) >= mu I`` is reached. Raises ValueError for shapes, dtypes, devices or
    ``mu`` outside (0, 1].
    """
    _check_square("B", B)
    _check_tensor("A", A, 2, "(r, m)")
    if A.shape[1] != B.shape[0] or A.dtype != B.dtype or A.device != B.device:
        raise ValueError(
            f"A must be (r, {B.shape[0]}) of {B.dtype} on {B.device} to go with B; "
            f"got {tuple(A.shape)} of {A.dtype} on {A.device}"
        )
    if not 0.0 < mu <= 1.0:
        raise ValueError(f"mu must lie in (0, 1]; got {mu!r}")
    wide = torch.promote_types(B.dtype, torch.float32)
    A, dtype, B = A.to(wide), B.dtype, B.to(wide)
    eye = torch.eye(B.shape[0], dtype=wide, device=B.device)
    with no_autocast(B.device.type):  # the rounding of a product to 16 bits could be more than mu
        gram = A.mT @ A
    return ((1.0 - mu) * eye - gram + (B - B.mT)).to(dtype)


def bounded(v: Tensor, bound: float = 0.95) -> Tensor:
    """``bound tanh(v / bound)``, elementwise: every entry w has ``|w| <= bound``, and ``w ~ v`` near zero.

    For a diagonal W = diag(w) and an activation with ``0 <= act' <= 1``, or ``|act'| <= L`` and ``bound L < 1``:
    ``z - act(w z + c)`` has derivative ``1 - w act' >= 1 - bound L > 0``, so it has exactly one root. ``w < 1`` alone
    is enough for that with a nondecreasing 1-Lipschitz activation; the bound from below as well makes the plain
    iteration contract with factor ``bound L``, which a ``w <= -1`` would not.
    Raises TypeError for a v that is no floating-point tensor and ValueError for a bound outside (0, 1).
    """
    if not isinstance(v, Tensor) or not v.dtype.is_floating_point:
        kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"v must be a floating-point tensor; got {kind}")
    if not 0.0 < bound < 1.0:
        raise ValueError(f"bound must lie strictly between 0 and 1; got {bound!r}")
    # tanh rounds to at most 1, but bound itself may round up to 1 in a half precision
    kind = torch.finfo(v.dtype)
    return (bound * torch.tanh(v / bound)).clamp(min=-1.0 + kind.eps, max=1.0 - kind.eps)


def bounded_triangular(V: Tensor, bound: float = 0.95) -> Tensor:
    """The lower triangle of V (m, m) with its diagonal replaced by :func:`bounded` of it.

    Row i of ``z = act(W z + c)`` contains only ``z_1 .. z_i``; given the earlier ones it is the scalar equation of
    :func:`bounded`, so forward substitution proves one unique equilibrium. The plain iteration converges to it,
    one coordinate after the other, with asymptotic factor ``max |W_ii| L``; large entries below the diagonal can
    make the residual grow on the way there. Raises ValueError for a V that is not square.
    """
    _check_square("V", V)
    return torch.tril(V, diagonal=-1) + torch.diag(bounded(torch.diagonal(V), bound))


def spectral_norm_bound(V: Tensor) -> Tensor:
    """A float64 scalar at least ||V||_2, above it by about 1 % (m > 192) or 1e-10; V (m, m), differentiable once.

    Up to width 192 it comes from the eigenvalues of ``G = V^T V``. Above, a Krylov space gives an estimate from below
    and a Cholesky factorisation the proof: if that of ``tau I - G`` runs to completion in floating point, then
    ``||V||_2^2 <= tau (1 + 4 m gamma)``, ``gamma = (m + 2) u / (1 - (m + 2) u)``, u = 2^-53 (Rump 2006, and
    ``||fl(V^T V) - V^T V||_2 <= gamma ||V||_F^2 <= gamma m ||V||_2^2``). Should it break down, the estimate was too low
    and all eigenvalues are computed. Cost above width 192: 2.7 m^3 flops in float64.
    """
    _check_square("V", V)
    if torch.compiler.is_compiling():
        return torch.ops.deq.spectral_norm_bound.default(V)[0]
    return _SpectralNormBound.apply(V)[0]


class _SpectralNormBound(torch.autograd.Function):
    """``ratio * sigma_1(V)`` with a ratio treated as constant, so that the gradient is ``ratio u v^T``."""

    @staticmethod
    def forward(V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.deq.spectral_norm_bound.default(V)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, left, v = output
        ctx.mark_non_differentiable(left, v)
        ctx.save_for_backward(*inputs, left, v)
        ctx.save_for_forward(*inputs, left, v)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None) -> tuple[Tensor]:
        if is_batch_of_gradients(grad):
            return one_gradient_at_a_time(_SpectralNormBound.backward, ctx, grad)
        V, left, v = ctx.saved_tensors
        return (_SpectralNormGradient.apply(grad, V, left, v),)

    @staticmethod
    def jvp(ctx, dV: Tensor) -> tuple[Tensor, None, None]:
        V, left, v = ctx.saved_tensors
        return _SpectralNormTangent.apply(dV, V, left, v), None, None

    @staticmethod
    def vmap(info, in_dims, V: Tensor) -> tuple:
        return _one_by_one(_SpectralNormBound.apply, V, in_dims[0])


def _one_by_one(bound: Callable[[Tensor], tuple[Tensor, ...]], V: Tensor, dim: int) -> tuple:
    """The rule of vmap: one matrix after the other, each has its own certificate."""
    each = [bound(one) for one in V.movedim(dim, 0)]
    return tuple(torch.stack(outputs) for outputs in zip(*each, strict=True)), (0, 0, 0)


def _bound(V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bound (), and the vectors ``left`` and v (m,) of its gradient ``left v^T``; float64."""
    m, largest = V.shape[0], float(V.abs().amax())
    if not math.isfinite(largest):
        raise ValueError("V must be finite; it contains NaN or infinity")
    scale = 2.0 ** math.frexp(largest)[1]  # a power of two: exact, and G can neither overflow nor vanish
    V = V.double() / scale
    G = V.mT @ V
    tau, v = _top_eigenpair(G)
    u = V @ v
    sigma = torch.linalg.vector_norm(u)
    gamma = (m + 2) * 2.0**-53
    upper = torch.sqrt(torch.maximum(tau, sigma * sigma) * (1 + 5 * m * gamma))
    left = u * (upper / (sigma * sigma).clamp(min=torch.finfo(torch.float64).tiny))
    return upper * scale, left, v.contiguous()  # as a graph takes it


def _bound_fake(V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = V.shape[0]
    return tuple(V.new_empty(shape, dtype=torch.float64) for shape in ((), (m,), (m,)))


class _InGraphs(SingleLevelFunction):
    """The same in the form that the operator's own autograd kernel can call."""

    backward, jvp = staticmethod(_SpectralNormBound.backward), staticmethod(_SpectralNormBound.jvp)

    @staticmethod
    def forward(ctx, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = _SpectralNormBound.forward(V)
        _SpectralNormBound.setup_context(ctx, (V,), output)
        return output


def _bound_autograd(V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return at_one_level(_InGraphs, V)


def _bound_vmap(info, in_dims, V: Tensor) -> tuple:
    return _one_by_one(torch.ops.deq.spectral_norm_bound.default, V, in_dims[0])


# It decides by its numbers, which no graph can hold: there it is an operator.
_operators = torch.library.Library("deq", "FRAGMENT")
_operators.define("spectral_norm_bound(Tensor V) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
_operators.impl("spectral_norm_bound", _bound, "CompositeExplicitAutograd")
_operators.impl("spectral_norm_bound", _bound_autograd, "Autograd")
torch.library.register_fake("deq::spectral_norm_bound", _bound_fake, lib=_operators)
torch.library.register_vmap("deq::spectral_norm_bound", _bound_vmap, lib=_operators)


class _Once(torch.autograd.Function):
    """A derivative that has none. Not by torch's once_differentiable: torch.autograd.grad and torch.func pass by that,
    and a second derivative would be wrong in silence."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("deq.weights.spectral_norm_bound, and with it a contractive W, is differentiable once")

    jvp = backward


class _SpectralNormGradient(_Once):
    """(grad, V, left, v) -> the gradient of V."""

    @staticmethod
    def forward(grad: Tensor, V: Tensor, left: Tensor, v: Tensor) -> Tensor:
        return torch.outer(grad * left, v).to(V.dtype)


class _SpectralNormTangent(_Once):
    """(dV, V, left, v) -> the tangent of the norm."""

    @staticmethod
    def forward(dV: Tensor, V: Tensor, left: Tensor, v: Tensor) -> Tensor:
        return left @ (dV.double() @ v)


def _top_eigenpair(G: Tensor) -> tuple[Tensor, Tensor]:
    """Of G (m, m) float64, symmetric: an upper bound of the largest eigenvalue (up to rounding), its vector."""
    m = G.shape[0]
    if m > EXACT_UP_TO:
        v = _krylov_estimate(G)
        tau = CERTIFICATE_SLACK**2 * (v @ (G @ v))
        shifted = -G
        shifted.diagonal().add_(tau)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return tau, v
    values, vectors = torch.linalg.eigh(G)
    return values[-1], vectors[:, -1]


def _krylov_estimate(G: Tensor) -> Tensor:
    """Unit vector that maximises ``v^T G v`` over a Krylov space of G from a fixed random start (Lanczos)."""
    m = G.shape[0]
    start = torch.randn(m, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0)).to(G.device)
    basis = G.new_zeros(KRYLOV_STEPS, m)  # orthonormal rows
    images = G.new_zeros(KRYLOV_STEPS, m)
    w, tiny = start, torch.finfo(torch.float64).tiny
    for j in range(KRYLOV_STEPS):
        basis[j] = w / torch.linalg.vector_norm(w).clamp(min=tiny)
        w = images[j] = G @ basis[j]
        for _ in range(2):  # twice is enough to stay orthogonal (Kahan, Parlett)
            w = w - (basis[: j + 1] @ w) @ basis[: j + 1]
    coefficients = torch.linalg.eigh(basis @ images.mT).eigenvectors[:, -1]
    v = coefficients @ basis
    return v / torch.linalg.vector_norm(v).clamp(min=tiny)


def _check_tensor(name: str, value: Tensor, dims: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}; got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense; got layout {value.layout}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype; got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must not be empty; got shape {tuple(value.shape)}")


def _check_square(name: str, value: Tensor) -> None:
    _check_tensor(name, value, 2, "(m, m)")
    if value.shape[0] != value.shape[1]:
        raise ValueError(f"{name} must be square, (m, m); got {tuple(value.shape)}")
