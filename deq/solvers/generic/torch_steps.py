"""One evaluation's worth of solving in plain PyTorch: any device, no host synchronisation, the oracle of the kernels.

Everything is decided by masks, sample by sample; a sample that is done keeps its point and is never written again.
"""

import torch
from torch import Tensor

from ...reference import FLOOR_EPS, MAX_WEIGHT, SLOW_AFTER, SLOW_CONTRACTION
from ...solution import Status
from .result import Told
from .rule import GROWN, PATIENCE, PATIENCE_AT_FLOOR, SAFEGUARD, Rule

GRAM_ROUNDING = 1e-14  # of squares of residuals, summed in float64
RUNNING = 255  # status of a sample that is not done


class TorchSteps:
    """The samples of a solve: ``y`` (B, D) are the points where f is wanted next, ``z`` (B, D) the best images.

    ``advance(fy)`` takes f(y), judges every sample and writes the next y.
    """

    def __init__(self, y: Tensor, rule: Rule):
        B, D = y.shape
        self.rule = rule
        self.mixes = rule.method in ("anderson", "auto")
        self.y = y.clone()
        self.z = y.clone()
        self.eps = torch.finfo(y.dtype).eps
        wide = {"dtype": torch.float64, "device": y.device}
        self.evaluations = 0
        self.iterations = torch.zeros(B, dtype=torch.int32, device=y.device)
        self.residual = torch.full((B,), torch.inf, **wide)  # of the best image
        self.measure = torch.full((B,), torch.inf, **wide)  # what the best image was chosen by
        self.status = torch.full((B,), RUNNING, dtype=torch.uint8, device=y.device)
        self.norms = torch.zeros(B, 2, **wide)  # ||f(y) - y|| and ||f(y)|| of the last evaluation that was judged
        self.steps = torch.full((2, B), torch.inf, **wide)  # last two ||f(y) - y||
        self.limit = torch.zeros(B, **wide)
        self.best_at = torch.zeros(B, dtype=torch.int32, device=y.device)
        self.restarted_at = torch.full((B,), -1, dtype=torch.int32, device=y.device)
        self.accelerated = torch.full((B,), rule.method in ("anderson", "broyden"), device=y.device)
        self.count = torch.zeros(B, dtype=torch.int64, device=y.device)  # pairs in the history
        depth = rule.depth if rule.method in ("anderson", "auto", "broyden") else 0
        self.F = y.new_zeros(B, depth, D)  # Anderson: images; Broyden: steps
        self.G = y.new_zeros(B, depth if rule.method != "broyden" else 0, D)
        self.gram = torch.zeros(B, depth, depth, **wide)
        self.head = torch.full((B,), depth - 1, device=y.device)  # slot of the newest pair
        self.pairs = self.count  # without this evaluation's
        self._trace: list[Tensor] = []

    @property
    def told(self) -> Told:
        return Told(self.iterations, self.residual, self.status)

    def collect(self) -> None:
        """z is always complete."""

    def release(self) -> None:
        """Nothing waits for another solve."""

    def is_running(self) -> bool:
        return bool((self.status == RUNNING).any())

    def note(self) -> None:
        """The norms as they are go into the trace."""
        self._trace.append(self.norms.clone())

    @property
    def trace(self) -> Tensor | None:
        return torch.stack(self._trace) if self._trace else None

    def advance(self, fy: Tensor) -> None:
        rule, y = self.rule, self.y
        self.evaluations += 1
        k = self.evaluations
        active = self.status == RUNNING
        pushing = active & self.accelerated if self.mixes else None
        step, size, start = self._remember(fy, pushing)
        r = torch.where(step > 0, step / size, step)
        self.norms = torch.where(active.unsqueeze(1), torch.stack((step, size), 1), self.norms)
        measure = step if rule.criterion == "absolute" else r
        if k == 1:
            self.limit = torch.maximum(size, start) / self.eps**2
        finite = torch.isfinite(step) & torch.isfinite(size)
        better = active & finite & (measure < self.measure)

        slow = step > SLOW_CONTRACTION * self.steps[0]
        if rule.criterion == "error":
            q = torch.maximum(step / self.steps[0], self.steps[0] / self.steps[1]).nan_to_num(nan=1.0)
            measured = k > 2  # two ratios of three steps: the first step says little, whatever the start was
            converged = (step == 0) | (measured & (q < 1) & (r * q <= rule.tol * (1 - q)))
        else:
            last = k >= rule.max_iter
            converged = (measure <= rule.tol) & ((measure <= rule.leave) | slow | last)
        converged = active & finite & converged
        take = better | converged
        self.z = torch.where(take.unsqueeze(1), fy, self.z)
        self.residual = torch.where(take, r, self.residual)
        self.measure = torch.where(take, measure, self.measure)
        self.best_at = torch.where(take, k, self.best_at)
        self.iterations = torch.where(active, k, self.iterations)

        at_floor = self.residual <= FLOOR_EPS * self.eps
        stalled = k - self.best_at >= torch.where(at_floor, PATIENCE_AT_FLOOR, PATIENCE)
        lost = ~finite | (size > self.limit)
        # An accelerated sample that went astray goes on from its best image, once until it finds a better one.
        astray = lost | (measure > SAFEGUARD * self.measure)
        restart = active & (self.pairs > 1) & astray & (self.restarted_at < self.best_at) & ~stalled
        lost = lost & ~restart
        verdict = torch.full_like(self.status, RUNNING)
        if k >= rule.max_iter:
            verdict.fill_(int(Status.MAX_ITER))
        grown = size > GROWN * self.eps**2 * self.limit
        verdict = torch.where(stalled, torch.where(grown, int(Status.DIVERGED), int(Status.STALLED)), verdict)
        verdict = torch.where(lost, torch.where(finite, int(Status.DIVERGED), int(Status.NONFINITE)), verdict)
        # One that was within the tolerance on its way and came no nearer: what f rounds off may be more than that.
        met = (self.measure <= rule.tol) & (verdict != RUNNING) & (rule.criterion != "error")
        verdict = torch.where(converged | met, int(Status.CONVERGED), verdict).to(torch.uint8)
        self.iterations = torch.where(active & met, self.best_at, self.iterations)
        self.status = torch.where(active, verdict, self.status)
        self.restarted_at = torch.where(restart, k, self.restarted_at)
        self.count = torch.where(restart, 0, self.count)

        going = active & (self.status == RUNNING)
        after = torch.lerp(y, fy, rule.damping) if rule.damping != 1.0 else fy
        if self.mixes:
            weights, used = self._weights()
            mixing = pushing & going & ~restart & (used > 1)
            after = self._combine(weights, mixing, after)
            if rule.affine and rule.damping == 1.0 and rule.criterion != "error":
                going = going & ~self._take_known(weights, mixing, after, size)
        elif rule.method == "broyden":
            after = self._broyden(fy - y, y, going & ~restart)
        after = torch.where(restart.unsqueeze(1), self.z, after)
        if rule.method == "auto" and k >= SLOW_AFTER:  # from the next evaluation on
            self.accelerated |= torch.minimum(step / self.steps[0], self.steps[0] / self.steps[1]) > SLOW_CONTRACTION
        self.steps = torch.stack((step, self.steps[0]))
        lost_point = active & (self.status != RUNNING) & ~finite  # f is not asked there again
        self.y = torch.where(going.unsqueeze(1), after, torch.where(lost_point.unsqueeze(1), self.z, y))

    def _remember(self, fy: Tensor, pushing: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The norms of fy - y, fy and y (B,); the pairs of the samples in ``pushing`` enter their history."""
        g = fy - self.y
        norms = norm(g), norm(fy), norm(self.y)
        self.pairs = self.count
        if pushing is None:
            return norms
        slot = self._next_slot(pushing)
        finite = (pushing & torch.isfinite(norms[0]) & torch.isfinite(norms[1])).unsqueeze(1)
        index = slot.view(-1, 1, 1).expand(-1, 1, fy.shape[1])
        for history, new in ((self.F, fy), (self.G, g)):
            history.scatter_(1, index, torch.where(finite, new, history.gather(1, index).squeeze(1)).unsqueeze(1))
        dots = (self.G.double() @ torch.where(finite, g, 0.0).double().unsqueeze(2)).squeeze(2)
        self._enter(slot, dots, pushing)
        return norms

    def _next_slot(self, pushing: Tensor) -> Tensor:
        """(B,) where the new pair goes, counted in."""
        depth = self.F.shape[1]
        self.head = torch.where(pushing, (self.head + 1) % depth, self.head)
        self.count = torch.where(pushing, (self.count + 1).clamp(max=depth), self.count)
        return self.head

    def _enter(self, slot: Tensor, dots: Tensor, rows: Tensor) -> None:
        """Put dots (B, depth) into the slot's row and column of the Gram matrices of ``rows``."""
        depth = self.gram.shape[1]
        rows = rows.view(-1, 1, 1)
        for dim, new in ((1, dots.unsqueeze(1)), (2, dots.unsqueeze(2))):
            index = slot.view(-1, 1, 1).expand(-1, *((1, depth) if dim == 1 else (depth, 1)))
            self.gram.scatter_(dim, index, torch.where(rows, new, self.gram.gather(dim, index)))

    def _combine(self, a: Tensor, mixing: Tensor, after: Tensor) -> Tensor:
        """``sum_i a_i (x_i + beta g_i)`` for the samples in ``mixing``, with a minimising ``||sum_i a_i g_i||`` and
        ``sum_i a_i = 1`` (Anderson 1965); ``after`` for the others."""
        mixed = (a.unsqueeze(1) @ self.F.double()).squeeze(1)
        if self.rule.damping != 1.0:
            mixed = mixed - (1 - self.rule.damping) * (a.unsqueeze(1) @ self.G.double()).squeeze(1)
        return torch.where(mixing.unsqueeze(1), mixed.to(after.dtype), after)

    def _take_known(self, a: Tensor, mixing: Tensor, mixed: Tensor, size: Tensor) -> Tensor:
        """Ends samples whose mixed point is known to satisfy the tolerance; returns which.

        Of an affine f the image of the mixed point is the mix of the images, and its residual that of the residuals:
        what the next evaluation would say is known before it. What rounding may hide is added to the residual.
        """
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        square = (a.unsqueeze(1) @ self.gram @ a.unsqueeze(2)).reshape(-1).clamp(min=0)
        rounded = (a.abs() * diagonal.sqrt()).sum(1).square()
        residual = (square + GRAM_ROUNDING * rounded).sqrt() + 4 * self.eps * a.abs().sum(1) * size
        known = mixing & (residual <= self.rule.tol * (1.0 if self.rule.criterion == "absolute" else size))
        self.z = torch.where(known.unsqueeze(1), mixed, self.z)
        self.residual = torch.where(known, residual / size, self.residual)
        self.status = torch.where(known, int(Status.CONVERGED), self.status)
        return known

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Weights (B, depth) by slot and how many pairs they use (B,): the oldest are dropped until the normal
        equations, scaled to unit diagonal, can be trusted."""
        B, depth, _ = self.gram.shape
        order = (self.head.unsqueeze(1) - torch.arange(depth, device=self.head.device)) % depth  # newest first
        gram = self.gram.gather(1, order.unsqueeze(2).expand(-1, -1, depth))
        gram = gram.gather(2, order.unsqueeze(1).expand(-1, depth, -1))
        best = torch.zeros(B, depth, dtype=torch.float64, device=gram.device)
        used = torch.ones(B, dtype=torch.int64, device=gram.device)
        for n in range(2, depth + 1):
            A = gram[:, :n, :n]
            scale = A.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
            A = A * scale.unsqueeze(1) * scale.unsqueeze(2)
            A = A + 10 * self.eps * torch.eye(n, dtype=A.dtype, device=A.device)
            L, info = torch.linalg.cholesky_ex(A)
            a = torch.cholesky_solve(scale.unsqueeze(2), L).squeeze(2) * scale
            a = a / a.sum(1, keepdim=True)
            trusted = (self.count >= n) & (info == 0) & (a.abs().sum(1) < MAX_WEIGHT)
            best[:, :n] = torch.where(trusted.unsqueeze(1), a, best[:, :n])
            used = torch.where(trusted, n, used)
        return torch.zeros_like(best).scatter_(1, order, best), used

    def _broyden(self, g: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """The next point of the good Broyden method started from the plain iteration (Kelley 1995, chapter 7).

        The history holds the steps s_0..s_{n-1} since the last restart, oldest in slot 0. With ``p_0 = g`` and
        ``p_{j+1} = p_j + s_{j+1} q_j``, ``q_j = s_j . p_j / |s_j|^2``, the new step is ``p_{n-1} / (1 - q_{n-1})``:
        only dots of the steps with g and among themselves are needed. A full history, or a denominator that cannot be
        trusted, starts it afresh.
        """
        depth = self.F.shape[1]
        n = self.count
        dots = (self.F.double() @ g.double().unsqueeze(2)).squeeze(2)  # s_j . g
        coefficients, last = torch.zeros_like(dots), torch.zeros_like(dots[:, 0])  # of s_i in p
        for j in range(depth):
            projection = dots[:, j] + (self.gram[:, j] * coefficients).sum(1)
            ratio = projection / self.gram[:, j, j]
            if j + 1 < depth:
                coefficients[:, j + 1] = torch.where(j + 1 < n, ratio, coefficients[:, j + 1])
            last = torch.where(j == n - 1, ratio, last)
        denominator = torch.where(n > 0, 1 - last, 1.0)
        trusted = torch.isfinite(denominator) & (denominator.abs() > 1e-3) & torch.isfinite(coefficients).all(1)
        # A full history cannot take the new step: it begins again with this plain one.
        fresh = ~trusted | (n >= depth)
        factor = torch.where(fresh, 1.0, 1 / denominator)
        coefficients = torch.where((fresh | (n == 0)).unsqueeze(1), 0.0, coefficients)
        combined = (coefficients.to(self.F.dtype).unsqueeze(1) @ self.F).squeeze(1)
        s = factor.to(g.dtype).unsqueeze(1) * (g + combined)
        plain = fresh | (n == 0)
        s = torch.where(plain.unsqueeze(1), self.rule.damping * g, s)
        slot = torch.where(fresh, 0, n).clamp(max=depth - 1)
        self.count = torch.where(mask, torch.where(fresh, 1, n + 1), self.count)
        wide = mask.view(-1, 1, 1)
        index = slot.view(-1, 1, 1).expand(-1, 1, g.shape[1])
        kept = torch.where(mask.unsqueeze(1), s, 0.0).unsqueeze(1)
        self.F.scatter_(1, index, torch.where(wide, kept, self.F.gather(1, index)))
        new = (self.F.double() @ kept.double().transpose(1, 2)).squeeze(2)
        self._enter(slot, new, mask)
        return y + s


def norm(x: Tensor) -> Tensor:
    """(B,) float64 2-norms of rows, which neither overflow nor underflow."""
    if x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    scale = x.abs().amax(1) if x.shape[1] else x.sum(1)
    safe = torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)
    return torch.where(torch.isfinite(scale), torch.linalg.vector_norm(x / safe.unsqueeze(1), dim=1) * safe, scale)
