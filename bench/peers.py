"""``deq bench peers``: equilibria of convolution and attention blocks, forward + backward, against torchdeq.

deq's own layer, and a program written for torchdeq that imports deq.torchdeq instead, run the same block to the same
relative tolerance with the same method forward and backward. ``block`` is the block alone: as many evaluations and
vector-Jacobian products as deq needs, judged by nobody. Where that is less than half of torchdeq's time, both must be
twice as fast as torchdeq, and never slower; a figure counts only with an answer within the tolerance of the float64
solution. The error of a gradient is recorded: a kink that lies between two such answers shows in it, 8e-3 for one
element of the convolutions' 8192.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deq import torchdeq as drop_in
from deq.nn import Equilibrium

from .timing import interleave, thread_clock
from .timing import threads as use_threads

TOL, LIMIT = 1e-4, 200
JUDGED = ("deq", "deq.torchdeq")
# The solver by deq's and torchdeq's name, and whether the gradient is the exact one; "phantom" is what torchdeq does by
# default, one differentiated step after the plain iteration.
METHODS = {
    "plain": ("plain", "fixed_point_iter", True),
    "anderson": ("anderson", "anderson", True),
    "phantom": ("plain", "fixed_point_iter", False),
}


class Convolution(nn.Module):
    """The residual block of a multiscale DEQ: two convolutions, group norms, an injection between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(z)))
        return torch.relu(self.norms[1](0.3 * z + x + 0.3 * self.second(y)))


class Attention(nn.Module):
    """A pre-norm transformer layer that contracts: attention and a small net, damped, with the input injected."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        B, T, D = z.shape
        q, k, v = self.qkv(z + x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        y = self.norm(x + 0.3 * z + 0.5 * self.out(attended))
        return y + 0.3 * self.net(y)


@dataclass(frozen=True)
class PeerCase:
    """A block and the shape of its state."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def problem(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The block, its input and the gradient of a loss."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = self.make()
        x, g = (torch.randn(self.shape, generator=generator) for _ in range(2))
        return block, x.requires_grad_(), g


CASES = (
    PeerCase("conv-2x8x4x4", lambda: Convolution(8), (2, 8, 4, 4)),
    PeerCase("conv-8x16x8x8", lambda: Convolution(16), (8, 16, 8, 8)),
    PeerCase("conv-16x32x16x16", lambda: Convolution(32), (16, 32, 16, 16)),
    PeerCase("attention-2x4x16", lambda: Attention(16), (2, 4, 16)),
    PeerCase("attention-4x16x32", lambda: Attention(32), (4, 16, 32)),
    PeerCase("attention-16x32x64", lambda: Attention(64), (16, 32, 64)),
)


Answer = tuple[Tensor, tuple[Tensor, ...]]  # z, and the gradients of x and the parameters


def competitors(case: PeerCase, method: str) -> tuple[dict[str, Callable[[], Answer]], dict[str, int]]:
    """Calls that solve and differentiate once, by name; and deq's evaluations forward and products backward."""
    from torchdeq import get_deq

    block, x, g = case.problem()
    wanted = (x, *block.parameters())
    solver, theirs, is_exact = METHODS[method]
    how = {"backward_solver": solver} if is_exact else {"backward": "one_step"}
    layer = Equilibrium(block, solver=solver, tol=TOL, max_iter=LIMIT, **how)
    options = {"ift": is_exact, "f_max_iter": LIMIT, "b_max_iter": LIMIT, "f_tol": TOL, "b_tol": TOL}
    options |= {"f_stop_mode": "rel", "b_stop_mode": "rel", "f_solver": theirs, "b_solver": theirs}

    def through(model: nn.Module) -> Answer:
        z = model(lambda z: block(z, x), torch.zeros_like(x))[0][-1]
        return z, torch.autograd.grad(z, wanted, g)

    def engine() -> Answer:
        z = layer(x)
        return z, torch.autograd.grad(z, wanted, g)

    counts = _counts(block, engine)
    torchdeq, ours = get_deq(**options), drop_in.get_deq(**options)
    return {
        "deq": engine,
        "deq.torchdeq": lambda: through(ours),
        "torchdeq": lambda: through(torchdeq),
        "block": lambda: bare(block, x, g, **counts),
    }, counts


def bare(block: nn.Module, x: Tensor, g: Tensor, forward: int, backward: int) -> Answer:
    """The plain iteration, so many evaluations and products of it, judged by nobody."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(forward):
            z = block(z, x)
    point = z.requires_grad_()
    image = block(point, x)
    u = g
    for _ in range(backward):
        (u,) = torch.autograd.grad(image, point, u, retain_graph=True)
        u = u + g
    return image, torch.autograd.grad(image, (x, *block.parameters()), u)


def exact(case: PeerCase, is_exact: bool = True) -> Answer:
    """The answer in float64, both iterations run until rounding is all that is left; or with the one-step gradient."""
    block, x, g = case.problem()
    x = x.detach().double().requires_grad_()
    z, gradients = bare(block.double(), x, g.double(), forward=200, backward=200 if is_exact else 0)
    return z.detach(), gradients


def _counts(block: nn.Module, run: Callable[[], Answer]) -> dict[str, int]:
    """Evaluations of ``block`` in ``run`` before the one that is differentiated, and products before the last."""
    counts = {"forward": -1, "backward": -1}

    def count(module: nn.Module, inputs: tuple, image: Tensor) -> None:
        counts["forward"] += 1
        if image.requires_grad:
            image.register_hook(lambda g: counts.update(backward=counts["backward"] + 1))

    hook = block.register_forward_hook(count)
    run()
    hook.remove()
    return counts


def measure(case: PeerCase, method: str, threads: int, seconds: float) -> list[dict]:
    """One row a competitor: ``ratio`` over deq's time, ``lead``, torchdeq's time over its own, ``residual``, the worst
    sample's of the answer, ``error`` and ``gradient_error``, the distances to the float64 solution of the worst sample
    and of the worst gradient, relative."""
    with use_threads(threads):
        runs, counts = competitors(case, method)
        block, x, _ = case.problem()
        quality = {}
        solution, gradients = exact(case, METHODS[method][2])
        for name, run in runs.items():
            z, found = run()
            z = z.detach()
            with torch.no_grad():
                residual = (block(z, x) - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
            error = (z - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, gradients, strict=True))
            quality[name] = {"residual": float(residual.max()), "error": float(error.max()), "gradient_error": worst}
        timings = interleave(runs, seconds, clock=thread_clock(threads))
    share = timings["block"].median / timings["torchdeq"].median
    must = 2.0 if share < 0.5 else 1.0
    return [
        {
            "case": case.name,
            "method": method,
            "variant": name,
            "threads": threads,
            "median": timing.median,
            "turns": len(timing.turns),
            "ratio": timing.ratio(timings["deq"]),
            "lead": (lead := timings["torchdeq"].ratio(timing)),
            "block_share": share,
            "must": must if name in JUDGED else None,
            "reached": lead >= must and quality[name]["error"] <= TOL if name in JUDGED else None,
            **quality[name],
            **counts,
        }
        for name, timing in timings.items()
    ]


def steps(threads: tuple[int, ...], seconds: float) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """What there is to measure, with a name each."""
    for count in threads:
        for case in CASES:
            for method in METHODS:
                yield f"{case.name} {method}", lambda c=case, m=method, t=count: measure(c, m, t, seconds)
