"""The front door for any function: check the arguments, solve, attach the gradient, report."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .applied import Applied
from .closures import exchanged, exchanges, graph_break, in_forward_mode, in_transform, watched
from .equation import Equation, closed_over
from .function_options import listed, rules_of
from .held import Call, frozen, held, with_others
from .implicit_function import attached
from .implicit_function import fixed_point as implicit
from .inexact import differentiated
from .members import Members, Unsteady, may_train, members_of, modules_used
from .modes import apart_from_autocast, lacks_numbers, refuse_tracing
from .solution import Solution, outside_of_transforms, report_failures
from .solvers import generic
from .solvers.generic import Rule
from .state import Layout, OneState, State, layout_of


class StateSolution(Solution):
    """A :class:`deq.Solution` of :func:`deq.fixed_point`: z is a state, its samples lie in the leading dimensions.

    z: tensor, tuple or list like z0. iterations, residual, status: of every sample, see Solution. trajectory: the best
    states after the evaluations that ``keep`` named, without gradient.
    """

    def __init__(self, z: State, told: generic.Told, samples: tuple[int, ...], plan: object, trajectory: Sequence = ()):
        super().__init__(z, None, plan)
        self._told, self._samples = told, samples  # what is told, and the sizes of the dimensions that count samples
        self.trajectory = list(trajectory)

    @property
    def iterations(self) -> Tensor:
        return self._told.iterations.reshape(self._samples)

    @property
    def residual(self) -> Tensor:
        return self._told.residual.reshape(self._samples)

    @property
    def status(self) -> Tensor:
        return self._told.status.reshape(self._samples)

    def detach(self) -> "StateSolution":
        z = self.z.detach() if isinstance(self.z, Tensor) else type(self.z)(part.detach() for part in self.z)
        kind = StateSolutionOfTransform if in_transform() else StateSolution
        return kind(z, self._told, self._samples, self.plan, self.trajectory)

    def __repr__(self) -> str:
        total = self.status.numel()
        most = int(self.iterations.max()) if total else 0
        worst = float(self.residual.max()) if total else 0.0
        shapes = [tuple(part.shape) for part in ((self.z,) if isinstance(self.z, Tensor) else self.z)]
        return (
            f"Solution(z={', '.join(map(str, shapes))}, converged={int(self.converged.sum())}/{total}, "
            f"iterations<={most}, residual<={worst:.1e}, plan={self.plan})"
        )


class StateSolutionOfTransform(StateSolution):
    """As :class:`deq.solution.SolutionOfTransform`."""

    @property
    def z(self) -> State:
        parts = (self._z,) if isinstance(self._z, Tensor) else self._z
        if any(map(is_functorch_wrapped_tensor, (*parts, self._told.status))) and not in_transform():
            bare = lambda t: outside_of_transforms(t)[0]  # noqa: E731
            parts = list(map(bare, parts))
            self._z = parts[0] if isinstance(self._z, Tensor) else type(self._z)(parts)
            names = ("iterations", "residual", "status")
            told, batches = zip(*(outside_of_transforms(getattr(self._told, name)) for name in names), strict=True)
            self._told, self._samples = generic.Told(*told), (*told[0].shape[: batches[0]], *self._samples)
            self.trajectory = [bare(t) if isinstance(t, Tensor) else type(t)(map(bare, t)) for t in self.trajectory]
        return self._z

    @z.setter
    def z(self, z: State) -> None:
        self._z = z

    @property
    def iterations(self) -> Tensor:
        _ = self.z
        return super().iterations

    @property
    def residual(self) -> Tensor:
        _ = self.z
        return super().residual

    @property
    def status(self) -> Tensor:
        _ = self.z
        return super().status

    def __getstate__(self) -> dict:
        _ = self.z
        return super().__getstate__()


def fixed_point(
    f: Callable[[OneState], OneState],
    z0: OneState,
    *,
    solver: str = "anderson",
    tol: float | None = None,
    max_iter: int | None = None,
    criterion: str = "residual",
    depth: int | None = None,
    damping: float = 1.0,
    backward: str = "implicit",
    backward_solver: str | None = None,
    backward_tol: float | None = None,
    backward_max_iter: int | None = None,
    backward_steps: int = 5,
    backward_damping: float = 0.5,
    keep: Sequence[int] = (),
    batch_dims: int | None = None,
    tensors: Sequence[Tensor] | Tensor | None = None,
    on_failure: str = "warn",
    **unknown,
) -> StateSolution:
    """Fixed point ``z = f(z)`` of every sample, with exact gradients for everything that f closes over.

    Args:
        f: takes a state and returns one of the same shapes on the same device, dense, of any floating dtypes. It must
            treat samples independently, always give the same result for the same state, use the same tensors at every
            state (or have them all in ``tensors``), and leave its argument as it is. The argument's memory is that of
            the next one: f keeps copies.
        z0: starting point, a tensor or a tuple or list of tensors; float32, float64, bfloat16 or float16. The first
            dimension counts samples; a state of one-dimensional tensors is one sample. No gradient flows to it.
        solver: "plain" iterates ``z <- z + damping (f(z) - z)``; "anderson" mixes the last ``depth`` evaluations of
            every sample (type II); "broyden" is Broyden's good method with ``depth`` steps between restarts;
            "newton_krylov" solves Newton's equation by GMRES on Jacobian products, ``depth`` vectors at most; "auto" is
            plain, and Anderson for samples that are seen to contract slowly.
        tol: relative tolerance; 1e-10 in float64, 1e-5 in float32, 5e-3 in float16, 3e-2 in bfloat16 if None.
        max_iter: evaluations of f allowed; 500 if None. A Jacobian product counts as one.
        criterion: "residual" stops a sample at ``r = ||f(z) - z|| / ||f(z)|| <= tol`` (2-norm over all its tensors);
            "error" at ``r q / (1 - q) <= tol`` with its measured contraction q; "absolute" at ``||f(z) - z|| <= tol``.
        backward: "implicit" is exact; "one_step" (JFB) differentiates one evaluation at the fixed point, "phantom"
            ``backward_steps`` damped ones, "neumann" takes as many terms of the adjoint's Neumann series, "unrolled"
            differentiates the plain iteration.
        backward_solver, backward_tol, backward_max_iter: of the adjoint equation; as forward if None ("plain" becomes
            "anderson": the equation is linear, and which solution is meant is no question). Its tolerance is relative
            to the incoming gradient, with criterion "residual".
        keep: evaluations, counted from 1, after which the best states so far are wanted: ``solution.trajectory`` has
            them in ascending order, each once; those after the last evaluation are z.
        batch_dims: how many leading dimensions count samples, where the rule of z0 does not fit.
        tensors: all tensors that f closes over and that need gradients, or the only one, where they are known: f is
            then not watched, which costs up to 15 us an operator of f where it uses tensors that are no leaves.
        on_failure: "warn", "raise" (:class:`deq.ConvergenceError`) or "ignore" when samples do not converge.

    On the meta device, or of a FakeTensorMode, f is evaluated once: shapes, dtypes and gradients, and no numbers.

    Returns:
        Solution with ``z`` like z0, equal to f at the best point of every sample, and the iterations (evaluations of
        f), residual and status of every sample.

    The backward pass of "implicit" and "neumann" evaluates f again, with what it had in the call: inputs, variables of
    outer functions, global variables of its module that it reads itself or in functions of that module, and parameters,
    buffers and dropout masks of modules where somebody exchanged them. Attributes of other objects, elements of
    containers, variables of outer functions that the methods of a class use, and global variables that a module inside
    of a module reads are those of the time of the backward pass; where this means that a tensor is lost it is an error.
    Data overwritten in place since is an error too where f holds it itself.

    f runs with autocast disabled: a residual below the rounding of 16 bits needs more. Inside torch.compile the solve
    is a graph break; :class:`deq.nn.Equilibrium` compiles with ``fullgraph=True``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
        ConvergenceError: with ``on_failure="raise"``, carrying the solution.
    """
    options = {
        "solver": solver,
        "tol": tol,
        "max_iter": max_iter,
        "criterion": criterion,
        "depth": depth,
        "damping": damping,
        "backward": backward,
        "backward_solver": backward_solver,
        "backward_tol": backward_tol,
        "backward_max_iter": backward_max_iter,
        "backward_steps": backward_steps,
        "backward_damping": backward_damping,
        "keep": keep,
        "batch_dims": batch_dims,
        "tensors": tensors,
        "on_failure": on_failure,
    } | unknown
    if torch.compiler.is_compiling():
        return _outside_of_graphs(f, z0, options)
    return fixed_point_with(f, z0, options)


def fixed_point_with(
    f: Callable[[State], State], z0: State, options: dict[str, object], fresh: bool = False, solved: bool = False
) -> StateSolution:
    """:func:`fixed_point` with all its options, outside of graphs of the compiler.

    fresh: z0 is finite, carries no gradient and is used by nobody else: it may be overwritten. solved: z0 is what a
    solve returned, which is given its gradient again.
    """
    refuse_tracing("a fixed point of a function", "torch.export and torch.compile of deq.nn.Equilibrium")
    batch_dims, tensors = options["batch_dims"], options["tensors"]
    if not callable(f):
        raise TypeError(f"f must be callable; got {type(f).__name__}")
    layout = layout_of(z0, batch_dims)
    checked = {name: value for name, value in options.items() if name not in ("batch_dims", "tensors")}
    if tensors is not None:
        tensors = [tensors] if isinstance(tensors, Tensor) else listed("tensors", tensors, Tensor, "tensors")
        tensors = list({id(tensor): tensor for tensor in tensors}.values())  # each of them has its gradient once
    keep = options["keep"]
    checked["keep"] = keep if type(keep) is tuple else tuple(listed("keep", keep, numbers.Integral, "integers"))
    try:
        rule, adjoint, keep = rules_of(layout.coarsest, **checked)
    except TypeError:  # what has no hash is named
        rule, adjoint, keep = rules_of.__wrapped__(layout.coarsest, **checked)
    options = options | {"tensors": tensors}
    with apart_from_autocast(layout.device.type):
        searched = not solved and (torch.is_grad_enabled() or may_train(f.block if isinstance(f, Applied) else f))
        members = _members(f) if searched else None
        if members is None or not (members.norms or members.has_masks):
            members = members if Unsteady.exist else None  # else a call needs them only where f is seen to use others
            return _solve(f, z0, layout, rule, adjoint, keep, options, fresh, solved, members)
        return members.while_still(lambda: _solve(f, z0, layout, rule, adjoint, keep, options, fresh, solved, members))


def _members(f: Callable) -> Members | None:
    """Those of the modules that f uses; None where whoever calls has them."""
    if not isinstance(f, Applied):
        return members_of(f)
    return Members(modules_used(f.block)) if f.members is None else None


def _solve(
    f: Callable[[State], State],
    z0: State,
    layout: Layout,
    rule: Rule,
    adjoint: Rule,
    keep: tuple[int, ...],
    options: dict[str, object],
    fresh: bool,
    solved: bool,
    members: Members | None = None,
) -> StateSolution:
    """:func:`fixed_point_with`, with the options checked. members: those of f, where they are known."""
    tensors, backward, on_failure = options["tensors"], options["backward"], options["on_failure"]
    special = in_transform() or in_forward_mode()
    differentiates = torch.is_grad_enabled() or special
    if differentiates and backward in ("implicit", "neumann"):
        f = frozen(f)
    evaluate = _MatrixMap(f, layout)
    start = layout.flatten(z0, "z0")
    start = start if fresh else start.detach()
    if lacks_numbers(start):  # shapes without numbers
        image = evaluate(start)
        result = generic.Result(image, generic.Told.unjudged(start), [None] * len(keep))
        return _solution(layout.unflatten(result.z), result, layout, rule)
    if start.is_inference() and not torch.is_inference_mode_enabled():  # autograd takes no such tensor
        start = start.clone()
    if not (fresh or in_transform()) and not _is_finite(start):
        bad = int((~torch.isfinite(start).all(1)).nonzero()[0])
        raise ValueError(f"z0 must be finite; sample {bad} holds NaN or infinity")

    def report(result: generic.Result, rule: Rule, what: str) -> None:
        if result.told.is_converged():
            return
        fits = layout.batch == result.z.shape[0]  # not under vmap, where there are more samples
        z = layout.unflatten(result.z) if fits else result.z
        report_failures(_solution(z, result, layout if fits else None, rule), on_failure, rule.tol, what)

    first = stranger = None
    outer = exchanges() if differentiates else ()
    if not differentiates:
        tensors = ()
    elif tensors is not None:
        tensors = [exchanged(tensor, outer) for tensor in tensors]
    else:
        remembers = isinstance(f, Applied) and not special and not outer
        tensors = f.recall() if remembers else None
        if tensors is None:
            first, tensors = watched(evaluate, start, held(f))
            tensors = f.learn(tensors) if remembers else tensors
        if remembers and f.is_known():
            stranger = functools.partial(_refuse_stranger, f)
    exact = backward in ("implicit", "neumann")
    if special or (tensors and exact):  # a start may belong to a transform as well
        terms = options["backward_steps"] if backward == "neumann" else None
        call = Call(f, tensors, watched=first is not None, members=members)
        equation = Equation(
            closed_over(evaluate, tensors, call),
            rule,
            adjoint,
            terms,
            keep,
            report,
            direct=(lambda *new: None) if outer else functools.partial(evaluate.of, tensors),
            stranger=stranger,
            call=call,
            owns_start=fresh,
            constant=not exact,
        )
        if solved:
            z = attached(equation, start, tensors)
            result = generic.Result(z, generic.Told.unjudged(start))
        else:
            result = implicit(equation, start, tensors, None if special else first)
        call.end()
    elif solved:
        result = generic.Result(start, generic.Told.unjudged(start))
    else:
        equation = Equation(closed_over(evaluate, ()), rule, adjoint, keep=keep, report=report)
        result = equation.solve(start, first=first, owned=fresh and not tensors)
    z = result.z
    if tensors and not exact:
        z = differentiated(
            evaluate,
            start,
            result,
            rule,
            backward,
            options["backward_steps"],
            float(options["backward_damping"]),
            is_judged=not solved,
        )
    return _solution(layout.unflatten(z), result, layout, rule)


_outside_of_graphs = graph_break(
    fixed_point_with,
    "a solve stops by its numbers and is no graph: use deq.nn.Equilibrium for fullgraph=True, or compile f alone",
)


def _refuse_stranger(f: Applied) -> None:
    f.uses.forget()  # the next call watches the block and finds them all
    raise RuntimeError(
        "the block of deq.nn.Equilibrium uses a tensor in the backward pass that needs a gradient, that is neither an "
        "input nor a parameter of it, and that it was not seen to use: make it one of them, or call the layer once "
        "more, which looks again"
    )


def _is_finite(x: Tensor) -> bool:
    """Whether all elements are: the norm of those that are is, unless it overflows."""
    return math.isfinite(generic.norm(x)) or bool(torch.isfinite(x).all())


class _MatrixMap:
    """f as a map of matrices (B, D)."""

    def __init__(self, f: Callable[[State], State], layout: Layout):
        self.f, self.layout = f, layout

    def __call__(self, flat: Tensor) -> Tensor:
        return self._at(flat, self.layout.unflatten(flat), flat.is_inference())

    def on(self, flat: Tensor) -> Callable[[], Tensor]:
        """The map at what ``flat`` holds when it is called, its result in any shape; the state is made once where
        it is a view."""
        if not self.layout.is_view:
            return functools.partial(self, flat)
        return functools.partial(self._at, flat, self.layout.unflatten(flat), flat.is_inference(), True)

    def of(self, old: Sequence[Tensor], *new: Tensor) -> "_MatrixMap | None":
        """The same of the ``new`` tensors in place of the ``old`` ones; None if f does not hold
        some of those itself."""
        g = with_others(self.f, old, new)
        return None if g is None else _MatrixMap(g, self.layout)

    def _at(self, flat: Tensor, state: State, unversioned: bool, loose: bool = False) -> Tensor:
        version = None if unversioned else flat._version
        image = self.f(state)
        if not unversioned and flat._version != version:
            raise RuntimeError("f must not modify its argument in place")
        if loose and self.layout.fits(image):
            return image
        return self.layout.flatten(image)


def _solution(z: State, result: generic.Result, layout: Layout | None, rule: Rule) -> StateSolution:
    if layout is None:
        return StateSolution(z, result.told, (-1,), rule, result.trajectory)
    trajectory = [layout.unflatten(result.z.detach() if t is None else t) for t in result.trajectory]
    return StateSolution(z, result.told, layout.samples, rule, trajectory)
