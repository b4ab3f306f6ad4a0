"""torchdeq's modules: ``deq(func, z_init) -> (states, info)``."""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..cached_weights import CachedWeights, of_thread
from ..closures import exchanges, graph_break, in_forward_mode, in_transform, recorded, watched
from ..equation import Equation, closed_over
from ..function_options import listed
from ..held import Call, frozen, with_others
from ..implicit_function import attached, fixed_point
from ..members import Members, Unsteady, may_train, members_of
from ..modes import apart_from_autocast, refuse_tracing
from ..solvers import generic
from ..solvers.generic import Rule
from ..state import Layout, layout_of
from .arguments import OPTIONS, gather, refuse
from .dropout import reset_dropout
from .loss import power_method
from .norm import reset_norm
from .solver import SolverStat, get_solver


class DEQBase(nn.Module):
    """The options of get_deq, checked, and what both cores share.

    ``args`` are all of them; a class that is derived may have others, which are there as well. Raises TypeError for an
    unknown option, or one of the wrong type, and ValueError for a value that cannot be.
    """

    def __init__(self, args=None, no_stat: bool | None = None, **kwargs):
        super().__init__()
        own = ("no_stat",) if type(self) in (DEQIndexing, DEQSliced) else None
        given = {name: value for name, value in gather("get_deq", args, kwargs, own).items() if value is not None}
        no_stat = given.pop("no_stat", no_stat)
        config = self.args = {name: option.default for name, option in OPTIONS.items()} | given
        for name, option in OPTIONS.items():
            value = config[name]
            if option.many:
                config[name] = [value] if isinstance(value, int) else listed(name, value, int, "integers")
            elif option.parse in (int, float) and not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number; got {value!r}")
        for name in ("f_max_iter", "b_max_iter", "n_states"):
            if config[name] < 1 or not float(config[name]).is_integer():
                raise ValueError(f"{name} must be a positive integer; got {config[name]!r}")
            config[name] = int(config[name])
        for name in ("f_stop_mode", "b_stop_mode"):
            if config[name] not in ("abs", "rel"):
                raise ValueError(f"{name} must be 'abs' or 'rel'; got {config[name]!r}")
        self.f_solver, self.b_solver = get_solver(config["f_solver"]), get_solver(config["b_solver"])
        self.no_stat = config["f_solver"] == "simple_fixed_point_iter" if no_stat is None else no_stat
        self.grad = config["grad"]
        if not self.grad or any(steps < 1 for steps in self.grad):
            raise ValueError(f"grad must be positive integers; got {self.grad!r}")
        self.ift = bool(config["ift"] or config["hook_ift"])
        self.f_max_iter = config["f_max_iter"]
        evaluations = config["eval_f_max_iter"]
        self.eval_f_max_iter = int(evaluations if evaluations > 0 else self.f_max_iter * config["eval_factor"])
        self.steps = self._steps(self.f_max_iter)
        if len(self.grad) not in (1, len(self.steps)):
            raise ValueError(f"grad must have one number or {len(self.steps)}, one a state; got {self.grad!r}")

    def _steps(self, f_max_iter: int) -> list[int]:
        """The evaluations that belong to every state; as many states whatever ``f_max_iter`` is."""
        raise NotImplementedError  # abstract: every subclass has its own

    def _states(self, problem: "_Problem", limit: int | None, options: dict) -> tuple[list, dict]:
        """The solved states (B, D) of a training step with their gradients, and the statistics."""
        raise NotImplementedError  # abstract: every subclass has its own

    def forward(
        self,
        func: Callable,
        z_init: Tensor | Sequence[Tensor],
        solver_kwargs: dict | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[[dict], None] | None = None,
    ) -> tuple[list, dict]:
        """Solve ``z = func(z)``, or ``(a, b) = func(a, b)`` for several tensors.

        solver_kwargs: options of the solver for this call, and f_max_iter. sradius_mode: in evaluation, estimate the
        spectral radius into ``info["sradius"]``. backward_writer: told the statistics of the backward solve.

        Returns the states that carry gradients, the last one solved (tensors, or lists of tensors), and the statistics.
        In evaluation that is one state; where gradients are enabled it carries the implicit gradient. Inside
        torch.compile the solve is a graph break.
        """
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, func, z_init, solver_kwargs, sradius_mode, backward_writer)
        return self._solve(func, z_init, solver_kwargs, sradius_mode, backward_writer)

    def _solve(self, func, z_init, solver_kwargs, sradius_mode, backward_writer) -> tuple[list, dict]:
        refuse_tracing("a fixed point of a function", "torch.export and torch.compile of deq.nn.Equilibrium")
        options = dict(solver_kwargs or {})
        limit = options.pop("f_max_iter", None)
        limit = None if limit is None else max(1, int(limit))
        problem = _Problem(self, func, z_init, backward_writer)
        searched = callable(func) and (torch.is_grad_enabled() or may_train(func))
        members = members_of(func) if searched else None
        problem.members = members if Unsteady.exist or (members is not None and members.norms) else None
        with apart_from_autocast(problem.device.type):
            if members is None or not (members.norms or members.has_masks):
                return self._solved(problem, limit, options, sradius_mode)
            return members.while_still(lambda: self._solved(problem, limit, options, sradius_mode))

    def _solved(self, problem: "_Problem", limit: int | None, options: dict, sradius_mode: bool) -> tuple[list, dict]:
        if self.training:
            states, info = self._states(problem, limit, options)
        else:
            z, _, info = problem.solve(problem.start, limit or self.eval_f_max_iter, options)
            states = [problem.implicit(z, advance=False) if torch.is_grad_enabled() else z]
            info["sradius"] = problem.spectral_radius(z) if sradius_mode else torch.zeros(1, device=problem.device)
        return [problem.unflatten(state) for state in states], info

    def _with_gradient(self, problem: "_Problem", z: object, state: int) -> list:
        """Gradient steps from z, the state of that number: implicit for the last where asked for, else phantom."""
        if self.ift and state == len(self.steps) - 1:
            return [problem.implicit(z)]
        steps = self.grad[state] if len(self.grad) > 1 else self.grad[0]
        gap, places = self.args["sup_gap"], self.args["sup_loc"]
        found = []
        for k in range(1, steps + 1):
            z = problem.step(z, self.args["tau"])
            if k == steps or (gap > 0 and k % gap == 0) or (gap <= 0 and k in places):
                found.append(z)
        return found


_outside_of_graphs = graph_break(DEQBase._solve, "a solve stops by its numbers and is no graph")


class DEQIndexing(DEQBase):
    """One solve; the states asked for are taken out of it, and gradient steps are attached to each."""

    def _steps(self, f_max_iter: int) -> list[int]:
        n = self.args["n_states"]
        if n > 1:
            gap = f_max_iter // n
            return [f_max_iter - (n - k - 1) * gap for k in range(n)]
        return [*self.args["indexing"], f_max_iter]

    def _states(self, problem, limit, options):
        steps = self.steps if limit is None else self._steps(limit)
        _, trajectory, info = problem.solve(problem.start, steps[-1], options, indexing=steps)
        states = []
        for i, z in enumerate(trajectory):
            states += self._with_gradient(problem, problem.detach(z), i)
        return states, info


class DEQSliced(DEQBase):
    """As many solves as states; each goes on from the gradient steps of the last."""

    def _steps(self, f_max_iter: int) -> list[int]:
        n = self.args["n_states"]
        if n > 1:
            return [f_max_iter // n + (k < f_max_iter % n) for k in range(n)]
        edges = [0, *(min(step, f_max_iter) for step in sorted(self.args["indexing"])), f_max_iter]
        return [after - before for before, after in pairwise(edges)]

    def _states(self, problem, limit, options):
        steps = self.steps if limit is None else self._steps(limit)
        states, z, info = [], problem.start, {}
        for i, evaluations in enumerate(steps):
            if evaluations > 0:
                z, _, info = problem.solve(problem.detach(z), evaluations, options)
            states += self._with_gradient(problem, problem.detach(z), i)
            z = states[-1]
        return states, info


class _Problem:
    """One call: the function on the state in the form that the solver takes, a matrix or with no_stat a list."""

    def __init__(self, model: DEQBase, func: Callable, z_init, writer):
        self.model, self.func, self.writer = model, func, writer
        self.members: Members | None = None  # those of func, where they are known
        self.several = not isinstance(z_init, Tensor)
        is_list = isinstance(z_init, (tuple, list)) and z_init and all(isinstance(part, Tensor) for part in z_init)
        if self.several and not is_list:
            raise TypeError(f"z_init must be a tensor, or a tuple or list of tensors; got {z_init!r}")
        z_init = list(z_init) if self.several else z_init
        first = z_init[0] if self.several else z_init
        self.device = first.device
        self.layout: Layout = layout_of(z_init, min(1, first.dim()))
        self.listed = self.several and model.no_stat
        self.start = z_init if self.listed or not self.several else self.layout.flatten(z_init, "z_init")

    def __call__(self, z, tau: float = 1.0):
        if self.listed:
            new = list(self.func(*z))
            return new if tau == 1.0 else [torch.lerp(a, b, tau) for a, b in zip(z, new, strict=True)]
        new = self._matrix_map(self.func)(z) if self.several else self.func(z)
        return new if tau == 1.0 else torch.lerp(z, new, tau)

    def step(self, z, tau: float):
        """One gradient step from z; samples that would not be finite after it stay where they are."""
        new = self(z, tau)
        if self._are_finite(new):
            return new
        old = self.to_matrix(z)
        finite = _finite_rows(self.to_matrix(new))
        # From elsewhere for those samples: the derivative at z times a gradient of zero would be NaN.
        new = self(self.of_matrix(torch.where(finite, old, self.to_matrix(self.start))), tau)
        return self.of_matrix(torch.where(finite, self.to_matrix(new), old))

    def _are_finite(self, z) -> bool:
        if in_transform():  # which does not say
            return False
        if isinstance(z, Tensor):
            return math.isfinite(generic.norm(z.detach()))
        return all(map(self._are_finite, z))

    def detach(self, z):
        return [part.detach() for part in z] if self.listed else z.detach()

    def unflatten(self, z):
        return self.layout.unflatten(z) if self.several and not self.listed else z

    def to_matrix(self, z) -> Tensor:
        return self.layout.flatten(z) if self.listed or not self.several else z

    def of_matrix(self, flat: Tensor):
        return self.layout.unflatten(flat) if self.listed or not self.several else flat

    def solve(self, z, limit: int, options: dict, indexing=None):
        config = self.model.args
        options = {"tol": config["f_tol"], "stop_mode": config["f_stop_mode"]} | options
        if hasattr(self.model.f_solver, "rule_of") and (in_transform() or in_forward_mode()):
            return self._solve_below(z, limit, options, indexing or ())
        if indexing is not None:
            options["indexing"] = indexing
        before = of_thread.evaluates, of_thread.weights
        try:
            with torch.no_grad(), CachedWeights():  # weights are computed once a solve
                z, trajectory, info = self.model.f_solver(self, self.detach(z), max_iter=limit, **options)
        finally:
            of_thread.evaluates, of_thread.weights = before
        if indexing is not None:  # what the solver did not reach is its last state
            trajectory = list(trajectory) + [z] * (len(indexing) - len(trajectory))
        return z, trajectory, info

    def _solve_below(self, z, limit: int, options: dict, indexing: Sequence[int]):
        """As :meth:`solve` where tensors belong to a transform of torch.func or carry tangents, of which the solver
        must see nothing. Of the statistics there are rel_lowest and nstep."""
        options = dict(options)
        if options.pop("return_final", False):
            raise ValueError("return_final is not available inside transforms of torch.func and forward mode")
        f, flat, rule = self._matrix_map(self.func), self.to_matrix(z), self.model.f_solver.rule_of(limit, **options)
        _, tensors = watched(f, flat)
        keep = tuple(sorted(set(indexing)))
        equation = Equation(closed_over(f, tensors), rule, rule, keep=keep, constant=True)
        result = fixed_point(equation, flat.detach(), tensors, None)
        info = SolverStat(rel_lowest=result.residual.float(), nstep=result.iterations.float())
        return self.of_matrix(result.z), [self.of_matrix(state) for state in result.trajectory], info

    def implicit(self, z, advance: bool = True):
        """z, or one evaluation on from it, with the exact gradient of the fixed point.

        The evaluation at z keeps its graph for the backward pass, as torchdeq's does. To keep that of the solver's last
        evaluation instead, whose end can be foreseen, is 5 % faster, but the answer is two to three times as far from
        the solution as torchdeq's.
        """
        flat, func = self.to_matrix(z), frozen(self.func)
        outer = exchanges()  # of a function that this one is inside of: what it holds itself is not what it uses
        if in_transform() or outer:
            (image, tensors), graph = watched(self._matrix_map(func), flat), None
        else:
            image, tensors, graph = recorded(self._matrix_map, func, flat)
        if advance and not self._are_finite(image):
            image = torch.where(_finite_rows(image), image, flat)
        call = Call(func, tensors, watched=True, has_graph=graph is not None, members=self.members)
        equation = Equation(
            closed_over(self._matrix_map(func), tensors, call),
            None,
            self._adjoint_rule(),
            direct=(lambda *new: None) if outer else lambda *new: self._with(func, tensors, new),
            graph=graph,
            call=call,
        )
        z = attached(equation, image if advance else flat, tensors)
        call.end()
        return self.of_matrix(z)

    def _matrix_map(self, func: Callable) -> Callable[[Tensor], Tensor]:
        layout = self.layout

        def f(flat: Tensor) -> Tensor:
            state = layout.unflatten(flat)
            return layout.flatten(list(func(*state)) if self.several else func(state))

        return f

    def _with(self, func: Callable, old: Sequence[Tensor], new: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
        func = with_others(func, old, new)
        return None if func is None else self._matrix_map(func)

    def _adjoint_rule(self) -> Rule | Callable:
        """How the backward solve is done: its tolerance is relative to the incoming gradient."""
        config = self.model.args
        options = {"max_iter": config["b_max_iter"], "tol": config["b_tol"], "stop_mode": "rel"}
        rule_of = getattr(self.model.b_solver, "rule_of", None)
        if rule_of is not None and self.writer is None:
            return replace(rule_of(**options), affine=True)
        if rule_of is not None:  # one of deq's own
            options["_range"] = "adjoint"

        def solve(f, g: Tensor, first: Tensor | None) -> generic.Result:
            def adjoint(u: Tensor, tau: float = 1.0) -> Tensor:
                return f(u) if tau == 1.0 else torch.lerp(u, f(u), tau)

            u, _, info = self.model.b_solver(adjoint, g, **options)
            if self.writer is not None:
                self.writer(info)
            return generic.Result(u, generic.Told.unjudged(u))

        return solve

    def spectral_radius(self, z) -> Tensor:
        with torch.enable_grad():
            point = self.to_matrix(z).detach().requires_grad_()
            image = self._matrix_map(self.func)(point)
        return power_method(image, point)[1].detach()


def _finite_rows(flat: Tensor) -> Tensor:
    """(B, 1)"""
    return torch.isfinite(flat).all(1, keepdim=True)


_cores: dict[str, type[nn.Module]] = {"indexing": DEQIndexing, "sliced": DEQSliced}


def register_deq(deq_type: str, core: type[nn.Module]) -> None:
    """Make ``core(args)`` known to get_deq as ``core=deq_type``; args: a dict of all options, those of others too."""
    _cores[deq_type] = core


def get_deq(args=None, **kwargs) -> nn.Module:
    """The module that solves: ``states, info = deq(func, z_init)``.

    args: a Namespace, dict or None with options of :data:`~deq.torchdeq.arguments.OPTIONS`; kwargs win over it. Neither
    is changed. Raises TypeError for an unknown option in a dict or keyword, naming the closest known one; a core that
    was registered is given whatever there is.
    """
    config = gather("get_deq", args, kwargs, None)
    core = config.get("core", OPTIONS["core"].default)
    if core not in _cores:
        refuse("get_deq", "core", core, [f"core={name!r}" for name in _cores])
    if _cores[core] in (DEQIndexing, DEQSliced):
        return _cores[core](args, **kwargs)
    return _cores[core](config)


def reset_deq(model: nn.Module) -> None:
    """Begin a training step: new dropout masks, and weights normalised anew."""
    reset_norm(model)
    reset_dropout(model)
