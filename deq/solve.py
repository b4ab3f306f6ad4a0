"""The front door: check the arguments, plan, run."""

import torch
from torch import Tensor

from . import _library, traced
from .modes import lacks_numbers, no_autocast
from .options import DTYPES, problem_of, unknown_option
from .run import run
from .solution import Solution
from .weights import Structure

# The mode in which make_fx and torch.func.linearize write operators into a graph; a call to ask would take 0.1 us.
_RECORDING = torch._C._TorchDispatchModeKey.PROXY


def solve(
    W: Tensor | Structure,
    c: Tensor,
    activation: str = "relu",
    *,
    z0: Tensor | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    solver: str = "auto",
    criterion: str = "residual",
    backward: str = "implicit",
    on_failure: str = "warn",
    backend: str = "auto",
    **unknown,
) -> Solution:
    """Equilibrium ``z = act(W z + c)`` of every sample, with exact gradients for W and c.

    Args:
        W: (m, m), a structure from :mod:`deq.weights`, or batched (S, m, m) with ``c`` (S, ..., m). float32, float64,
            bfloat16 or float16; 16-bit problems are solved in float32 and rounded once. Autocast changes nothing.
        c: (..., m) injection ``U x + b``, dtype and device of W. Any strides. On the meta device, or of a
            FakeTensorMode, the solution has shapes, dtypes and gradients alike, and no numbers.
        activation: a name of :data:`deq.activations.ACTIVATIONS`.
        z0: starting point, shape of c; zero if None. No gradient flows to it.
        tol: relative tolerance; 1e-5 in float32, 1e-10 in float64, 1e-4 in 16 bits if None. Serves the gradient too.
        max_iter: evaluations allowed for each sample, and for its gradient.
        solver: "plain" iterates ``z <- act(W z + c)`` strictly; "anderson" accelerates every sample from the start;
            "cayley" iterates the reflected map of :mod:`deq.solvers.cayley`, which converges for every monotone W, and
            the plain one, accelerated, from where that ends short of tol;
            "direct" solves without iterating on z: the identity activation with any W, and LowerTriangular, Diagonal
            and DiagonalLowRank of deq.weights (``z`` is then the point judged); "auto" chooses, and takes samples that
            are slow or fail to other means (:mod:`deq.solvers.ladder`).
        criterion: "residual" stops a sample at ``r = ||f(y) - y|| / ||f(y)|| <= tol``; "error" stops it at
            ``r q / (1 - q) <= tol`` with the measured contraction q of its steps, an estimate of the distance to the
            fixed point. It holds for the plain iteration, down to the rounding that 1 / (1 - q) enlarges; Anderson's
            steps ("anderson", "auto" where it helps) shrink faster than what is left of slow modes, and the distance
            may be far above tol: up to 3 tol with a mode of 0.9, 130 with one of 0.99 (tanh, W = 0.99 / m, m = 300,
            float64; 520 in float32). Ask for solver="plain" where it matters.
        backward: "implicit" is exact; "one_step" (JFB) differentiates one evaluation at the equilibrium, "phantom" five
            damped ones, "unrolled" the whole plain iteration, which is then what solves.
        on_failure: "warn", "raise" (:class:`deq.ConvergenceError`) or "ignore" when samples do not converge.
        backend: "auto"; "cpu", the compiled engine; "triton", kernels for NVIDIA GPUs, or for CPU tensors in Triton's
            interpreter; "cuda", compiled kernels that keep W on the chip, and Triton's for what they do not hold;
            "reference", plain PyTorch.

    Returns:
        Solution with ``z`` (..., m) and the iterations, residual and status (...) of every sample.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed; also for NaN or infinity in W, c, z0.
        ConvergenceError: with ``on_failure="raise"``, carrying the solution.
    """
    if unknown:
        raise TypeError(unknown_option("deq.solve", next(iter(unknown.items())), solve.__kwdefaults__))
    _check_tensors(W.like() if isinstance(W, Structure) else W, c, z0)
    frozen = not (W.requires_grad and torch.is_grad_enabled())
    options = activation, tol, max_iter, solver, criterion, backward, on_failure, backend
    if torch.compiler.is_compiling():
        return traced.solve(W, c, z0, *options, frozen)
    device = "cpu" if c.is_cpu else c.device.type
    place = str(c.device) if device == "cuda" else device  # one GPU may have kernels and another none
    given = *options, c.dtype, place, _library.compiled is not None
    try:
        problem = problem_of(*given)
    except TypeError:  # an option that cannot be a key, or a wrong one: its own error
        problem = problem_of.__wrapped__(*given)
    if lacks_numbers(c) or torch._C._get_dispatch_mode(_RECORDING) is not None:
        return traced.solve(W, c, z0, *options, frozen)
    if torch._C._is_tracing():  # by torch.jit.trace, whose graphs serve known weights, with and without gradients
        return traced.solve(W, c, z0, *options, True)
    if torch.is_autocast_enabled(device):  # which would round the products, and with them what is judged
        with no_autocast(device):
            return run(W, c, z0, problem, solver, backward, frozen)
    return run(W, c, z0, problem, solver, backward, frozen)


def _check_tensors(W: object, c: object, z0: object) -> None:
    if not isinstance(W, Tensor):
        raise TypeError(f"W must be a torch.Tensor or a structure from deq.weights; got {type(W).__name__}")
    if not isinstance(c, Tensor):
        raise TypeError(f"c must be a torch.Tensor; got {type(c).__name__}")
    weight, injection = W.shape, c.shape
    dims = len(weight)
    if dims not in (2, 3) or weight[-1] != weight[-2]:
        raise ValueError(f"W must be (m, m) or (S, m, m); got shape {tuple(weight)}")
    m = weight[-1]
    if m == 0:
        raise ValueError(f"W must have width m of at least 1; got shape {tuple(weight)}")
    if len(injection) < dims - 1 or injection[-1] != m or (dims == 3 and injection[0] != weight[0]):
        leading = "..., " if dims == 2 else f"{weight[0]}, ..., "
        raise ValueError(f"c must be ({leading}{m}) for W {tuple(weight)}; got shape {tuple(injection)}")
    if W.layout is not torch.strided:
        raise TypeError(f"W must be dense; got layout {W.layout}")
    if W.dtype not in DTYPES:
        raise TypeError(f"W must be {', '.join(DTYPES.values())}; got {W.dtype}")
    _check_like("c", c, W)
    if z0 is not None:
        if not isinstance(z0, Tensor):
            raise TypeError(f"z0 must be a torch.Tensor; got {type(z0).__name__}")
        _check_like("z0", z0, W)
        if z0.shape != injection:
            raise ValueError(f"z0 must have the shape of c, {tuple(injection)}; got {tuple(z0.shape)}")


def _check_like(name: str, value: Tensor, W: Tensor) -> None:
    if value.dtype != W.dtype:
        raise TypeError(f"{name} must have the dtype of W, {W.dtype}; got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense; got layout {value.layout}")
    if not (value.is_cpu and W.is_cpu) and value.device != W.device:
        raise ValueError(f"{name} must be on the device of W, {W.device}; got {value.device}")
