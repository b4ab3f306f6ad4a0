"""One evaluation's worth of solving in plain PyTorch: any device, no host synchronisation, the oracle of the kernels.

Everything is decided by masks, sample by sample; a sample that is done keeps its point and is never written again.
"""

import torch
from torch import Tensor

from ...reference import FLOOR_EPS, MAX_WEIGHT, SLOW_AFTER, SLOW_CONTRACTION
from ...solution import Status
from .rule import GROWN, PATIENCE, PATIENCE_AT_FLOOR, SAFEGUARD, Rule

RUNNING = 255  # status of a sample that is not done


class TorchSteps:
    """The samples of a solve: ``y`` (B, D) are the points where f is wanted next, ``z`` (B, D) the best images.

    ``advance(fy)`` takes f(y), judges every sample and writes the next y.
    """

    def __init__(self, y: Tensor, rule: Rule):
        B, D = y.shape
        self.rule = rule
        self.y = y.clone()
        self.z = y.clone()
        self.eps = torch.finfo(y.dtype).eps
        wide = {"dtype": torch.float64, "device": y.device}
        self.evaluations = 0
        self.iterations = torch.zeros(B, dtype=torch.int32, device=y.device)
        self.residual = torch.full((B,), torch.inf, **wide)  # of the best image
        self.measure = torch.full((B,), torch.inf, **wide)  # what the best image was chosen by
        self.status = torch.full((B,), RUNNING, dtype=torch.uint8, device=y.device)
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
        self.head = torch.zeros(B, dtype=torch.int64, device=y.device)  # slot of the newest pair

    def is_running(self) -> bool:
        return bool((self.status == RUNNING).any())

    def advance(self, fy: Tensor) -> None:
        rule, y = self.rule, self.y
        self.evaluations += 1
        k = self.evaluations
        active = self.status == RUNNING
        g = fy - y
        step, size = norm(g), norm(fy)
        r = torch.where(step > 0, step / size, step)
        measure = step if rule.criterion == "absolute" else r
        if k == 1:
            self.limit = torch.maximum(size, norm(y)) / self.eps**2
        finite = torch.isfinite(step) & torch.isfinite(size)
        better = active & finite & (measure < self.measure)

        slow = step > SLOW_CONTRACTION * self.steps[0]
        if rule.criterion == "error":
            q = torch.maximum(step / self.steps[0], self.steps[0] / self.steps[1]).nan_to_num(nan=1.0)
            converged = (step == 0) | ((q < 1) & (r * q <= rule.tol * (1 - q)))
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
        restart = active & (self.count > 1) & astray & (self.restarted_at < self.best_at) & ~stalled
        lost = lost & ~restart
        verdict = torch.full_like(self.status, RUNNING)
        if k >= rule.max_iter:
            verdict.fill_(int(Status.MAX_ITER))
        grown = size > GROWN * self.eps**2 * self.limit
        verdict = torch.where(stalled, torch.where(grown, int(Status.DIVERGED), int(Status.STALLED)), verdict)
        verdict = torch.where(lost, torch.where(finite, int(Status.DIVERGED), int(Status.NONFINITE)), verdict)
        verdict = torch.where(converged, int(Status.CONVERGED), verdict).to(torch.uint8)
        self.status = torch.where(active, verdict, self.status)
        self.restarted_at = torch.where(restart, k, self.restarted_at)
        self.count = torch.where(restart, 0, self.count)

        if rule.method == "auto" and k >= SLOW_AFTER:
            self.accelerated |= torch.minimum(step / self.steps[0], self.steps[0] / self.steps[1]) > SLOW_CONTRACTION
        self.steps = torch.stack((step, self.steps[0]))
        going = active & (self.status == RUNNING)
        after = y + rule.damping * g if rule.damping != 1.0 else fy
        mixing = going & ~restart & self.accelerated
        if rule.method in ("anderson", "auto"):
            after = torch.where(mixing.unsqueeze(1), self._mix(fy, g, after, mixing), after)
        elif rule.method == "broyden":
            after = self._broyden(g, y, mixing)
        after = torch.where(restart.unsqueeze(1), self.z, after)
        lost_point = active & (self.status != RUNNING) & ~finite  # f is not asked there again
        self.y = torch.where(going.unsqueeze(1), after, torch.where(lost_point.unsqueeze(1), self.z, y))

    def _push(self, new: Tensor, mask: Tensor) -> Tensor:
        """Move the head of the samples in mask one slot on and count the pair; index (B, 1, 1) of the slot."""
        depth = self.F.shape[1]
        self.head = torch.where(mask, (self.head + 1) % depth, self.head)
        self.count = torch.where(mask, (self.count + 1).clamp(max=depth), self.count)
        return self.head.view(-1, 1, 1)

    def _mix(self, fy: Tensor, g: Tensor, after: Tensor, mask: Tensor) -> Tensor:
        """``sum_i a_i (x_i + beta g_i)`` with a minimising ``||sum_i a_i g_i||``, ``sum_i a_i = 1`` (Anderson 1965)."""
        slot = self._push(g, mask)
        wide = mask.view(-1, 1, 1)
        index = slot.expand(-1, 1, fy.shape[1])
        safe = torch.where(mask.unsqueeze(1), g, 0.0)
        image = torch.where(mask.unsqueeze(1), fy, 0.0).unsqueeze(1)
        self.F.scatter_(1, index, torch.where(wide, image, self.F.gather(1, index)))
        self.G.scatter_(1, index, torch.where(wide, safe.unsqueeze(1), self.G.gather(1, index)))
        dots = (self.G.double() @ safe.double().unsqueeze(2)).squeeze(2)
        row = slot.expand(-1, 1, self.gram.shape[2])
        self.gram.scatter_(1, row, torch.where(wide, dots.unsqueeze(1), self.gram.gather(1, row)))
        column = slot.expand(-1, self.gram.shape[1], 1)
        self.gram.scatter_(2, column, torch.where(wide, dots.unsqueeze(2), self.gram.gather(2, column)))
        a, size = self._weights()
        mixed = (a.unsqueeze(1) @ self.F.double()).squeeze(1)
        if self.rule.damping != 1.0:
            mixed = mixed - (1 - self.rule.damping) * (a.unsqueeze(1) @ self.G.double()).squeeze(1)
        return torch.where((size > 1).unsqueeze(1), mixed.to(fy.dtype), after)

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
        ``p_{j+1} = p_j + s_{j+1} (s_j . p_j) / |s_j|^2`` the new step is ``p_{n-1} / (1 - s_{n-1} . p_{n-1} /
        |s_{n-1}|^2)``: only dots of the steps with g and among themselves are needed. A full history, or a denominator
        that cannot be trusted, starts it afresh.
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
        row = slot.view(-1, 1, 1).expand(-1, 1, depth)
        self.gram.scatter_(1, row, torch.where(wide, new.unsqueeze(1), self.gram.gather(1, row)))
        column = slot.view(-1, 1, 1).expand(-1, depth, 1)
        self.gram.scatter_(2, column, torch.where(wide, new.unsqueeze(2), self.gram.gather(2, column)))
        return y + s


def norm(x: Tensor) -> Tensor:
    """(B,) float64 2-norms of rows, which neither overflow nor underflow."""
    if x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    scale = x.abs().amax(1) if x.shape[1] else x.sum(1)
    safe = torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)
    return torch.where(torch.isfinite(scale), torch.linalg.vector_norm(x / safe.unsqueeze(1), dim=1) * safe, scale)
