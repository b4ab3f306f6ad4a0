"""The CUDA engine on a GPU: accuracy over hundreds of shapes, every promise of a solve, and NVIDIA's sanitizers.

Without a GPU the same kernel bodies run in tests/cpp/test_gpu_solve.cpp, thread by thread.
"""

import os
import random
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, sample_adjoint, sample_loop, torch_adjoint, torch_loop

import deq
from deq import Status, _cuda, _library, stats
from deq.activations import ACTIVATIONS
from deq.backends import cuda
from deq.bench.families import draw
from deq.direct import roots
from deq.direct.methods import Triangular
from deq.plan import make_plan
from deq.run import _report_deferred
from deq.solution import Solution

WHY_NOT = _cuda.why_not("cuda")
needs_gpu = pytest.mark.skipif(WHY_NOT != "", reason=f"the CUDA engine cannot run here: {WHY_NOT}")
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def plan(solver="auto", dtype="float32", **options):
    return make_plan(
        dtype=dtype, device="cuda", solver=solver, backend="cuda", compiled=True, why_no_cuda="", **options
    )


class Solved:
    """One call of the engine in a regime, and what each sample says, on the CPU."""

    def __init__(self, regime, W, c, activation="relu", z0=None, mask=None, value_of=None, **options):
        W, c, z0, mask = (None if t is None else t.cuda() for t in (W, c, z0, mask))
        made = plan(**options)
        if mask is None:
            outcome = cuda._run("cuda_solve_", W, (c,), z0, ACTIVATIONS[activation].number, made, None, regime)
        else:
            number = -1 if value_of is None else ACTIVATIONS[value_of].number
            outcome = cuda._run("cuda_masked_linear_", W, (c, mask), z0, number, made, None, regime)
        self.z, self.report = outcome.z.cpu(), outcome.report.read()
        self.iterations, self.residual, self.status = (
            read(outcome.z, outcome.stats).cpu() for read in (stats.iterations, stats.residual, stats.status)
        )


def shapes(count, widest, most, seed):
    """Random widths and batches, small ones more often, of every remainder."""
    draw = random.Random(seed)
    return [(int(widest ** draw.random()), int(most ** draw.random())) for _ in range(count)]


@needs_gpu
@pytest.mark.parametrize("part", range(10))
def test_blocks_are_as_accurate_as_a_torch_loop(part):
    names = list(ACTIVATIONS)
    for i, (m, B) in enumerate(shapes(30, 336, 600, part)):
        activation = names[i % len(names)]
        W, c, g = gaussian(m, B, seed=i, scale=0.3 + 0.03 * (i % 20))
        W /= max(1.0, float(torch.linalg.matrix_norm(W, 2)) / 0.8)  # of narrow ones some would not contract
        solved = Solved("block", W, c, activation)
        z64 = exact(W, c, activation)
        assert (solved.status == Status.CONVERGED).all() and (solved.residual <= 1e-5).all(), (m, B, activation)
        assert_as_accurate(solved.z, sample_loop(W, c, activation), z64)
        d = ACTIVATIONS[activation].derivative(z64 @ W.double().mT + c.double()).float()
        back = Solved("block", W.mT, g, mask=d)
        u64 = torch_adjoint(W.double(), c.double(), z64, g.double(), activation, tol=4e-15)
        assert_as_accurate(back.z, sample_adjoint(W, c, z64.float(), g, activation), u64)


@needs_gpu
@pytest.mark.parametrize("part", range(5))
def test_grids_are_as_accurate_as_a_torch_loop(part):
    tall = ((512, 500), (1000, 40 + 60 * part), (1100, 129), (2000, 50))[part % 4]  # blocks of 32 and of 64 rows
    for i, (m, B) in enumerate([*shapes(20, 4000, 40, 100 + part), tall]):
        W, c, g = gaussian(m, B, seed=i)
        solved = Solved("grid", W, c)
        z64 = exact(W, c)
        assert (solved.status == Status.CONVERGED).all(), (m, B)
        assert_as_accurate(solved.z, sample_loop(W, c), z64)
        back = Solved("grid", W.mT, g, mask=z64.float(), value_of="relu")
        u64 = torch_adjoint(W.double(), c.double(), z64, g.double(), tol=4e-15)
        assert_as_accurate(back.z, sample_adjoint(W, c, z64.float(), g), u64)


def triangular(m, B, seed=0):
    """W whose diagonal lies within 0.5, c and g of :func:`gaussian`, and a mask (B, m) in [0, 1)."""
    W, c, g = gaussian(m, B, seed=seed)
    W.diagonal().clamp_(-0.5, 0.5)
    return W, c, g, torch.rand(B, m, generator=torch.Generator().manual_seed(seed))


@needs_gpu
@pytest.mark.parametrize("part", range(4))
def test_substitution_is_as_accurate_as_plain_torch(part):
    names = list(ACTIVATIONS)
    for i, (m, B) in enumerate(shapes(8, 600, 1500, 200 + part)):
        W, c, g, s = triangular(m, B, i)
        strict, activation = bool(i % 2), names[i % len(names)]
        method = Triangular(W.cuda(), strict, backend="cuda")
        found = method.solve(c.cuda(), activation)
        T = torch.tril(W, diagonal=-int(strict))
        exact = roots.substitute(T.double(), c.double(), activation)
        assert_as_accurate(found.z.cpu(), roots.substitute(T, c, activation), exact)
        assert (found.residual < 1e-5).all()
        back = method.T.masked(s.cuda(), g.cuda())
        exact = roots.substitute_masked(T.mT.double(), s.double(), g.double(), upper=True)
        assert_as_accurate(back.z.cpu(), roots.substitute_masked(T.mT, s, g, upper=True), exact)


@needs_gpu
@pytest.mark.parametrize(
    ("regime", "m"), [("block", 100), ("block", 333), ("grid", 1000), ("grid", 2048), ("grid", 3000)]
)
def test_bits_do_not_depend_on_the_batch_nor_on_the_run(regime, m):
    W, c, _ = gaussian(m, 150, scale=0.9)
    whole = Solved(regime, W, c)
    assert torch.equal(whole.z, Solved(regime, W, c).z)
    for rows in (slice(0, 1), slice(3, 8), slice(0, 20), slice(50, 150)):
        part = Solved(regime, W, c[rows])
        assert torch.equal(part.z, whole.z[rows]) and torch.equal(part.iterations, whole.iterations[rows])


@needs_gpu
@pytest.mark.parametrize(
    ("regime", "S", "m"), [("block", 3, 100), ("grid", 3, 400), ("grid", 20, 600), ("grid", 2, 2500)]
)
def test_stacked_weights_are_each_as_if_alone(regime, S, m):
    W, c = map(torch.stack, zip(*(gaussian(m, 9, seed=s)[:2] for s in range(S)), strict=True))
    together = Solved(regime, W, c)
    for s in range(S):
        alone = Solved(regime, W[s], c[s])
        assert torch.equal(together.z[s], alone.z) and torch.equal(together.iterations[s], alone.iterations)


@needs_gpu
@pytest.mark.parametrize("regime", ["block", "grid"])
def test_slow_samples_are_accelerated(regime):
    W, c, _ = gaussian(200, 16, scale=1.15)
    plain = Solved(regime, W, c, "tanh", solver="plain", max_iter=5000)
    assert Solved(regime, W, c, "tanh").iterations.sum() < plain.iterations.sum()


@needs_gpu
@pytest.mark.parametrize("m", [100, 333, 700])
def test_samples_that_are_left_are_newtons(m):
    """Of a monotone W, which 30 iterations do not solve and Newton's method always does."""
    W, c = (t.float().cuda() for t in draw("monotone1.0", m, 12, torch.Generator().manual_seed(0)))
    mask, regime, few = torch.rand(12, m, device="cuda") * 2, "block" if m < 337 else "grid", {"max_iter": 30}
    for operator, weight, batch, number in (
        ("cuda_solve_", W, (c,), ACTIVATIONS["tanh"].number),
        ("cuda_masked_linear_", W.mT.contiguous(), (c, mask), -1),
    ):
        z, said, report = cuda._run(operator, weight, batch, None, number, plan("anderson", **few), None, regime)
        assert (stats.status(z, said) != Status.CONVERGED).any(), "a problem that shows nothing"
        words = torch.full((4,), -1, dtype=torch.int64, device="cuda")
        alone = said[: 9 * len(z)]  # without the report of the solve behind it
        cuda._rescue(weight, batch, number, z, alone, words, plan())
        assert (stats.status(z, said) == Status.CONVERGED).all() and report.read()[0] == 0
        x = z.double() @ weight.double().mT + c.double()
        residual = ((torch.tanh(x) if len(batch) == 1 else mask * x) - z.double()).norm(dim=-1)
        assert (residual <= 1.1e-5 * z.double().norm(dim=-1)).all()
    both = Solved(regime, W.cpu(), c.cpu(), "tanh")  # in one call
    assert (both.status == Status.CONVERGED).all() and both.report[0] == 0


@needs_gpu
@pytest.mark.parametrize("regime", ["block", "grid"])
def test_failures_are_named_and_leave_others_alone(regime):
    W, c, _ = gaussian(70, 9)
    good = Solved(regime, W, c)
    bad = c.clone()
    bad[2, 5], bad[7, 0] = torch.nan, torch.inf
    solved = Solved(regime, W, bad)
    assert solved.report[2] == 3 and solved.report[0] == 2
    keep = [i for i in range(9) if i not in (2, 7)]
    assert torch.equal(solved.z[keep], good.z[keep]) and (solved.status[[2, 7]] == Status.NONFINITE).all()
    late = Solved(regime, W, c, max_iter=2)
    assert (late.status == Status.MAX_ITER).all() and (late.iterations == 2).all()
    W[3, 4] = torch.nan
    assert Solved(regime, W, c).report[1] == 1 + 3 * 70 + 4


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_front_door_and_its_gradients(dtype):
    for m, B in ((300, 64), (2048, 8)):
        W, c, g = (t.to(dtype).cuda() for t in gaussian(m, B))
        W.requires_grad_(), c.requires_grad_()
        z = deq.solve(W, c, "tanh", backend="cuda").z
        z.backward(g)
        plain = [t.detach().double().requires_grad_() for t in (W, c)]
        deq.solve(*plain, "tanh", backend="reference").z.backward(g.double())
        for ours, theirs in zip((W, c), plain, strict=True):
            assert (ours.grad.double() - theirs.grad).norm() <= 20 * max(
                1e-5, torch.finfo(dtype).eps
            ) * theirs.grad.norm()


@needs_gpu
def test_solves_wait_for_nothing():
    W, c, _ = (t.cuda() for t in gaussian(300, 64))
    deq.solve(W, c, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        deq.solve(W, c, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


SMALL = """
import torch
from test_cuda import Solved, Triangular, gaussian, triangular
for regime in ("block", "grid"):
    for m, B in ((1, 1), (17, 5), (70, 20)):
        W, c, g = gaussian(m, B, scale=1.1)
        Solved(regime, W, c, "tanh")
        Solved(regime, W, c, "tanh", z0=c)
        Solved(regime, W, g, mask=torch.rand(B, m))
        W, c, g, s = triangular(m, B)
        method = Triangular(W.cuda(), False, backend="cuda")
        method.solve(c.cuda(), "tanh"), method.T.masked(s.cuda(), g.cuda())
"""


@needs_gpu
@pytest.mark.skipif(SANITIZER is None, reason="there is no compute-sanitizer on the path or in /usr/local/cuda")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizers_find_nothing(tool):
    here = Path(__file__).parent
    only = ["--kernel-regex", "kns=solve_"]
    if tool == "initcheck":  # what torch's kernels write is not seen, and would pass for unwritten when it is copied
        only += ["--check-api-memory-access", "no"]
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", *only, sys.executable, "-c", SMALL],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        },
    )
    told = [line for line in done.stdout.splitlines() if "Frame" not in line]  # a hundred of them an error
    assert done.returncode == 0, "\n".join(told)[:3000]


# synccheck wants the warps of a block to come to a barrier from one place of the program. Those that judge do not, and
# bar.sync allows it. With barrier.sync in its place synccheck finds nothing, and solves take 5 % longer (H200).


# ---- without a GPU --------------------------------------------------------------------------------------------------


def test_backend_cuda_says_why_it_cannot_run():
    W, c, _ = gaussian(8, 2)
    with pytest.raises(ValueError, match="backend='cuda' cannot solve cpu tensors here: "):
        deq.solve(W, c, backend="cuda")


def test_a_launch_that_fails_goes_elsewhere_with_one_warning(monkeypatch):
    W, c, _ = gaussian(16, 4)
    monkeypatch.setattr(cuda, "_regime", lambda c, plan: "block")
    monkeypatch.setattr(cuda, "_told", set())
    monkeypatch.setattr(cuda, "_elsewhere", lambda c: cuda.reference)

    def refuse(*arguments):
        raise cuda.Refused("no memory")

    monkeypatch.setattr(cuda, "_run", refuse)
    with pytest.warns(RuntimeWarning, match="the CUDA engine could not run, another backend solves: no memory"):
        outcome = cuda.solve(W, c, None, "relu", plan())
    assert_as_accurate(outcome.z, torch_loop(W, c), exact(W, c))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.masked_linear(W.mT, c, torch.rand(4, 16), None, plan())


@pytest.mark.parametrize("strict", [False, True])
def test_substitution_is_asked_for_what_the_method_is(monkeypatch, strict):
    """Forward and adjoint as the kernel is told them, against plain PyTorch."""
    asked = []

    def substitute(W, c, activation, *, mask, strict, upper):
        asked.append((activation, upper))
        T = (torch.triu if upper else torch.tril)(W, diagonal=(1 if upper else -1) * int(strict))
        z = roots.substitute(T, c, activation) if mask is None else roots.substitute_masked(T, mask, c, upper=upper)
        return z, torch.zeros(c.shape[0])

    monkeypatch.setattr(cuda, "substitute", substitute)
    W, c, g, s = triangular(9, 4)
    ours, plain = Triangular(W, strict, backend="cuda"), Triangular(W, strict)
    for mine, theirs in ((ours.solve(c, "tanh"), plain.solve(c, "tanh")), (ours.T.masked(s, g), plain.T.masked(s, g))):
        torch.testing.assert_close(mine.z, theirs.z)
    assert asked == [("tanh", False), (None, True)]
    if strict:  # the kernel does not look for it
        W[3, 1] = torch.nan
        with pytest.raises(ValueError, match=r"W must be finite; W\[3, 1\]"):
            Triangular(W, strict, backend="cuda").why_not("tanh")


def test_a_substitution_that_fails_goes_elsewhere_with_one_warning(monkeypatch):
    W, c, _, _ = triangular(9, 4)
    with pytest.raises(cuda.Refused, match=r"cuda_substitute_|without CUDA"):
        cuda._substitute(W, c, "tanh", None, False, False)  # on the CPU, for which there is no such operator
    monkeypatch.setattr(cuda, "_told", set())

    class OnGpu:  # a tensor that says that it is on a GPU
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def refuse(*arguments):
        raise cuda.Refused("no memory")

    monkeypatch.setattr(cuda, "_substitute", refuse)
    with pytest.warns(RuntimeWarning, match="the CUDA engine could not run, another backend solves: no memory"):
        assert cuda.substitute(W, OnGpu(), "tanh") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.substitute(W, OnGpu(), "tanh") is None
    assert cuda.substitute(W, c, "tanh") is None  # nor is a tensor on the CPU served


def test_the_device_of_a_tensor_is_the_current_one_while_it_is_served(monkeypatch):
    """Torch changes devices without a context on one that is not used; the library, which would open one, has nothing
    to change then."""
    now, served = [0], []

    class OnGpu:
        is_cuda, dtype, device, shape = True, torch.float32, torch.device("cuda", 1), (2, 3)

    @contextmanager
    def device(place):
        now.append(place.index)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda, "_regime", lambda c, plan: "block")
    for name in ("_run", "_substitute"):
        monkeypatch.setattr(cuda, name, lambda *arguments: served.append(now[-1]))
    c = OnGpu()
    cuda.solve(c, c, None, "relu", plan())
    cuda.masked_linear(c, c, c, None, plan())
    cuda.substitute(c, c, "relu")
    assert served == [1, 1, 1] and now == [0]


def test_which_solves_are_rescued():
    assert cuda._rescues(plan())
    for options in ({"solver": "plain"}, {"solver": "anderson"}, {"solver": "cayley"}, {"criterion": "error"}):
        assert not cuda._rescues(plan(**options))


def test_a_rescue_that_cannot_be_launched_changes_nothing(monkeypatch):
    W, c, _ = gaussian(8, 3)
    z, said, report = torch.zeros(3, 8), stats.allocate(c), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(cuda, "_told", set())
    monkeypatch.setattr(cuda, "plan_rescue", lambda *sizes: _library.CudaPlan(blocks=1))
    before = said.clone()
    with pytest.warns(RuntimeWarning, match="could not take on the samples that failed: .*cuda_rescue_"):
        cuda._rescue(W, (c,), 6, z, said, report, plan())  # on the CPU, for which there is no such operator
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda._rescue(W, (c, c), -1, z, said, report, plan())
        monkeypatch.setattr(cuda, "plan_rescue", lambda *sizes: None)  # too wide
        monkeypatch.setattr(cuda, "_told", set())
        cuda._rescue(W, (c,), 6, z, said, report, plan())
    assert torch.equal(said, before) and not z.any()


def test_the_report_counts_failures_after_the_rescue():
    class Solved(cuda.Deferred):
        def read(self):
            return [3, 0, 2, 0]

    status, W = torch.tensor([0, 1, 0], dtype=torch.uint8), torch.eye(2)
    report = cuda._Rescued(Solved([], W), status)
    status[1] = int(Status.CONVERGED)  # read when it is asked for
    assert report.read() == [0, 0, 2, 0]
    assert report.failed is None and report.samples == 3 and report.weight() is W  # the ladder asks these


def test_what_is_not_on_a_gpu_is_not_rescued():
    _, c, _ = gaussian(8, 3)
    for report in ([1, 0, 0, 0], cuda.Deferred([], c)):
        outcome = cuda.Outcome(c, stats.allocate(c), report)
        assert cuda._rescued(outcome, c, (c,), 6, plan()) is outcome


def test_what_the_engine_does_not_serve_goes_elsewhere():
    _, c, _ = gaussian(16, 4)
    assert cuda._regime(c, replace(plan(), acceleration="none")) is None
    assert cuda._regime(c.double(), plan()) is None
    assert cuda._regime(c[:0], plan()) is None


def test_a_weight_that_is_gone_was_not_finite():
    """The device names its element, when nobody has it any more."""
    z = torch.zeros(3, 2)
    said = stats.allocate(z, cuda.REPORT_BYTES).fill_(Status.DIVERGED)
    said[-cuda.REPORT_BYTES :].view(torch.int64).copy_(torch.tensor([-1, 2, -1, -1]))
    W = torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
    report = cuda._Report(3, said, W)
    read = partial(_report_deferred, report, "warn", Solution(z, said, plan()))
    with pytest.raises(ValueError, match=r"W must be finite; W\[0, 1\] is nan"):
        read()
    del W
    with pytest.raises(ValueError, match="W must be finite; what was solved with held NaN or infinity"):
        read()
