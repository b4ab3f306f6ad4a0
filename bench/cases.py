"""The problems that are timed, as data. Tests, ``deq bench`` and ``pytest bench`` read the same list."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deq import reference

TOL = 1e-5  # relative residual of forward and backward solves, every competitor's too


@dataclass(frozen=True)
class Case:
    """One problem: (m, B), a family of W, and ratios of forward + backward times to reach over baselines.

    ``new_weights``: W changes before every call, as it does in training, so that deq packs it anew inside its time.
    """

    m: int
    B: int
    family: str = "gaussian"
    dtype: str = "float32"
    seed: int = 0
    new_weights: bool = False
    must: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.family}-m{self.m}-B{self.B}-{self.dtype}" + ("-new" if self.new_weights else "")

    def make(self) -> "Problem":
        """The same tensors for the same case, everywhere."""
        generator = torch.Generator().manual_seed(self.seed)
        W = _FAMILIES[self.family](self.m, generator)
        c, g = (torch.randn(self.B, self.m, generator=generator, dtype=torch.float64) for _ in range(2))
        dtype = getattr(torch, self.dtype)
        return Problem(W.to(dtype), c.to(dtype), (g / self.B).to(dtype))


@dataclass(frozen=True, eq=False)
class Problem:
    """``z = relu(W z + c)``: W (m, m), c (B, m), and the gradient g (B, m) of a mean loss with respect to z."""

    W: Tensor
    c: Tensor
    g: Tensor

    def exact(self) -> tuple[Tensor, Tensor]:
        """z (B, m) and dL/dW (m, m) in float64, solved to rounding."""
        W, c, g = self.W.double(), self.c.double(), self.g.double()
        options = {"tol": 1e-13, "max_iter": 10_000}
        z, *_ = reference.solve(W, c, "relu", **options)
        d = reference.derivative(W, c, z, "relu")
        u, *_ = reference.masked_linear(W.mT, d, g, **options)
        return z, u.mT @ z


def _gaussian(m: int, generator: torch.Generator) -> Tensor:
    """Entries of std 0.45 / sqrt(m): 2-norm 0.9, the mild problem of an untrained layer."""
    return torch.randn(m, m, generator=generator, dtype=torch.float64) * (0.45 / m**0.5)


def _orthogonal(m: int, generator: torch.Generator) -> Tensor:
    """0.9 x orthogonal: three times as many iterations."""
    return 0.9 * torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q


_FAMILIES = {"gaussian": _gaussian, "orthogonal": _orthogonal}


CPU_CASES = (
    Case(64, 256, must={"loop": 2.0, "torchdeq": 10.0, "gemm": 0.9}),
    Case(256, 256, must={"loop": 1.4, "torchdeq": 2.5, "gemm": 1.1}),
    Case(512, 64, must={"loop": 1.4, "torchdeq": 2.0, "gemm": 1.2}),
    Case(2048, 16, must={"loop": 2.0, "torchdeq": 2.0, "gemm": 1.8}),
    Case(256, 256, new_weights=True),
    Case(2048, 16, new_weights=True),
    Case(17, 5),
    Case(128, 256),
    Case(1024, 256),
    Case(256, 256, family="orthogonal"),
    Case(256, 256, dtype="float64"),
)
KERNEL_CASES = tuple((m, B) for m in (64, 100, 128, 256, 512, 1024, 2048) for B in (8, 64))  # the micro-kernel alone
KERNEL_MUST = 0.9  # of the core's measured FMA peak
MEMORY_CASE = Case(256, 16384)
MEMORY_MUST = {"forward": 1.2, "forward + backward": 2.5}  # buffers of B x m elements
