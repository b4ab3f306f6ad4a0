"""torchdeq's solver functions: ``solver(func, x0, max_iter, tol, stop_mode, ...) -> (z, trajectory, info)``."""

import functools
import numbers
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..function_options import check_count, check_number
from ..profiling import ranges
from ..solvers import generic
from ..solvers.generic import Rule
from ..state import Layout, layout_of
from .arguments import refuse

Solver = Callable[..., tuple[Tensor, list[Tensor], dict]]

_CRITERIA = {"abs": "absolute", "rel": "residual"}
_CHECKS = {"depth": check_count, "damping": functools.partial(check_number, low=0, high=2)}
# Options of torchdeq's solvers that change nothing here, and why.
_WITHOUT_EFFECT = {
    "lam": "the regulariser is relative to the residuals",
    "ls": "an iterate that goes astray is replaced by the best one",
}


class SolverStat(dict):
    """What a solve says of every sample: abs_lowest, rel_lowest (B,), abs_trace, rel_trace (B, evaluations) with each
    sample's last value repeated once it is done, nstep (B,), sradius."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("abs_lowest", "rel_lowest", "nstep", "sradius", "abs_trace", "rel_trace"):
            if name not in self:
                self[name] = torch.full((1, 1) if name.endswith("trace") else (1,), -1.0)


class _StatWhenRead(SolverStat):
    """Made of what it is made of when it is first read: a training step that reads none of it is spared 0.1 ms."""

    def __init__(self, make: Callable[[], SolverStat]):
        self._make: Callable[[], SolverStat] | None = make

    def _fill(self) -> None:
        if self._make is not None:
            make, self._make = self._make, None
            own = dict(self)  # what was written meanwhile
            dict.update(self, make())
            dict.update(self, own)

    def __reduce__(self):
        self._fill()
        return SolverStat, (dict(self),)


def _filled(name: str) -> Callable:
    method = getattr(dict, name)

    @functools.wraps(method)
    def read(self, *args, **kwargs):
        self._fill()
        return method(self, *args, **kwargs)

    return read


_OPERATORS = ("contains", "delitem", "eq", "getitem", "iter", "len", "ne", "or", "repr", "reversed", "ror")
_METHODS = ("clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "values")
for _name in (*(f"__{name}__" for name in _OPERATORS), *_METHODS):  # all of a dict but those that only write
    setattr(_StatWhenRead, _name, _filled(_name))


def _make(name: str, method: str, options: dict[str, str]) -> Solver:
    """The solver that is to be known in this module as ``name``."""

    def rule_of(max_iter: int = 50, tol: float = 1e-3, stop_mode: str = "abs", **given) -> Rule:
        rule_options = {}
        for name, value in given.items():
            if name in options:
                if value is not None:
                    rule_options[options[name]] = _CHECKS[options[name]](name, value)
            elif name in _WITHOUT_EFFECT and value:
                warnings.warn(f"{name} has no effect in deq: {_WITHOUT_EFFECT[name]}", UserWarning, stacklevel=3)
            elif name not in _WITHOUT_EFFECT:
                known = ("max_iter", "tol", "stop_mode", "indexing", "return_final", *options, *_WITHOUT_EFFECT)
                refuse(f"the solver {method!r}", name, value, known)
        if stop_mode not in _CRITERIA:
            raise ValueError(f"stop_mode must be 'abs' or 'rel'; got {stop_mode!r}")
        for name, value in (("tol", tol), ("max_iter", max_iter)):
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number; got {value!r}")
        return Rule(
            method,
            tol,
            max(1, int(max_iter)),
            criterion=_CRITERIA[stop_mode],
            margin=False,
            **({"depth": 12 if method == "broyden" else 6} | rule_options),
        )

    def solver(
        func: Callable[[Tensor], Tensor],
        x0: Tensor,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        return_final: bool = False,
        _range: str = "solve",
        **given,
    ) -> tuple[Tensor, list[Tensor], dict]:
        rule = rule_of(max_iter, 0.0 if return_final else tol, stop_mode, **given)
        layout = layout_of(x0, min(1, x0.dim()))
        f = _MatrixMap(func, layout, return_final)
        keep = tuple(sorted(set(indexing or ())))
        run = functools.partial(generic.run, keep=keep, traced=True)
        arguments = f, layout.flatten(x0), rule
        result = ranges.call(_range, run, *arguments) if ranges.listening else run(*arguments)
        z = layout.unflatten(result.z if f.last is None else f.last)
        trajectory = [z if state is None else layout.unflatten(state) for state in result.trajectory]
        told, trace = result.told, result.trace
        return z, trajectory, _StatWhenRead(lambda: _stat(told, trace))

    solver.rule_of = rule_of
    solver.__name__ = solver.__qualname__ = name  # by which it is found when a model is unpickled
    solver.__doc__ = (
        f"deq's {method} solver in torchdeq's shape. stop_mode 'abs' bounds ||f(z) - z||, 'rel' that over ||f(z)||, "
        f"of every sample by itself. Other options: {', '.join(options) or 'none'}. indexing: evaluations after which "
        "the best states are returned, one for each; what was not reached is the last."
    )
    return solver


class _MatrixMap:
    """func as a map of matrices (B, D); its last image, if there was one, stays in ``last`` where that is wanted."""

    def __init__(self, func: Callable[[Tensor], Tensor], layout: Layout, keeps_last: bool):
        self.func, self.layout, self.keeps_last = func, layout, keeps_last
        self.last: Tensor | None = None

    def __call__(self, flat: Tensor) -> Tensor:
        image = self.layout.flatten(self.func(self.layout.unflatten(flat)))
        if self.keeps_last:
            self.last = image
        return image

    def on(self, flat: Tensor) -> Callable[[], Tensor]:
        """See :func:`deq.solvers.generic.run`."""
        if not self.layout.is_view or self.keeps_last:
            return functools.partial(self, flat)
        func, layout, state = self.func, self.layout, self.layout.unflatten(flat)

        def evaluate() -> Tensor:
            image = func(state)
            return image if layout.fits(image) else layout.flatten(image)

        return evaluate


def _stat(told: generic.Told, trace: Tensor | None) -> SolverStat:
    if trace is None or not trace.numel():
        return SolverStat(nstep=told.iterations.to(torch.float32))
    step, size = trace.unbind(2)  # (evaluations, B)
    both = torch.stack((step, step / size.clamp(min=torch.finfo(size.dtype).tiny))).to(torch.float32)
    abs_lowest, rel_lowest = both.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1).unbind()
    abs_trace, rel_trace = both.mT.unbind()
    return SolverStat(
        abs_lowest=abs_lowest,
        rel_lowest=rel_lowest,
        abs_trace=abs_trace,
        rel_trace=rel_trace,
        nstep=told.iterations.to(torch.float32),
    )


def simple_fixed_point_iter(
    func: Callable, x0, max_iter: int = 50, tau: float = 1.0, indexing: Sequence[int] | None = None, **ignored
) -> tuple[object, list, dict]:
    """Exactly ``max_iter`` damped evaluations, nothing judged; x0 may be a list, with ``func(list, tau=)``."""
    trajectory = []
    x = fx = x0
    for k in range(1, int(max_iter) + 1):
        x = fx
        fx = func(x, tau=tau)
        if indexing and k in indexing:
            trajectory.append(fx)
    return fx, trajectory, solver_stat_from_final_step(x, fx, max_iter)


def solver_stat_from_final_step(z, fz, nstep: int = 0) -> SolverStat:
    """The statistics of one pair (z, f(z)), tensors or lists of tensors."""
    if not isinstance(z, Tensor):
        z, fz = (torch.cat([part.flatten(1) for part in parts], 1) for parts in (z, fz))
    z, fz = (t.detach().flatten(1) if t.dim() >= 2 else t.detach().reshape(-1, 1) for t in (z, fz))
    z, fz = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (z, fz))  # 16 bits hold neither norm nor count
    lowest = (fz - z).norm(dim=1)
    relative = lowest / (fz.norm(dim=1) + 1e-8)
    return SolverStat(
        abs_lowest=lowest,
        rel_lowest=relative,
        abs_trace=lowest.unsqueeze(1),
        rel_trace=relative.unsqueeze(1),
        nstep=torch.full_like(lowest, float(nstep)),
    )


fixed_point_iter = _make("fixed_point_iter", "plain", {"tau": "damping"})
anderson_solver = _make("anderson_solver", "anderson", {"tau": "damping", "m": "depth"})
broyden_solver = _make("broyden_solver", "broyden", {"LBFGS_thres": "depth"})
newton_krylov_solver = _make("newton_krylov_solver", "newton_krylov", {"m": "depth"})

_solvers: dict[str, Solver] = {
    "fixed_point_iter": fixed_point_iter,
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "newton_krylov": newton_krylov_solver,
    "simple_fixed_point_iter": simple_fixed_point_iter,
}


def get_solver(key: str) -> Solver:
    """The solver of that name; ValueError naming the known ones otherwise."""
    if key not in _solvers:
        raise ValueError(f"solver must be one of {', '.join(map(repr, _solvers))}; got {key!r}")
    return _solvers[key]


def register_solver(solver_type: str, solver: Solver) -> None:
    """Make ``solver`` known to get_deq as ``f_solver=solver_type`` or ``b_solver=solver_type``."""
    _solvers[solver_type] = solver
