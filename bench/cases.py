"""The problems that are timed, as data. Tests, ``deq bench`` and ``pytest bench`` read the same list."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deq import reference
from deq.solution import Status

from . import families

TOL = 1e-5  # relative residual of forward and backward solves, every competitor's too


@dataclass(frozen=True)
class Case:
    """One problem: (m, B), a family of bench/families.py, and ratios of forward + backward times that the plain map has
    to reach over baselines.

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

    @classmethod
    def named(cls, name: str) -> "Case":
        """The case that has this name; its requirements are not part of it."""
        family, m, B, dtype, *new = name.split("-")
        return cls(int(m[1:]), int(B[1:]), family, dtype, new_weights=bool(new))

    def make(self) -> "Problem":
        """The same tensors for the same case, everywhere."""
        generator = torch.Generator().manual_seed(self.seed)
        W, c = families.draw(self.family, self.m, self.B, generator)
        g = torch.randn(self.B, self.m, generator=generator, dtype=torch.float64) / self.B
        dtype = getattr(torch, self.dtype)
        return Problem(W.to(dtype), c.to(dtype), g.to(dtype))


@dataclass(frozen=True, eq=False)
class Problem:
    """``z = relu(W z + c)``: W (m, m), c (B, m), and the gradient g (B, m) of a mean loss with respect to z."""

    W: Tensor
    c: Tensor
    g: Tensor

    def to(self, device: torch.device) -> "Problem":
        return Problem(*(t.to(device) for t in (self.W, self.c, self.g)))

    def exact(self) -> tuple[Tensor, Tensor]:
        """z (B, m), where the plain iteration leads if it converges, and dL/dW (m, m); float64, solved to rounding."""
        W, c, g = self.W.double(), self.c.double(), self.g.double()
        options = {"tol": 1e-13, "max_iter": 10_000}
        z, _, _, status = reference.solve(W, c, "relu", **options)
        if (status == Status.CONVERGED).all():
            d = reference.derivative(W, c, z, "relu")
            u, *_ = reference.masked_linear(W.mT, d, g, **options)
            return z, u.mT @ z
        z = peaceman_rachford(W, c, torch.relu)
        d = reference.derivative(W, c, z, "relu")
        return z, peaceman_rachford(W.mT, g, lambda u: d * u).mT @ z

    def changer(self) -> Callable[[], None]:
        """A call moves one entry of W by a few units in its last place, to a value that it never had before."""
        entry, step = self.W[0, 0].item(), torch.finfo(self.W.dtype).eps
        count = 0

        def change() -> None:
            nonlocal count
            count += 1
            self.W[0, 0] = entry * (1.0 + count * step)

        return change


def peaceman_rachford(W: Tensor, c: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``z = act(W z + c)`` for every W with ``sym(W) < I``: ``u <- K (2 act(u) - u) + 2 V c`` with ``K = V W``,
    ``V = (2 I - W)^-1`` contracts to ``u = W z + c``."""
    V = torch.linalg.inv(2 * torch.eye(len(W), dtype=W.dtype) - W)
    K, injection = V @ W, 2 * c @ V.mT
    u = injection
    for _ in range(10_000):
        last, u = u, torch.addmm(injection, 2 * act(u) - u, K.mT)
        if torch.linalg.vector_norm(u - last) <= 1e-14 * torch.linalg.vector_norm(u):
            break
    return act(u)


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
# What deq chooses by itself, forward and in training, is held to the goals of bench/goals.py on these.
AUTO_CASES = (
    *(Case(m, 256) for m in (64, 128, 256, 1024)),
    *(Case(m, B) for m, B in ((256, 1), (512, 64), (1024, 4), (2048, 16), (2048, 64))),
    *(Case(m, B, "radius1.0") for m, B in ((64, 256), (128, 256), (256, 256), (512, 64), (1024, 16))),
    *(Case(256, 256, family) for family in ("orthogonal0.99", "symmetric0.99", "outlier0.95")),
    *(Case(128, 256, family) for family in ("trained10", "trained15", "trained20")),
    *(Case(256, 256, family) for family in ("monotone0.1", "monotone1.0")),
)
# By value: first the shapes that a goal names, then the rest of the grid.
GPU_CASES = tuple(
    Case(m, B)
    for m, B in (
        *((64, 256), (256, 256), (1024, 256), (4096, 4096), (1024, 4096), (2048, 1), (2048, 32), (4096, 1), (4096, 8)),
        *((256, 1024), (300, 64), (64, 1), (256, 1), (1024, 1), (64, 4096), (256, 4096), (1024, 32)),
        *((512, 1), (512, 32), (512, 256), (512, 4096), (2048, 256), (2048, 4096), (4096, 256)),
        *((8192, 1), (8192, 32), (8192, 256), (8192, 4096)),
    )
)
SCALING_CASES = (  # from one thread to two, 128 x 16 the smallest of which much is asked
    *(Case(m, B) for m, B in ((128, 16), (128, 64), (256, 16))),
    Case(256, 256),
    Case(2048, 64),
    *(Case(m, B, "radius1.0") for m, B in ((128, 256), (256, 256), (512, 64), (1024, 16))),
)
KERNEL_CASES = tuple((m, B) for m in (64, 100, 128, 256, 512, 1024, 2048) for B in (8, 64))  # the micro-kernel alone
KERNEL_MUST = 0.9  # of the core's measured FMA peak
# Solves whose instructions are counted (bench/instructions.py): activation and acceleration by their numbers in C; and
# steps whose evaluations, products, operators and bytes are (bench/guard.py): m, B, activation, solver.
INSTRUCTION_ISAS = ("avx2", "portable")
_RELU = {"m": 64, "B": 16, "activation": 1, "dtype": "float32", "masked": False, "acceleration": 0, "radius": 0.6}
INSTRUCTION_CASES = {
    "relu": _RELU,
    "relu-wide": _RELU | {"m": 160, "B": 24},
    "one-sample": _RELU | {"m": 100, "B": 1},
    "tanh": _RELU | {"activation": 6},
    "adjoint": _RELU | {"masked": True},
    "double": _RELU | {"dtype": "float64"},
    "anderson": _RELU | {"acceleration": 1},
}
COUNT_CASES = {
    "plain": (64, 32, "relu", "plain"),
    "auto": (192, 48, "relu", "auto"),
    "gelu": (48, 16, "gelu", "plain"),
    "anderson": (64, 32, "relu", "anderson"),
    "cayley": (64, 32, "relu", "cayley"),
}
MEMORY_CASE = Case(256, 16384)
MEMORY_MUST = {"forward": 1.2, "forward + backward": 2.5}  # buffers of B x m elements
