"""The equation of a function's fixed point: how it is solved, with the tensors that the function closes over named."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from .cached_weights import CachedWeights, of_thread, uncached
from .closures import Exchange, Graph, exchanged, exchanges, in_transform, uncompiled, within
from .held import Call
from .profiling import ranges
from .solvers import generic
from .solvers.generic import Rule

Map = Callable[[Tensor], Tensor]
Solver = Callable[[Map, Tensor, Tensor | None], generic.Result]


@dataclass(eq=False)  # not frozen: that costs each call 4 us where caches are cold
class Equation:
    """``z = f(z, t)`` for states (B, D).

    bind: the tensors t -> the map ``z -> f(z, t)``, differentiable in z and t.
    rule, adjoint: how it is solved, and how its linear equations are: a Rule, of the latter an affine one, or a
        function (f, z0, f(z0) or None) -> Result that does it.
    terms: None, or how many terms of the Neumann series stand in for the adjoint's solution.
    report: told the result of every solve.
    direct: the tensors t -> the map as far as f takes them as arguments, or None; what it takes otherwise stays in it.
    owns_start: whether :func:`fixed_point` may overwrite z0.
    constant: whether the solution is to carry no gradient, under any transform.
    graph: None, or an evaluation of f near the solution whose leaves stand for t: the first backward pass uses it
        instead of evaluating f.
    stranger: None, or raises: called where the backward pass meets a tensor that f uses and that t lacks, though there
        should be none.
    call: what backward passes, which evaluate f again, need to know of the call, or None.
    """

    bind: Callable[..., Map]
    rule: Rule | Solver
    adjoint: Rule | Solver
    terms: int | None = None
    keep: tuple[int, ...] = ()
    report: Callable[[generic.Result, Rule, str], None] = field(default=lambda result, rule, what: None)
    what: str = "deq.fixed_point"
    direct: Callable[..., Map | None] = field(default=lambda *tensors: None)
    stranger: Callable[[], None] | None = None
    owns_start: bool = False
    constant: bool = False
    graph: Graph | None = None
    call: Call | None = None

    def linear(self, bind: Callable[..., Map]) -> "Equation":
        """One of the linear equations that derivatives need."""
        rule = self.adjoint
        return Equation(bind, rule, rule, self.terms, report=self.report, what=self._named_gradient, call=self.call)

    @property
    def is_watched(self) -> bool:
        """Whether f was seen to use the tensors, and is to use them in backward passes as well."""
        return self.call is not None and self.call.watched and self.rule is not self.adjoint

    @property
    def _named_gradient(self) -> str:
        return f"the gradient of {self.what.split()[-1]}"

    def solve_adjoint(self, product: Map, g: Tensor) -> generic.Result:
        """``u = g + product(u)``, product linear."""
        if self.terms is not None or callable(self.adjoint):
            return self.linear(lambda: lambda u: g + product(u)).solve(g)
        result = _run("adjoint", product, g, self.adjoint, shift=g)
        self.report(result, self.adjoint, self._named_gradient)
        return result

    def solve(self, z0: Tensor, *tensors: Tensor, first: Tensor | None = None, owned: bool = False) -> generic.Result:
        """The solution from z0, which may be overwritten if it is ``owned``."""
        f = self.bind(*tensors)
        if self.terms is not None and self.rule is self.adjoint:
            z = z0
            for _ in range(self.terms - 1):
                z = f(z)
            return generic.Result(z, generic.Told.unjudged(z))
        if callable(self.rule):
            return self.rule(f, z0, first)
        before = of_thread.evaluates, of_thread.weights
        try:
            with uncached() if in_transform() else CachedWeights():  # weights are computed once a solve
                name = "adjoint" if self.rule is self.adjoint else "solve"
                result = _run(name, f, z0, self.rule, first=first, keep=self.keep, owned=owned)
        finally:
            of_thread.evaluates, of_thread.weights = before
        self.report(result, self.rule, self.what)
        return result


def _run(name: str, f: Map, z0: Tensor, rule: Rule, **options) -> generic.Result:
    if ranges.listening:
        return ranges.call(name, partial(generic.run, **options), f, z0, rule)
    return generic.run(f, z0, rule, **options)


def closed_over(
    f: Callable[[Tensor], Tensor], tensors: Sequence[Tensor], call: Call | None = None
) -> Callable[..., Map]:
    """``bind`` of a function that closes over ``tensors``; ``call`` is told which of them f uses.

    A solve inside of another function whose tensors are exchanged goes on with that in its backward pass, which may
    come when the exchange is over.
    """
    names = list(tensors)  # all that calls of torch's functions may know the tensors by
    if outer := exchanges():
        f = partial(within, outer, f)
        names = [exchanged(tensor, outer) for tensor in tensors] + names

    def bind(*new: Tensor) -> Map:
        if all(a is b for a, b in zip(tensors, new, strict=True)):
            return f

        def with_new(z: Tensor) -> Tensor:
            exchange = Exchange(names, new * (len(names) // len(new)))
            with exchange, uncompiled():
                image = f(z)
            if call is not None:
                call.tell(exchange.met)
            return image

        return with_new

    return bind
