"""The Triton backend in the interpreter, in all its regimes, against the reference: the contract of a solve."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, torch_adjoint, torch_loop
from torch.func import grad, jvp, vmap

import deq
from deq import _triton, reference, stats
from deq.backends import chunks, get_backend, triton_kind
from deq.gpu_plan import choose
from deq.kernels import delta, iteration, records
from deq.kernels.tiles import Tiles
from deq.plan import make_plan
from deq.solvers import ladder

SMALL = Tiles(16, 16, 16, 4, 2)  # several tiles in every direction at sizes that the interpreter can bear


@pytest.fixture(autouse=True, scope="module")
def is_loaded():
    assert _triton.why_not("cpu") == ""  # as any solve with backend="triton" makes sure


@pytest.fixture
def regime(request, monkeypatch):
    """Makes the backend solve in one regime, whatever the plan would choose; "split" shares the inner dimension,
    "bfloat16" and "float8" are cells with such increments where they are allowed."""
    allowed = ("resident",) if request.param == "resident" else ("cell",)
    low = request.param if request.param in delta.DELTA_TILES else "native"

    def forced(m, B, *, increments, **given):
        if request.param != "resident":
            increments = (low,) if low in increments else ("native",)
        return replace(choose(m, B, increments=increments, **(given | {"allowed": allowed})), tiles=SMALL)

    monkeypatch.setattr(triton_kind, "choose", forced)
    monkeypatch.setattr(iteration, "STEP_TILES", (SMALL,))
    monkeypatch.setattr(delta, "DELTA_TILES", dict.fromkeys(delta.DELTA_TILES, (SMALL,)))
    monkeypatch.setattr(iteration, "step_tiles", lambda B, m: (SMALL, 2 if request.param == "split" else 1))
    return request.param


def solved(W, c, activation="relu", **options):
    """The solution, after a check that it is the Triton backend's."""
    solution = deq.solve(W, c, activation, backend="triton", **options)
    assert solution.plan.backend == "triton"
    return solution


@pytest.mark.parametrize(("m", "B"), [(1, 2), (18, 17)])
@pytest.mark.parametrize("regime", ["resident", "cell", "split"], indirect=True)
def test_as_accurate_as_a_torch_loop(m, B, regime):
    W, c, _ = gaussian(m, B)
    solution = solved(W, c, solver="plain")
    assert solution.converged.all()
    assert_as_accurate(solution.z, torch_loop(W, c), exact(W, c))


@pytest.mark.parametrize("regime", ["resident", "bfloat16", "float8"], indirect=True)
def test_increments_are_as_accurate(regime):
    """Above a width of 64 the resident solve goes by increments too. Rows of W and samples of very different sizes."""
    W, c, _ = gaussian(70 if regime == "resident" else 40, 3, seed=1)
    for rows in (torch.ones(1, dtype=torch.float64), 10.0 ** torch.linspace(-37, 0, W.shape[0], dtype=torch.float64)):
        wide = (W * rows[:, None]).float()
        z = solved(wide, c).z
        assert_as_accurate(z, torch_loop(wide, c), exact(wide, c))


@pytest.mark.parametrize("regime", ["float8"], indirect=True)
def test_steps_multiply_what_the_plan_says(regime, monkeypatch):
    """Most evaluations are steps in float8 where it is forced, and none are for the plain solver."""
    steps, turns = [], []
    count = lambda kernel, calls: {"__getitem__": lambda self, grid: calls.append(grid) or kernel[grid]}  # noqa: E731
    for module, name, calls in ((delta, "delta_kernel", steps), (iteration, "step_kernel", turns)):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, type("Counted", (), count(kernel, calls))())
    W, c, _ = gaussian(33, 2)
    plain = solved(W, c, solver="plain")
    assert plain.converged.all() and not steps
    del turns[:]
    plan = replace(plain.plan, increments="float8")
    outcome = get_backend("triton").solve(W, c, None, "relu", plan)
    assert outcome.report == [0, 0, 0, 0] and len(steps) == delta.STEPS * len(turns)
    assert_as_accurate(outcome.z, torch_loop(W, c), exact(W, c))


@pytest.mark.parametrize("solver", ["auto", "anderson", "cayley"])
@pytest.mark.parametrize("regime", ["resident", "cell", "float8"], indirect=True)
def test_other_solvers(solver, regime):
    W, c, _ = gaussian(12, 4, scale=0.9)
    solution = solved(W, c, "tanh", solver=solver)
    assert solution.converged.all()
    assert_as_accurate(solution.z, torch_loop(W, c, "tanh"), exact(W, c, "tanh"))


@pytest.mark.parametrize("acceleration", ["none", "on_demand"])
@pytest.mark.parametrize("regime", ["resident", "split", "bfloat16", "float8"], indirect=True)
def test_every_sample_goes_the_way_of_the_reference(acceleration, regime):
    """Iterations and status one by one: fast, slow, zero, cycling and diverging samples side by side."""
    W = torch.zeros(17, 17)
    W[0, 0], W[1, 1], W[2, 3], W[3, 2], W[4, 4] = 0.9, 0.5, -1.0, -1.0, 4.0
    c = torch.zeros(6, 17)
    c[range(6), (0, 1, 2, 4, 10, 16)] = torch.arange(1.0, 7.0)
    c[5] = -1.0
    plan = deq.solve(W, c[:1], solver="plain", max_iter=30, on_failure="ignore").plan
    plan = replace(plan, acceleration=acceleration, increments=regime if regime in delta.DELTA_TILES else "native")
    expected = get_backend("reference").solve(W, c, None, "relu", plan)
    outcome = get_backend("triton").solve(W, c, None, "relu", plan)
    status = stats.status(outcome.z, outcome.stats)
    assert status.tolist() == stats.status(expected.z, expected.stats).tolist()
    assert outcome.report == expected.report
    if acceleration == "none":
        assert set(status.tolist()) == {deq.Status.CONVERGED, deq.Status.MAX_ITER, deq.Status.DIVERGED}
        if regime in ("resident", "split"):  # those evaluate some points twice
            read = stats.iterations(outcome.z, outcome.stats)
            assert read.tolist() == stats.iterations(expected.z, expected.stats).tolist()
            torch.testing.assert_close(outcome.z[:4], expected.z[:4])


@pytest.mark.parametrize(
    ("activation", "regime"),
    [("tanh", "resident"), ("gelu", "resident"), ("gelu", "cell"), ("gelu", "bfloat16"), ("tanh", "float8")],
    indirect=["regime"],
)
def test_gradients(activation, regime):
    W, c, g = gaussian(19, 5)
    weight, injection = W.clone().requires_grad_(), c.clone().requires_grad_()
    solved(weight, injection, activation, tol=1e-6).z.backward(g)
    z = torch_loop(W, c, activation, tol=1e-6)
    plain = torch_adjoint(W, c, z, g, activation, tol=1e-6)
    dW, dc = reference.implicit_gradient(W.double(), c.double(), exact(W, c, activation), g.double(), activation)
    assert_as_accurate(injection.grad, plain, dc)
    assert_as_accurate(weight.grad, plain.mT @ z, dW)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("regime", ["resident", "cell", "bfloat16", "float8"], indirect=True)
def test_scale_changes_nothing(scale, regime):
    W, c, _ = gaussian(10, 3)
    scale = 2.0 ** round(torch.tensor(scale).log2().item())
    one, other = solved(W, c), solved(W, c * scale)
    assert other.converged.all()
    assert torch.equal(one.iterations, other.iterations)
    torch.testing.assert_close(other.z / scale, one.z)


@pytest.mark.parametrize("regime", ["resident", "cell", "bfloat16"], indirect=True)
def test_units_that_are_switched_off_say_nothing_of_the_scale(regime):
    """They did: beside them the others' squares left the range, and any iterate passed for converged."""
    W, c, g = gaussian(10, 3)
    on = torch.arange(10) % 3 > 0
    off, loss = torch.where(on, c, -1e30), torch.where(on, g, 1e30)
    solution = solved(W, off.requires_grad_())
    alone = solved(W[on][:, on].contiguous(), c[:, on].requires_grad_())
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, alone.z.new_zeros(3, 10).index_add(1, on.nonzero()[:, 0], alone.z))
    (gradient,) = torch.autograd.grad(solution.z, off, loss)
    (want,) = torch.autograd.grad(deq.solve(W, off, tol=1e-6).z, off, torch.where(on, g, 0.0))
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regime", ["resident", "cell"], indirect=True)
def test_starts_that_are_far_too_large(regime):
    """Squares of the last steps left the range, and any iterate passed for converged."""
    W, c, _ = gaussian(10, 2)
    z0 = c.flip(1) * torch.tensor([[1e20], [1e36]])
    for activation in ("relu", "tanh"):
        solution = solved(W, c, activation, z0=z0)
        assert solution.converged.all() and (solution.residual > 0).all()
        torch.testing.assert_close(solution.z.double(), exact(W, c, activation), rtol=0, atol=3e-5)
    tiny = torch.full((1, 10), 1e-15)  # and beside one of ordinary size
    z = solved(W, tiny, "gelu", z0=tiny + 1).z
    torch.testing.assert_close(z, torch.linalg.solve(2 * torch.eye(10) - W, tiny[0])[None], rtol=1e-4, atol=0)
    if regime == "resident":
        assert solved(W, 0 * c, z0=z0).converged.all()  # at zero


@pytest.mark.parametrize("regime", ["resident", "cell"], indirect=True)
def test_smooth_activations_far_from_one(regime):
    W, c, _ = gaussian(6, 2)
    for activation, scale in (("gelu", 1e22), ("softplus", 1e-25)):
        solution = solved(W, c * scale, activation)
        assert solution.converged.all() and torch.isfinite(solution.z).all()


@pytest.mark.parametrize("regime", ["resident", "cell"], indirect=True)
def test_strides_dtypes_stacks_and_nothing(regime):
    W, c, _ = gaussian(9, 4)
    expected = solved(W, c).z
    wide = torch.zeros(4, 18)
    wide[:, ::2] = c
    assert torch.equal(solved(W.mT.contiguous().mT, wide[:, ::2]).z, expected)
    assert torch.equal(solved(torch.stack((W, 0.5 * W)), c.expand(2, 4, 9)).z[0], expected)
    assert torch.equal(solved(torch._neg_view(-W), torch._neg_view(-c)).z, expected)
    assert solved(W, c[:0]).z.shape == (0, 9)
    half = solved(W.bfloat16(), c.bfloat16())
    assert half.z.dtype == torch.bfloat16 and half.residual.dtype == torch.float32
    assert_as_accurate(half.z, torch_loop(W.bfloat16(), c.bfloat16(), tol=1e-2), exact(W.bfloat16(), c.bfloat16()))


@pytest.mark.parametrize("regime", ["resident", "cell"], indirect=True)
def test_batch_mates_change_nothing(regime):
    W, c, _ = gaussian(11, 18)
    together, apart = solved(W, c), solved(W, c[16:])
    assert torch.equal(together.z[16:], apart.z)
    assert torch.equal(together.iterations[16:], apart.iterations)


@pytest.mark.parametrize("regime", ["resident", "cell"], indirect=True)
def test_wrong_samples_are_named(regime):
    W, c, _ = gaussian(5, 3)
    for bad, place in ((float("nan"), 1), (float("inf"), 2)):
        wrong = c.clone()
        wrong[place, 2] = bad
        with pytest.raises(ValueError, match=rf"c must be finite; c\[{place}\]"):
            solved(W, wrong)
        with pytest.raises(ValueError, match=rf"z0 must be finite; z0\[{place}\]"):
            solved(W, c, z0=wrong)
    wrong = W.clone()
    wrong[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"W must be finite; W\[3, 1\]"):
        solved(wrong, c)


@pytest.mark.parametrize("regime", ["resident", "cell"], indirect=True)
def test_gradient_of_what_is_not_finite_is_nan_for_its_sample(regime):
    W, c, g = gaussian(5, 3)
    g[1, 0] = float("inf")
    c.requires_grad_()
    deq.solve(W, c, backend="triton", on_failure="ignore").z.backward(g)
    assert torch.isnan(c.grad[1]).all() and torch.isfinite(c.grad[[0, 2]]).all()


class TestRescue:
    """As on a GPU, where the host does not wait to know whether samples failed."""

    @pytest.fixture(autouse=True)
    def deferred(self, monkeypatch):
        monkeypatch.setattr(get_backend("triton"), "is_deferred", lambda c: True)

    @pytest.fixture
    def problem(self):
        """A monotone W on which the plain iteration cycles for two of three samples; the plan of a GPU."""
        W = -1.5 * torch.eye(5)
        W[0, 0] = 0.5
        c = torch.zeros(3, 5)
        c[0, 0], c[1, 1:], c[2, 3] = 1.0, torch.arange(1.0, 5.0), 2.0
        made = make_plan(
            dtype="float32", device="cuda", backend="triton", compiled=True, why_no_triton="", max_iter=400
        )
        assert made.rungs == ("cayley", "anderson", "tight cayley", "plain", "newton") and not made.adapts
        return W, c, replace(made, acceleration="none")

    @pytest.mark.parametrize("regime", ["cell"], indirect=True)
    def test_what_was_seen_to_fail_is_rescued_at_once(self, regime, problem):
        W, c, plan = problem
        outcome = ladder.solve(W, c, None, "relu", plan)
        assert outcome.report.failed == 0 and outcome.report.read() == [0, 0, 0, 0]
        torch.testing.assert_close(outcome.z, exact_of(W, c).float(), rtol=1e-4, atol=1e-5)
        d = (exact_of(W, c) > 0).float()
        back = ladder.masked_linear(W.mT, c, d, None, "relu", plan)
        assert back.report.failed == 0
        eye = torch.eye(5, dtype=torch.float64)
        u = torch.linalg.solve(eye - d.double().unsqueeze(-1) * W.mT.double(), (d * c).double())
        torch.testing.assert_close(back.z, u.float(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("regime", ["resident"], indirect=True)
    def test_what_was_not_is_rescued_when_the_status_is_read(self, regime, problem):
        W, c, plan = problem
        outcome = ladder.solve(W, c, None, "relu", plan)
        z = outcome.z.clone()
        assert outcome.report.failed is None and outcome.report.read()[0] == 2
        assert stats.status(outcome.z, outcome.stats).tolist()[0] == deq.Status.CONVERGED
        version = outcome.z._version
        outcome.report.rescue()
        assert outcome.z._version == version, "z is saved for the gradient"
        assert torch.equal(outcome.z[0], z[0])
        torch.testing.assert_close(outcome.z, exact_of(W, c).float(), rtol=1e-4, atol=1e-5)
        assert (stats.status(outcome.z, outcome.stats) == deq.Status.CONVERGED).all()

    @pytest.mark.parametrize("regime", ["resident"], indirect=True)
    def test_the_front_door_says_what_is_left(self, regime, problem, monkeypatch):
        W, c, plan = problem
        monkeypatch.setattr(ladder, "get_backend", lambda name: get_backend("triton"))
        monkeypatch.setattr(sys.modules["deq.run"], "fitted", lambda made, W, c, frozen: plan)
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode():
                weight, injection = W.clone(), c.clone()
                solution = deq.solve(weight, injection, backend="triton")
            assert solution.converged.all()  # and no warning
        gone = deq.solve(weight := W.clone(), c, backend="triton")
        weight += 1.0  # that equation is gone, and nothing can be rescued
        with pytest.warns(deq.ConvergenceWarning, match="2 of 3 samples did not converge"):
            gone.status  # noqa: B018


def exact_of(W, c):
    """The equilibrium of relu for the diagonal W of TestRescue, float64."""
    w = W.diagonal().double()
    return torch.relu(c.double()) / (1 - w)


def gradients(f, W, c, g):
    """f(W, c) and its gradients for g."""
    W, c = W.clone().requires_grad_(), c.clone().requires_grad_()
    z = f(W, c)
    return z.detach(), *torch.autograd.grad(z, (W, c), g)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("activation", ["tanh", "gelu"])  # the derivative from z, or from one more product
def test_inside_torch_compile_with_gradients(activation):
    W, c, g = gaussian(9, 3)
    eager = lambda W, c: solved(W, c, activation).z  # noqa: E731
    solve = lambda W, c: deq.solve(W, c, activation, backend="triton").z  # noqa: E731
    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, W, c, g), gradients(eager, W, c, g), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_under_the_transforms_of_torch_func():
    W, c, g = gaussian(7, 3)
    solve = lambda W, c: solved(W, c, "tanh").z  # noqa: E731
    z, dW, dc = gradients(solve, W, c, g)
    assert torch.equal(vmap(solve, (None, 0))(W, torch.stack((c, 2 * c)))[0], z)
    assert torch.equal(vmap(solve)(torch.stack((W, W / 2)), torch.stack((c, c)))[1], solve(W / 2, c))
    loss = lambda W, c, g: (solve(W, c) * g).sum()  # noqa: E731
    for ours, theirs in zip(grad(loss, (0, 1))(W, c, g), (dW, dc), strict=True):
        assert torch.equal(ours, theirs)
    of_each_sample = vmap(grad(loss), (None, 0, 0))(W, c, g)
    torch.testing.assert_close(of_each_sample.sum(0), dW)
    direction = jvp(solve, (W, c), (torch.zeros_like(W), g))[1]
    torch.testing.assert_close((direction * g).sum(), (dc * g).sum(), rtol=1e-3, atol=1e-4)


def test_a_loop_of_inference_mode_serves_training_too(monkeypatch):
    """A validation may come before the first step, and whoever reads a status has its rescue made in that mode."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    )
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: torch.zeros(*shape, **options))
    nothing = lambda *_: None  # noqa: E731
    with torch.inference_mode():
        loop = chunks.Loop(torch.device("cpu"))
        monkeypatch.setattr(loop, "_launch", nothing)
        counters = torch.zeros(2, dtype=torch.int32).as_subclass(_OnGpu)
        assert loop.repeat(nothing, nothing, nothing, 40, 6, 2, counters) == 0
    loop._graphs["any"] = None
    loop.fill(list(range(len(records.TABLE))))
    counters = torch.zeros(2, dtype=torch.int32).as_subclass(_OnGpu)
    assert loop.repeat(nothing, nothing, nothing, 40, 6, 2, counters) == 0


class _OnGpu(torch.Tensor):
    """A tensor that says so."""

    device = SimpleNamespace(type="cuda")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("m", [1, 17, 160])
@pytest.mark.parametrize("increments", ["bfloat16", "float8"])
def test_what_steps_multiply_is_the_weight_rounded(increments, m, turned):
    W = gaussian(m, 1, scale=30.0)[0]
    W[m // 2] *= 1e-30 if m > 1 else 1  # a row of its own unit
    W[m // 3] = 0
    W = W.mT if turned else W
    dtype = torch.bfloat16 if increments == "bfloat16" else torch.float8_e4m3fn
    low, units = torch.empty(m, m).to(dtype), torch.full((m,), torch.nan)
    table = torch.zeros(32, dtype=torch.int64)
    for name, tensor in (("W", W), ("LOW", low), ("ROW_SCALES", units)):
        table[records.TABLE.index(name)] = tensor.data_ptr()
    rows, columns = delta.LOW_TILE
    kind = records.INCREMENTS[increments]
    delta.low_kernel[(-(-m // rows),)](table, m, *W.stride(), INCREMENTS=kind, BLOCK_N=rows, BLOCK_K=columns)
    if increments == "bfloat16":
        torch.testing.assert_close(low.float(), W, rtol=2**-7, atol=0)  # the interpreter cuts off where a GPU rounds
        return
    scaled = W / units[:, None]
    expected = scaled.to(dtype).float()
    # The interpreter loses what carries into the exponent, and rounds subnormals down.
    carried = (torch.frexp(expected).mantissa.abs() == 0.5) & (expected.abs() > scaled.abs())
    tiny = (expected.abs() < 2**-6) & ((low.float() - scaled).abs() < 2**-9)
    assert ((low.float() == expected) | carried | tiny).all() and (low.float() == expected).float().mean() > 0.9
    mantissas, largest = torch.frexp(units).mantissa, scaled.abs().amax(1)
    assert (mantissas == 0.5).all() and ((largest == 0) | ((largest >= 128) & (largest < 256))).all()
