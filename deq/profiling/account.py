"""``deq.profile``: run something that solves equilibria, and account for it."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from numbers import Real
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from .. import _library, cache
from ..plan import Plan
from ..solution import Solution
from ..weights import Structure
from . import memory, ranges
from .ceilings import Ceilings, ceilings
from .counter import Counter, Counts, Live
from .feed_forward import FeedForward, Sizing, sizings
from .report import STEP, Beside, Memory, Pass, Report, Seconds

MIN_TURNS, MAX_TURNS = 3, 200
COLD_CALLS = 3


def profile(
    call: Callable,
    *args,
    feed_forward: int | None = None,
    seconds: float = 1.0,
    against: Ceilings | None = None,
    **kwargs,
) -> Report:
    """Account for ``call(*args, **kwargs)`` and, where its result requires a gradient, for the backward pass.

    call: a layer or any callable whose result holds tensors, or a Solution: ``deq.profile(layer, x)``,
        ``deq.profile(deq.solve, W, c)``. It is called a dozen times and more, and must do the same every time. One that
        differentiates an equilibrium by itself, such as a training step, is accounted for as one pass, "step"; it may
        return anything.
    feed_forward: depth of the feed-forward nets to put beside the first solve, of equal parameters, of equal FLOPs per
        iteration and of equal memory; none if None, and not for a call that differentiates by itself.
    seconds: for timing each pass; the rest takes about as long, the ceilings of the machine two seconds once a process.
    against: ceilings instead of those measured here.

    Gradients of the leaves are computed and dropped: no ``.grad`` changes. Arguments count as leaves: what made them is
    not the call's. Weights do not change between the timed
    calls; what packing them adds is in ``Report.first_call``. FLOPs are exact: those of every operator by its formula,
    as ``torch.utils.flop_counter.FlopCounterMode`` counts them, and beside them what the engine says that it carried
    out. Memory is that of tensors, and of the whole process where the system tells it (Linux), or of the GPU.

    Of ``deq.fixed_point`` the iterations are told as well; how much memory f needs, or a gradient that is not implicit,
    no theory says.

    Returns a :class:`deq.profiling.Report`: ``print(report)``, ``report.as_dict()``, ``report.draw(path)``.
    Raises TypeError for a ``call`` that is not callable and options of another type, ValueError for a result without
    tensors and options out of range.
    """
    if not callable(call):
        raise TypeError(f"call must be a layer or a callable; got {type(call).__name__}")
    if feed_forward is not None and (type(feed_forward) is not int or feed_forward < 1):
        raise ValueError(f"feed_forward must be a depth of at least 1; got {feed_forward!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        raise TypeError(f"seconds must be a number; got {type(seconds).__name__}")
    if not isinstance(against, Ceilings | None):
        raise TypeError(f"against must be deq.profiling.Ceilings or None; got {type(against).__name__}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds!r}")
    args, kwargs = tree_map(_as_leaf, (args, kwargs))
    subject = _Subject(partial(call, *args, **kwargs))
    passes, solved, plans = _count(subject)
    for name, times in _time(subject, seconds).items():
        passes[name].seconds = times
    account = _memory(subject, passes, solved)
    ceiling = ceilings(str(subject.device)) if against is None else against
    beside = []
    if feed_forward is not None:
        if not solved["solve"]:
            raise ValueError("feed_forward needs a solve to compare with; the call made none")
        if not solved["solve"][0].is_planned:
            raise ValueError("feed_forward needs a solve with a weight to compare with; the call solved another f")
        if passes["forward"].name == STEP:
            raise ValueError("feed_forward needs a call that leaves the backward pass to deq.profile; it made its own")
        beside = _beside(solved["solve"][0], feed_forward, account, subject, seconds)
    return Report(
        what=getattr(call, "__qualname__", None) or type(call).__name__,
        device=str(subject.device),
        shapes=[s.shape for s in solved["solve"]],
        plans=plans,
        passes=list(passes.values()),
        memory=account,
        first_call=_first_call(subject),
        ceilings=ceiling,
        beside=beside,
    )


class _Subject:
    """The call under study, its gradient, and where it runs."""

    def __init__(self, run: Callable[[], object]):
        self.run = run
        with ranges.record() as recorder:
            tensors = list(_tensors(run()))
        belongs = _belonging(recorder.events)
        events = [event for event in recorder.events if belongs(event)]
        self.is_step = any(event.name in ("adjoint", "dW") for event in events) or _accumulates(run)
        if not tensors and not self.is_step:
            raise ValueError("call must return tensors or a deq.Solution; its result holds none")
        # What a step returns need not lie where it solves, and its graph may be gone.
        solved = [event.iterations for event in events if self.is_step and event.iterations is not None]
        self.device = next((t.device for t in (*solved, *tensors)), torch.device("cpu"))
        outputs = [t for t in tensors if t.requires_grad and not self.is_step]
        self.differentiates = bool(outputs) and torch.is_grad_enabled()
        self.leaves = _leaves(outputs) if self.differentiates else []
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
        self._gradients = [(draw(t.shape) / max(1, t.shape[0] if t.dim() else 1)).to(t) for t in outputs]
        if self.differentiates and self._is_spent(run()):
            self.is_step, self.differentiates = True, False

    def _is_spent(self, result: object) -> bool:
        """Whether the call has differentiated its own graph, by torch.autograd.grad, and freed it."""
        try:
            self.differentiate(result)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            return True
        return False

    def differentiate(self, result: object) -> tuple:
        outputs = [t for t in _tensors(result) if t.requires_grad]
        return torch.autograd.grad(outputs, self.leaves, self._gradients, allow_unused=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def both(self) -> object:
        result = self.run()
        return (result, self.differentiate(result)) if self.differentiates else result


class _Accumulation(TorchDispatchMode):
    """Sees whether anything is added to a ``.grad``."""

    seen = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        node = torch._C._current_autograd_node()
        self.seen |= node is not None and node.name().endswith("AccumulateGrad")
        return function(*args, **(kwargs or {}))


def _accumulates(run: Callable[[], object]) -> bool:
    """Whether ``run`` is a training step whose backward pass solves nothing: one step, phantom, unrolled, Neumann."""
    with _Accumulation() as accumulation:
        run()
    return accumulation.seen


def _belonging(events: list[ranges.Event]) -> Callable[[ranges.Event], bool]:
    """Which events are of the calling thread's work: on the CPU backward passes run in it as well, and other threads
    may solve meanwhile; on a GPU backward passes run in threads of autograd."""
    here = threading.get_native_id()
    on_gpu = any(e.thread == here and e.iterations is not None and e.iterations.is_cuda for e in events)
    return lambda event: on_gpu or event.thread == here


def _tensors(result: object) -> Iterator[Tensor]:
    for part in tree_iter(result):
        if isinstance(part, Solution):
            yield from _tensors(part.z)  # of deq.fixed_point a tuple where the state is one
        elif isinstance(part, Tensor):
            yield part


def _as_leaf(part: object) -> object:
    """``part`` without the graph that made it: that is the caller's, and a backward pass through it would free it."""
    if isinstance(part, Structure):
        return replace(part, **{name: _as_leaf(value) for name, value in vars(part).items()})
    is_made = isinstance(part, Tensor) and part.requires_grad and not part.is_leaf
    return part.detach().requires_grad_() if is_made else part


def _leaves(outputs: list[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from ``outputs`` would give a ``.grad``."""
    leaves = {id(t): t for t in outputs if t.is_leaf}
    todo, seen = [t.grad_fn for t in outputs if t.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        todo += [following for following, _ in node.next_functions if following is not None]
    return list(leaves.values())


def _count(subject: _Subject) -> tuple[dict[str, Pass], dict[str, list[memory.Solved]], list[list[str]]]:
    live = Live()
    passes, solved, plans = {}, {"solve": [], "adjoint": []}, []
    with ranges.record() as recorder:
        with Counter(live) as forward:
            result = subject.run()
        own = len(recorder.events)
        passes["forward"] = Pass("forward", forward.counts)
        if subject.differentiates:
            with Counter(live) as backward:
                gradients = subject.differentiate(result)
            passes["backward"] = Pass("backward", backward.counts)
            del gradients
        elif subject.is_step:
            passes["forward"].name = STEP
    belongs = _belonging(recorder.events)
    trains = any(event.name == "dW" and belongs(event) for event in recorder.events)
    for i, event in enumerate(recorder.events):
        if event.name not in solved or event.iterations is None or not belongs(event):
            continue
        one = passes["forward" if i < own else "backward"]
        one.iterations += event.iterations.reshape(-1).tolist()
        trained = trains and event.name == "adjoint"
        is_planned = isinstance(event.plan, Plan)
        solved[event.name].append(memory.Solved(event.shape, event.dtype, trained, is_planned))
        explained = event.plan.explain().splitlines()
        if event.name == "solve" and explained not in plans:
            plans.append(explained)
    return passes, solved, plans


def _time(subject: _Subject, seconds: float) -> dict[str, Seconds]:
    forward, backward = [], []
    end = perf_counter() + seconds * (1 + subject.differentiates)
    while len(forward) < MIN_TURNS or (perf_counter() < end and len(forward) < MAX_TURNS):
        subject.wait()
        start = perf_counter()
        result = subject.run()
        subject.wait()
        middle = perf_counter()
        forward.append(middle - start)
        if subject.differentiates:
            gradients = subject.differentiate(result)
            subject.wait()
            backward.append(perf_counter() - middle)
            del gradients
        del result
    times = {"forward": forward, "backward": backward}
    return {name: Seconds(*np.percentile(turns, (50, 20, 80)).tolist()) for name, turns in times.items() if turns}


def _first_call(subject: _Subject) -> float:
    """Seconds of both passes with nothing remembered of the weights: packing them, forming K, and the passes."""
    best = float("inf")
    for _ in range(COLD_CALLS):
        if _library.compiled is not None:
            _library.compiled.deq_cpu_clear_cache()
        cache.clear()
        subject.wait()
        start = perf_counter()
        result = subject.both()
        subject.wait()
        best = min(best, perf_counter() - start)
        del result
    return best


def _memory(subject: _Subject, passes: dict[str, Pass], solved: dict[str, list[memory.Solved]]) -> Memory:
    measured = [None, None]
    if subject.device.type == "cuda":
        measured = [memory.device_peak_of(run, subject.device) for run in (subject.run, subject.both)]
    elif memory.can_measure():
        measured = [memory.peak_of(run) for run in (subject.run, subject.both)]
    solves, adjoints = solved["solve"], solved["adjoint"]
    last: Counts = list(passes.values())[-1].counts
    is_step = subject.is_step
    forward, both = memory.forward_bytes(solves), memory.backward_bytes(solves, adjoints)
    if solves and not adjoints and (is_step or subject.differentiates):
        forward = both = None  # a gradient through steps, unrolled say, keeps what no theory counts
    return Memory(
        buffer=solves[0].buffer if solves else 0,
        model_forward=both if is_step else forward,
        model_both=both,
        model_retained=None if is_step else forward,
        tensors_forward=passes["forward"].counts.peak,
        tensors_both=last.peak,
        retained=passes["forward"].counts.retained,
        process_forward=measured[0],
        process_both=measured[1] if subject.differentiates else measured[0],
        packed=memory.packed_bytes(),
    )


def _beside(solved: memory.Solved, depth: int, account: Memory, subject: _Subject, seconds: float) -> list[Beside]:
    """The feed-forward nets, profiled in the same way on as many samples."""
    m, dtype = solved.shape[-1], solved.dtype
    batch = solved.buffer // (m * solved.element)

    def make(sizing: Sizing) -> _Subject:
        net = FeedForward(sizing, "relu", dtype, subject.device).requires_grad_(subject.differentiates)
        x = torch.randn(batch, sizing.width, generator=torch.Generator().manual_seed(0), device="cpu")
        x = x.to(subject.device, dtype)
        return _Subject(partial(net, x.requires_grad_(subject.differentiates)))

    def peak_of(sizing: Sizing) -> int:
        return list(_count(make(sizing))[0].values())[-1].counts.peak

    nets = []
    for sizing in sizings(m, depth, account.tensors_both, peak_of):
        net = make(sizing)
        passes, times = _count(net)[0], _time(net, seconds / 2)
        counts = [one.counts for one in passes.values()]
        nets.append(
            Beside(
                equal=sizing.equal,
                depth=sizing.depth,
                width=sizing.width,
                parameters=sizing.parameters,
                flops={name: one.counts.flops for name, one in passes.items()},
                seconds={name: times[name].median for name in passes},
                retained=counts[0].retained,
                peak=counts[-1].peak,
            )
        )
    return nets
