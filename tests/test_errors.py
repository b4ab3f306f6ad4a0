"""Bad input: one clear error or an honest status, never a crash, never NaN out of finite numbers."""

import copy
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from problems import gaussian

import deq
from deq import _library, weights

BACKENDS = ["reference"] + (["cpu"] if _library.compiled is not None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)
W, c, _ = gaussian(6, 4)
nan, inf = float("nan"), float("inf")


def changed(tensor, *index_and_value):
    *index, value = index_and_value
    tensor = tensor.clone()
    tensor[tuple(index)] = value
    return tensor


WRONG = {
    "W of one dimension": (W[0], c, {}, ValueError, r"W must be \(m, m\) or \(S, m, m\); got shape \(6,\)"),
    "W not square": (W[:4], c, {}, ValueError, r"W must be \(m, m\) or \(S, m, m\); got shape \(4, 6\)"),
    "m = 0": (W[:0, :0], c[:, :0], {}, ValueError, r"W must have width m of at least 1; got shape \(0, 0\)"),
    "c too narrow": (W, c[:, :5], {}, ValueError, r"c must be \(\.\.\., 6\) for W \(6, 6\); got shape \(4, 5\)"),
    "c without the stack": (W.expand(3, 6, 6), c, {}, ValueError, r"c must be \(3, \.\.\., 6\) for W \(3, 6, 6\); got"),
    "c a scalar": (W, c.sum(), {}, ValueError, r"c must be .* got shape \(\)"),
    "W a list": ([[0.5]], c, {}, TypeError, r"W must be a torch.Tensor or a structure from deq.weights; got list"),
    "c an array": (W, c.numpy(), {}, TypeError, r"c must be a torch.Tensor; got ndarray"),
    "dtypes mixed": (W, c.double(), {}, TypeError, r"c must have the dtype of W, torch.float32; got torch.float64"),
    "integers": (W.int(), c.int(), {}, TypeError, r"W must be float64, float32, bfloat16, float16; got torch.int32"),
    "devices mixed": (W, c.to("meta"), {}, ValueError, r"c must be on the device of W, cpu; got meta"),
    "z0 of another shape": (W, c, {"z0": c[:2]}, ValueError, r"z0 must have the shape of c, \(4, 6\); got \(2, 6\)"),
    "a sparse weight": (W.to_sparse(), c, {}, TypeError, r"W must be dense; got layout torch.sparse_coo"),
    "sparse samples": (W, c.to_sparse(), {}, TypeError, r"c must be dense; got layout torch.sparse_coo"),
    "z0 of another dtype": (W, c, {"z0": c.double()}, TypeError, r"z0 must have the dtype of W"),
    "NaN in W": (changed(W, 2, 3, nan), c, {}, ValueError, r"W must be finite; W\[2, 3\] is nan"),
    "inf in W": (changed(W, 5, 5, -inf), c, {}, ValueError, r"W must be finite; W\[5, 5\] is -inf"),
    "inf in c": (W, changed(c, 1, 0, inf), {}, ValueError, r"c must be finite; c\[1\] holds NaN or infinity"),
    "NaN in z0": (W, c, {"z0": changed(c, 3, 2, nan)}, ValueError, r"z0 must be finite; z0\[3\] holds NaN"),
    "tol = 0": (W, c, {"tol": 0.0}, ValueError, r"tol must be positive and finite; got 0.0"),
    "tol < 0": (W, c, {"tol": -1e-3}, ValueError, r"tol must be positive and finite; got -0.001"),
    "tol a NaN": (W, c, {"tol": nan}, ValueError, r"tol must be positive and finite; got nan"),
    "tol beyond all floats": (W, c, {"tol": 10**400}, ValueError, r"tol must be positive and finite; got 1000"),
    "tol below all floats": (W, c, {"tol": Fraction(1, 10**400)}, ValueError, r"tol must be positive and finite"),
    "tol a string": (W, c, {"tol": "1e-3"}, TypeError, r"tol must be a number; got '1e-3'"),
    "max_iter = 0": (W, c, {"max_iter": 0}, ValueError, r"max_iter must be at least 1 .* got 0"),
    "max_iter a float": (W, c, {"max_iter": 40.0}, TypeError, r"max_iter must be an integer; got 40.0"),
    "unknown activation": (W, c, {"activation": "reul"}, ValueError, r"activation must be one of identity, relu"),
    "unknown solver": (
        W,
        c,
        {"solver": "broyden"},
        ValueError,
        r"solver must be one of 'auto', 'plain', 'anderson', 'cayley', 'direct'; got",
    ),
    "unknown criterion": (W, c, {"criterion": "abs"}, ValueError, r"criterion must be one of 'residual', 'error'; got"),
    "unknown backward": (W, c, {"backward": "jfb"}, ValueError, r"backward must be one of 'implicit', .* got 'jfb'"),
    "unknown on_failure": (
        W,
        c,
        {"on_failure": "no"},
        ValueError,
        r"on_failure must be one of 'warn', 'raise', 'ignore'",
    ),
    "unknown backend": (
        W,
        c,
        {"backend": "gpu"},
        ValueError,
        r"backend must be one of 'auto', 'cpu', 'triton', 'cuda', 'reference'; got",
    ),
    "unknown keyword": (W, c, {"tolerance": 1e-3}, TypeError, r"no option tolerance=0.001; .*allowed are z0, tol"),
    "misspelt keyword": (W, c, {"max_iters": 5}, TypeError, r"no option max_iters=5; did you mean 'max_iter'\?"),
}


@backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, backend):
    weight, injection, options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        deq.solve(weight, injection, **{"backend": backend, **options})


@backends
def test_position_of_a_bad_sample_in_deep_batches(backend):
    deep = changed(c.reshape(2, 2, 6), 1, 0, 4, nan)
    with pytest.raises(ValueError, match=r"c\[1, 0\] holds NaN"):
        deq.solve(W, deep, backend=backend)
    with pytest.raises(ValueError, match=r"W\[1, 0, 2\] is nan"):
        deq.solve(changed(W.repeat(3, 1, 1), 1, 0, 2, nan), c.expand(3, 4, 6), backend=backend)
    with pytest.raises(ValueError, match=r"c must be finite; c holds NaN"):
        deq.solve(W, changed(c[0], 1, nan), backend=backend)


@backends
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_a_weight_that_is_not_finite_is_not_rescued(backend, activation):
    """LAPACK had the last word in Newton's rung."""
    factors = weights.DiagonalLowRank(W[0], W[:, :3], changed(W[:, 3:], 2, 1, inf))
    for weight in (changed(W, 2, 3, inf), changed(10 * W, 0, 0, nan), factors):
        with pytest.raises(ValueError, match=r"W must be finite; W\["):
            deq.solve(weight, c, activation, backend=backend)


@backends
def test_divergence_is_honest(backend):
    """Weights of norm 10: every sample that fails says so and keeps a finite iterate; the others are not touched."""
    big = 10 * torch.eye(6)
    mixed = torch.cat((c.abs(), -c.abs()))  # relu(10 z - |c|) = 0 is an equilibrium
    with pytest.warns(
        deq.ConvergenceWarning,
        match=r"deq.solve: 4 of 8 samples did not converge \(4 DIVERGED\); worst .* iterates were returned; pass",
    ):
        solution = deq.solve(big, mixed, backend=backend, solver="plain")
    assert solution.converged.tolist() == [False] * 4 + [True] * 4
    assert (solution.status[:4] == deq.Status.DIVERGED).all() and torch.isfinite(solution.z).all()
    assert (solution.z[4:] == 0).all() and (solution.iterations[:4] < 100).all()
    with pytest.raises(deq.ConvergenceError, match=r"4 of 8 .* iterates are in `solution` of this error") as caught:
        deq.solve(big, mixed, backend=backend, solver="plain", on_failure="raise")
    assert torch.equal(caught.value.solution.z, solution.z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deq.solve(big, mixed, backend=backend, solver="plain", on_failure="ignore")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("kind", ["solve", "EquilibriumLinear", "fixed_point", "Equilibrium", "gradient", "graph"])
def test_a_warning_names_the_line_that_called(kind):
    """Not one of deq or torch, whatever lies between."""
    big, weight = 10 * torch.eye(6), torch.full((), 0.9, requires_grad=True)
    linear = deq.nn.EquilibriumLinear(6, 6, max_iter=1)
    equilibrium = deq.nn.Equilibrium(lambda z, x: 0.9 * z + x, solver="plain", max_iter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = deq.fixed_point(lambda z: weight * z + 1, torch.zeros(2, 6), backward_solver="plain", backward_max_iter=1).z
    calls = {
        "solve": lambda: deq.solve(big, c, solver="plain"),
        "EquilibriumLinear": lambda: linear(c),
        "fixed_point": lambda: deq.fixed_point(lambda z: 0.9 * z + c, 0 * c, solver="plain", max_iter=2),
        "Equilibrium": lambda: equilibrium(c),
        "gradient": lambda: z.sum().backward(),
        "graph": lambda: torch.compile(deq.solve, backend="aot_eager")(big, c, solver="plain"),
    }
    with pytest.warns(deq.ConvergenceWarning) as caught:
        calls[kind]()
    assert [w.filename for w in caught if w.category is deq.ConvergenceWarning] == [__file__]


@backends
def test_best_iterate_of_a_failure(backend):
    """A limit cycle: z1 = relu(2 - 3 z1) alternates between 0 and 2; the status is STALLED and z finite."""
    cycle = deq.solve(
        torch.tensor([[-3.0]]), torch.tensor([[2.0]]), solver="plain", on_failure="ignore", backend=backend
    )
    assert cycle.status.item() == deq.Status.STALLED and cycle.iterations.item() < 200
    slow = torch.tensor([[0.999]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    short = deq.solve(slow, one, solver="plain", max_iter=50, on_failure="ignore", backend=backend)
    assert short.status.item() == deq.Status.MAX_ITER and short.iterations.item() == 50
    expected = (1 - 0.999**50) / (1 - 0.999)  # 50 terms of the geometric series
    assert abs(short.z.item() - expected) < 1e-9 and 0.01 < short.residual.item() < 0.03


def test_an_error_can_be_copied_and_sent_to_another_process():
    """Unpickled by its message alone it ended a pool of processes."""
    with pytest.raises(deq.ConvergenceError) as raised:
        deq.solve(2 * torch.eye(6), c, "relu", solver="plain", max_iter=5, on_failure="raise")
    error = raised.value
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is deq.ConvergenceError and str(twin) == str(error)
        assert torch.equal(twin.solution.z, error.solution.z)


def test_what_is_left_to_say_is_said_before_a_copy():
    said = []
    pending = deq.Solution(*vars(deq.solve(W, c)).values())
    pending.when_read = lambda solution: said.append(solution)  # as of a solve on a GPU: it cannot be pickled
    twins = [pickle.loads(pickle.dumps(pending)), copy.copy(pending)]
    assert len(said) == 1 and all(torch.equal(twin.z, pending.z) and bool(twin.converged.all()) for twin in twins)


@backends
@pytest.mark.parametrize("options", [{}, {"solver": "plain"}, {"criterion": "error"}])
def test_any_tolerance_that_is_a_float(backend, options):
    for weight in (W, 40 * W):
        assert bool(deq.solve(weight, c, "tanh", tol=1e300, backend=backend, **options).converged.all())
    solution = deq.solve(W, c, "tanh", tol=5e-324, max_iter=200, on_failure="ignore", backend=backend, **options)
    assert float(solution.residual.max()) < 1e-6


@backends
def test_a_tolerance_below_the_floor_stalls_quickly(backend):
    weight, injection, _ = gaussian(200, 3)
    solution = deq.solve(weight, injection, tol=1e-12, on_failure="ignore", solver="plain", backend=backend)
    assert (solution.status == deq.Status.STALLED).all() and (solution.iterations < 100).all()
    assert (solution.residual < 1e-6).all()


@backends
def test_half_precision_overflow_is_said(backend):
    """The equilibrium of z = 0.9 z + 6e4 is 6e5, which float16 cannot hold."""
    weight = torch.tensor([[0.9]], dtype=torch.float16)
    solution = deq.solve(weight, torch.full((1, 1), 6e4, dtype=torch.float16), on_failure="ignore", backend=backend)
    assert solution.status.item() == deq.Status.DIVERGED and solution.z.item() == torch.finfo(torch.float16).max


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled library")
def test_weights_changed_behind_autograds_back_are_seen():
    """The cache of packed weights goes by content: .data, views and reused memory cannot bring back old weights."""
    weight, injection, _ = gaussian(40, 5)
    first = deq.solve(weight, injection).z
    weight.data.mul_(0.5)
    assert not torch.equal(deq.solve(weight, injection).z, first)
    weight.data.mul_(2.0)
    assert torch.equal(deq.solve(weight, injection).z, first)
    weight.numpy()[3, 4] += 0.25
    assert torch.equal(deq.solve(weight, injection).z, deq.solve(weight.clone(), injection).z)
    with torch.inference_mode():
        assert torch.equal(deq.solve(weight.clone(), injection).z, deq.solve(weight, injection).z)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled library")
def test_the_cache_is_bounded():
    library = _library.compiled
    library.deq_cpu_clear_cache()
    injection = torch.zeros(1, 1500)
    kept = [torch.eye(1500) * 1e-3 * k for k in range(60)]  # 9 MB each
    for weight in kept:
        deq.solve(weight, injection)
    assert 0 < library.deq_cpu_cache_bytes() <= 300 << 20
    assert library.deq_cpu_clear_cache() > 0 and library.deq_cpu_cache_bytes() == 0


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled library")
def test_the_weight_cache_is_short_however_small_the_weights():
    library = _library.compiled
    library.deq_cpu_clear_cache()
    weights = torch.full((200, 3, 3), 0.1) + torch.arange(200.0).view(-1, 1, 1) / 1000
    deq.solve(weights[0], torch.ones(2, 3))
    one = library.deq_cpu_cache_bytes()
    for W in weights:  # 200 places in memory: none takes another's entry
        deq.solve(W, torch.ones(2, 3))
    assert library.deq_cpu_cache_bytes() <= 64 * one
