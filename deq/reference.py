"""Every operation in plain PyTorch: the definition, the oracle of the tests and the fallback backend.

Shapes: W (m, m) with c, z, g, u (..., m), or W (S, m, m) with c, z, g, u (S, ..., m). Any floating dtype that torch
can multiply. Every sample is judged on its own, and a sample that is done is never touched again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import get_activation
from .solution import Status

# How a sample is judged; csrc/judge.h holds the same numbers and rule.
SLOW_AFTER = 12  # evaluations before acceleration "on_demand" may start
SLOW_CONTRACTION = 0.8  # measured contraction above which it does
PATIENCE = 128  # evaluations without a better residual until STALLED, at least m: with a strictly lower triangular W
# the residual may fall only at evaluation m
PATIENCE_AT_FLOOR = 32  # the same once the residual is within FLOOR_EPS machine epsilons
FLOOR_EPS = 1000.0
MARGIN_POWER = 0.1  # a sample leaves at tol^1.1, or at tol where it contracts slowly (csrc/judge.h says why)
MAX_WEIGHT = 1e3  # Anderson weights of larger 1-norm are not trusted


def cell(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    """``act(W z + c)`` for every sample."""
    return get_activation(activation).value(z @ W.mT + c)


def derivative(W: Tensor, c: Tensor, z: Tensor, activation: str) -> Tensor:
    """``act'(W z + c)``, the diagonal of D in the implicit gradient."""
    return get_activation(activation).derivative(z @ W.mT + c)


def solve(W: Tensor, c: Tensor, activation: str, z0: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """Fixed point of :func:`cell`, started at ``z0`` or zero; options and results of :func:`iterate`."""
    act = get_activation(activation).value
    z0 = torch.zeros_like(c) if z0 is None else z0
    return _each_weight(lambda A, c, z0: iterate(lambda z, rows: act(z @ A.mT + c[rows]), z0, **options), W, c, z0)


def masked_linear(A: Tensor, d: Tensor, g: Tensor, u0: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """Fixed point of ``u = d * (A u + g)``. With ``A = W^T``, ``d`` = :func:`derivative` at the equilibrium and ``g``
    the gradient of the loss there, ``u`` is the gradient of c, and ``u z^T`` summed over samples that of W."""
    u0 = torch.zeros_like(g) if u0 is None else u0
    return _each_weight(
        lambda A, d, g, u0: iterate(lambda u, rows: d[rows] * (u @ A.mT + g[rows]), u0, **options), A, d, g, u0
    )


def reflected(K: Tensor, c: Tensor, activation: str, s0: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """``act(x)`` at the fixed point of ``x = K s + c``, ``s = 2 act(x) - x``, started at the reflection ``s0`` or zero.
    The residual is that of x, not of the equation that K came from (:mod:`deq.solvers.cayley`)."""
    act = get_activation(activation).value

    def run(K: Tensor, c: Tensor, s0: Tensor) -> tuple[Tensor, ...]:
        x, *rest = iterate(lambda x, rows: (2 * act(x) - x) @ K.mT + c[rows], s0 @ K.mT + c, **options)
        return act(x), *rest

    return _each_weight(run, K, c, torch.zeros_like(c) if s0 is None else s0)


def reflected_masked(K: Tensor, d: Tensor, g: Tensor, s0: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """``d x`` at the fixed point of ``x = K s + g``, ``s = (2 d - 1) x``: :func:`reflected` for the adjoint."""

    def run(K: Tensor, d: Tensor, g: Tensor, s0: Tensor) -> tuple[Tensor, ...]:
        x, *rest = iterate(lambda x, rows: ((2 * d[rows] - 1) * x) @ K.mT + g[rows], s0 @ K.mT + g, **options)
        return d * x, *rest

    return _each_weight(run, K, d, g, torch.zeros_like(g) if s0 is None else s0)


def implicit_gradient(W: Tensor, c: Tensor, z: Tensor, g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Closed-form gradients of W (m, m) and c (B, m): ``u = D (I - D W)^-T g`` and ``u^T z``; dense, O(B m^3)."""
    D = derivative(W, c, z, activation)
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    u = D * solve_each((eye - D.unsqueeze(-1) * W).mT, g)[0]
    return u.mT @ z, u


def solve_each(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (n, m) and LAPACK's info (n,) of ``A x = b`` for n matrices A (n, m, m), as torch.linalg.solve_ex."""
    return one_by_one(torch.linalg.solve_ex, A, b)


def one_by_one(function: Callable[..., tuple[Tensor, ...]], *stacks: Tensor) -> tuple[Tensor, ...]:
    """``function`` of torch.linalg for stacks (n, ...) of matrices, the first (n, m, m).

    On the CPU one matrix after the other from m = 128 on: once torch.set_num_threads has been called, torch 2.13 with
    MKL fails in a batch of them ("Pivots given to lu_solve must all be greater or equal to 1", every time at m >= 200)
    or never returns (m = 150).
    """
    first = stacks[0]
    if first.device.type != "cpu" or first.shape[-1] < 128 or len(first) == 0:
        return function(*stacks)
    each = [function(*matrices) for matrices in zip(*stacks, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def cayley_solve(
    W: Tensor, c: Tensor, activation: str, z0: Tensor | None = None, *, alpha: float = 1.0, **options
) -> tuple[Tensor, ...]:
    """Fixed point of :func:`cell` by the reflected map ``x <- K (2 act(x) - x) + alpha (c + K c)``, ``z = act(x)``,
    with K of :func:`deq.solvers.cayley.cayley_matrix`, started at ``z0`` or zero; options and results of ``iterate``.

    Every x is judged by the residual of its z in the equation itself; ``iterations`` counts the products with K.
    """
    act = get_activation(activation).value

    def run(W: Tensor, c: Tensor, *z0: Tensor) -> tuple[Tensor, ...]:
        K = _cayley_matrix(W, alpha)
        shift = alpha * (c + c @ K.mT)
        u = z0[0] @ W.mT + c if z0 else c
        start = act(u) + alpha * (u - act(u))

        def step(x: Tensor, rows: Tensor) -> Tensor:
            return (2 * act(x) - x) @ K.mT + shift[rows]

        def judge(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            return act(x), act(act(x) @ W.mT + c[rows])

        return iterate(step, start, judge=judge, **options)

    return _each_weight(run, W, c, *(() if z0 is None else (z0,)))


def cayley_adjoint(A: Tensor, d: Tensor, g: Tensor, *, alpha: float = 1.0, **options) -> tuple[Tensor, ...]:
    """Fixed point of ``u = d * (A u + g)`` by ``x <- K (2 d - 1) x + alpha (g + K g)``, ``u = d * x``, with K of A: for
    ``A = W^T`` the transposed K of the forward solve. ``alpha`` other than 1 needs a d of zeros and ones.
    Judged and counted as :func:`cayley_solve`."""

    def run(A: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        K = _cayley_matrix(A, alpha)
        shift = alpha * (g + g @ K.mT)

        def step(x: Tensor, rows: Tensor) -> Tensor:
            return (2 * d[rows] - 1) * x @ K.mT + shift[rows]

        def judge(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            u = d[rows] * x
            return u, d[rows] * (u @ A.mT + g[rows])

        return iterate(step, alpha * g, judge=judge, **options)

    return _each_weight(run, A, d, g)


def _cayley_matrix(W: Tensor, alpha: float) -> Tensor:
    """``((1 + alpha) I - alpha W)^-1 ((1 - alpha) I + alpha W)``, by its definition."""
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    return torch.linalg.solve((1 + alpha) * eye - alpha * W, (1 - alpha) * eye + alpha * W)


def leaves_at(tol: float) -> float:
    """The residual at which a sample that contracts fast leaves: ``tol^1.1``, or ``tol`` where that is no smaller."""
    return tol ** (1 + MARGIN_POWER) if tol < 1 else tol  # a power of a large one is beyond the range


def iterate(
    f: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    *,
    tol: float,
    max_iter: int,
    acceleration: str = "none",
    depth: int = 5,
    criterion: str = "residual",
    judge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Iterate ``y <- f(y, rows)`` for every row of ``y`` (B, m) until its own residual is at most ``tol``.

    ``rows`` (n,) int64 names the samples that the n rows of the argument belong to. ``criterion="residual"`` judges
    ``r = ||f(y) - y|| / ||f(y)||``, ``"error"`` judges ``r q / (1 - q)`` with the measured contraction ``q``. A
    sample that does not contract slowly is taken to ``tol^1.1``. ``judge(y, rows)`` gives other pairs (point, its
    image) to judge and return in place of (y, f(y)).
    Returns z = f(y) (B, m), iterations (B,) int32, residual (B,), status (B,) uint8.
    """
    B, m = y.shape
    eps = torch.finfo(y.dtype).eps
    patience = max(PATIENCE, m)
    leave = leaves_at(tol)
    z = y.clone()
    iterations = torch.zeros(B, dtype=torch.int32, device=y.device)
    residual = torch.full((B,), torch.inf, dtype=y.dtype, device=y.device)  # of the best point, per sample
    status = torch.full((B,), int(Status.MAX_ITER), dtype=torch.uint8, device=y.device)

    rows = torch.arange(B, device=y.device)  # the samples still being solved; all below is indexed by position in it
    steps = torch.full((2, B), torch.inf, dtype=y.dtype, device=y.device)  # last two ||f(y) - y||
    best_at = torch.zeros(B, dtype=torch.int32, device=y.device)
    limit = torch.zeros(B, dtype=y.dtype, device=y.device)
    accelerated = torch.full((B,), acceleration == "anderson", device=y.device)
    history = _History(B if acceleration != "none" else 0, depth, m, y)

    for k in range(1, max_iter + 1):
        if rows.numel() == 0:
            break
        fy = f(y, rows)
        point, image = (y, fy) if judge is None else judge(y, rows)
        step, size = _norm(image - point), _norm(image)
        r = torch.where(step > 0, step / size, step)
        if k == 1:
            limit = torch.maximum(size, _norm(y)) / eps**2
        finite = torch.isfinite(step) & torch.isfinite(size)
        better = finite & (r < residual[rows])
        z[rows[better]] = image[better]
        residual[rows[better]] = r[better]
        best_at = torch.where(better, k, best_at)
        iterations[rows] = k

        q = torch.maximum(step / steps[0], steps[0] / steps[1]).nan_to_num(nan=1.0)
        if criterion == "residual":
            slow = step > SLOW_CONTRACTION * steps[0]
            converged = finite & (r <= tol) & ((r <= leave) | slow | (k == max_iter))
        else:
            measured = k > 2  # two ratios of three steps: the first step says little, whatever the start was
            converged = finite & ((step == 0) | (measured & (q < 1) & (r * q <= tol * (1 - q))))
        z[rows[converged]] = image[converged]
        residual[rows[converged]] = r[converged]
        at_floor = residual[rows] <= FLOOR_EPS * eps
        stalled = k - best_at >= torch.where(at_floor, PATIENCE_AT_FLOOR, patience)
        diverged = ~finite | (size > limit)
        for mask, verdict in ((stalled, Status.STALLED), (diverged, Status.DIVERGED), (converged, Status.CONVERGED)):
            status[rows[mask]] = int(verdict)

        if acceleration == "on_demand" and k >= SLOW_AFTER:
            accelerated = accelerated | (torch.minimum(step / steps[0], steps[0] / steps[1]) > SLOW_CONTRACTION)
        steps = torch.stack((step, steps[0]))
        if acceleration != "none":
            y = torch.where(accelerated.unsqueeze(-1), history.mix(y, fy, accelerated), fy)
        else:
            y = fy
        keep = ~(converged | stalled | diverged)
        if not keep.all():
            rows, y, best_at, limit, accelerated = (t[keep] for t in (rows, y, best_at, limit, accelerated))
            steps = steps[:, keep]
            history.keep(keep)
    return z, iterations, residual, status


class _History:
    """Anderson's window of the last ``depth`` pairs (f(y), f(y) - y) of every sample."""

    def __init__(self, B: int, depth: int, m: int, like: Tensor):
        self.F = like.new_zeros(B, depth, m)
        self.G = like.new_zeros(B, depth, m)
        self.count = torch.zeros(B, dtype=torch.int64, device=like.device)

    def keep(self, mask: Tensor) -> None:
        if self.F.shape[0]:
            self.F, self.G, self.count = self.F[mask], self.G[mask], self.count[mask]

    def mix(self, y: Tensor, fy: Tensor, active: Tensor) -> Tensor:
        """Add the pair of every active sample and return ``sum_i alpha_i f(y_i)`` with ``alpha`` minimising
        ``||sum_i alpha_i (f(y_i) - y_i)||`` subject to ``sum_i alpha_i = 1`` (Anderson 1965, type II)."""
        depth = self.F.shape[1]
        self.F[active] = torch.cat((fy.unsqueeze(1), self.F[:, :-1]), 1)[active]  # newest first
        self.G[active] = torch.cat(((fy - y).unsqueeze(1), self.G[:, :-1]), 1)[active]
        self.count = torch.where(active, (self.count + 1).clamp(max=depth), self.count)
        out = fy.clone()
        todo = active & torch.isfinite(fy).all(-1)
        for size in range(depth, 1, -1):  # drop the oldest pair until the normal equations can be trusted
            todo_now = todo & (self.count >= size)
            if not todo_now.any():
                continue
            G = self.G[todo_now, :size].double()
            unit = torch.frexp(G.abs().amax((-2, -1), keepdim=True)).exponent
            G = torch.ldexp(G, -unit.clamp(-1022, 1022))  # no digit is lost, and squares of any size are in range
            norms = G.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
            G = G / norms.unsqueeze(-1)  # unit diagonal: the regulariser below is relative by construction
            eye = torch.eye(size, dtype=torch.float64, device=G.device)
            L, info = torch.linalg.cholesky_ex(G @ G.mT + 10 * torch.finfo(fy.dtype).eps * eye)
            a = torch.cholesky_solve((1 / norms).unsqueeze(-1), L).squeeze(-1) / norms
            a = a / a.sum(-1, keepdim=True)
            trusted = (info == 0) & (a.abs().sum(-1) < MAX_WEIGHT)  # false for NaN
            index = todo_now.nonzero().squeeze(-1)[trusted]
            out[index] = torch.einsum("bs,bsm->bm", a[trusted].to(fy.dtype), self.F[index, :size])
            todo[index] = False
        return out


def _norm(y: Tensor) -> Tensor:
    """Row 2-norms that neither overflow nor underflow."""
    scale = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.sum(-1, keepdim=True)
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    return (y / scale).norm(dim=-1) * scale.squeeze(-1)


def _each_weight(run: Callable[..., tuple[Tensor, ...]], A: Tensor, *batches: Tensor) -> tuple[Tensor, ...]:
    """Flatten the sample dimensions, run once per weight matrix, restore the shapes."""
    shape = batches[0].shape
    weights = A.unsqueeze(0) if A.dim() == 2 else A
    if weights.shape[0] == 0:
        empty = batches[0].new_empty(shape[:-1])
        return batches[0].clone(), empty.int(), empty, empty.to(torch.uint8)
    flat = [b.reshape(weights.shape[0], -1, shape[-1]) for b in batches]
    parts = [run(w, *(b[s] for b in flat)) for s, w in enumerate(weights)]
    z, *rest = (torch.stack(t) for t in zip(*parts, strict=True))
    return (z.reshape(shape), *(t.reshape(shape[:-1]) for t in rest))
