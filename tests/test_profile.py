"""deq.profile: every count against another way of counting the same thing."""

import threading
from collections import Counter

import pytest
import torch
from profiles import CEILINGS, leaves, profile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import deq
from deq import _library, torchdeq, weights
from deq.profiling import counter, memory, tables

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def flops_of(run):
    with FlopCounterMode(display=False) as mode:
        result = run()
    return mode.get_total_flops(), result


def by_flop_counter(*arguments, **options):
    """FLOPs of forward and backward as torch counts them, and the solution."""
    forward, solution = flops_of(lambda: deq.solve(*arguments, **options))
    inputs = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    return forward, flops_of(lambda: torch.autograd.grad(solution.z.sum(), inputs))[0], solution


@pytest.mark.parametrize("shape", [(17, 5), (64, 33), (1, 3), (8, 1)], ids=str)
def test_flops_of_the_reference_path_are_those_of_flop_counter(shape):
    """Exactly, in both passes. The gradient is that of a scalar, in any multiple: the adjoint's path is the same."""
    (m, B), options = shape, {"backend": "reference", "solver": "plain"}
    W, c = leaves(m, B)
    report = profile(lambda: deq.solve(W, c, **options).z.sum())
    forward, backward, solution = by_flop_counter(W, c, **options)
    assert report.passes[0].counts.flops == forward == 2 * m * m * int(solution.iterations.sum())
    dW = 2 * m * m * B
    assert report.passes[1].counts.flops == backward == 2 * m * m * sum(report.passes[1].iterations) + dW
    for one in report.passes:
        assert one.executed == one.counts.flops and set(one.counts.executed) == {"float32"}


@needs_library
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("shape", [(17, 5), (64, 33), (8, 1)], ids=str)
def test_flops_of_the_engine_are_those_of_the_reference_without_its_product_with_zero(shape, activation):
    m, B = shape
    W, c = leaves(m, B, torch.float64)
    ours, ours_back, solution = by_flop_counter(W, c, activation, solver="plain")
    theirs, theirs_back, reference = by_flop_counter(W, c, activation, solver="plain", backend="reference")
    assert torch.equal(solution.iterations, reference.iterations)
    assert theirs - ours == 2 * m * m * B
    assert theirs_back - ours_back == 2 * m * m * B
    report = profile(deq.solve, W, c, activation, solver="plain")
    assert report.passes[0].counts.flops == ours
    assert report.passes[0].iterations == solution.iterations.tolist()


@needs_library
def test_what_the_engine_says_it_multiplied():
    """tanh has no zeros to skip: all useful FLOPs are carried out, and no others; relu leaves some out."""
    for activation in ("tanh", "relu"):
        W, c = leaves(160, 40, torch.float64)
        report = profile(deq.solve, W, c, activation, solver="plain")
        for one in report.passes:
            rows = sum(one.iterations) - len(one.iterations)
            assert one.counts.rows == {"float64": rows}
            products = one.executed - (2 * 160 * 160 * 40 if one.name == "backward" else 0)  # dW
            skipped = one.counts.flops - one.executed
            assert products <= 2 * 160 * 160 * rows and (skipped > 0) == (activation == "relu")


@needs_library
def test_precisions_are_told_apart():
    if not deq.info().increments:
        pytest.skip("this CPU or build multiplies increments in float32 only")
    W, c = leaves(256, 64)
    report = profile(deq.solve, W, c)
    name = deq.info().increments[0]
    for one in report.passes:
        counts = one.counts
        evaluations = sum(one.iterations) - len(one.iterations)
        corrections = counts.rows[name] + counts.rows["float32"] - evaluations
        assert 0 <= corrections <= counts.rows[name]
        assert counts.executed[name] == 2 * 256 * 256 * counts.rows[name]
        assert counts.rows["float32"] < evaluations / 2
    assert any(name in line for line in report.plans[0])


@needs_library
def test_warm_starts_take_a_product_more():
    W, c = (t.detach() for t in leaves(24, 7))
    flops, cold = flops_of(lambda: deq.solve(W, c, solver="plain"))
    assert flops == 2 * 24 * 24 * int((cold.iterations - 1).sum())
    flops, warm = flops_of(lambda: deq.solve(W, c, solver="plain", z0=cold.z + 0.1))
    assert flops == 2 * 24 * 24 * int(warm.iterations.sum())


@needs_library
def test_structured_weights():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.1  # noqa: E731
    m, B, r = 256, 64, 3
    c = draw(B, m)
    assert flops_of(lambda: deq.solve(weights.LowerTriangular(draw(m, m)), c))[0] == B * m * (m - 1)
    assert flops_of(lambda: deq.solve(weights.Diagonal(draw(m)), c))[0] == 0
    low_rank = weights.DiagonalLowRank(draw(m), draw(m, r), draw(m, r))
    flops, solution = flops_of(lambda: deq.solve(low_rank, c))
    assert solution.plan.map == "reduced to R^r"
    assert 0 < flops < 2 * m * m * B and flops % (2 * r * m) == 0


@needs_library
@pytest.mark.parametrize("batch", [0, 3])
def test_formulas_of_tensors_without_data(batch):
    with FakeTensorMode(), FlopCounterMode(display=False) as mode:
        W, c = torch.empty(16, 16), torch.empty(batch, 16)
        z, said, report = torch.empty_like(c), torch.empty(batch * 9, dtype=torch.uint8), torch.empty(4).long()
        torch.ops.deq.solve_(W, c, c[:0], z, said, report, 1, 0, 5, 0, 1e-5, 100, 0, 0, 0.0)
    assert mode.get_total_flops() == 2 * 16 * 16 * batch


@needs_library
def test_torch_profiler_shows_the_operators_by_name():
    W, c = leaves(16, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        deq.solve(W, c).z.sum().backward()
    assert {"deq::solve_", "deq::masked_linear_"} <= {event.key for event in profiler.key_averages()}


def test_layers_and_other_callables():
    torch.manual_seed(0)
    layer = deq.nn.EquilibriumLinear(5, 24, "tanh")
    x = torch.randn(3, 4, 5)
    report = profile(layer, x)
    assert report.what == "EquilibriumLinear" and report.shapes == [(12, 24)]
    assert len(report.passes[0].iterations) == 12
    injection = 2 * 12 * 5 * 24
    flops, _ = flops_of(lambda: layer(x))
    assert report.passes[0].counts.flops == flops and flops > injection
    assert all(p.grad is None for p in layer.parameters())
    with torch.no_grad():
        assert [one.name for one in profile(layer, x).passes] == ["forward"]
    plain = profile(torch.nn.Linear(4, 4), torch.randn(2, 4))
    assert plain.shapes == [] and plain.passes[0].counts.flops == 2 * 2 * 4 * 4
    assert "solved nothing" in str(plain)


def test_a_callable_with_two_solves():
    W, c = leaves(16, 6)

    def two(W, c):
        return deq.solve(W, deq.solve(W, c, solver="plain").z, solver="plain").z

    report = profile(two, W, c)
    assert report.shapes == [(6, 16)] * 2 and len(report.passes[0].iterations) == 12
    assert len(report.plans) == 1


def test_a_training_step():
    """What differentiates by itself is one pass, of as many FLOPs and iterations as both."""
    W, c = leaves(16, 6)

    def step():
        W.grad = c.grad = None
        loss = deq.solve(W, c).z.square().sum()
        loss.backward()
        return loss.detach()

    report = profile(step)
    (one,) = report.passes
    assert "retained after step" in str(report)
    both = profile(lambda: deq.solve(W, c).z.square().sum()).passes
    assert one.name == "step" and len(one.iterations) == 12 == sum(len(each.iterations) for each in both)
    assert one.counts.executed == sum((Counter(each.counts.executed) for each in both), Counter())
    with pytest.raises(ValueError, match="leaves the backward pass to"):
        profile(step, feed_forward=2)
    assert report.memory.model_retained is None and report.memory.model_forward > 0
    (retained,) = (line for line in str(report).splitlines() if "retained" in line)
    assert retained.split() == ["retained", "after", "step", *tables.si(report.memory.retained, "B").split()]


@pytest.mark.parametrize(
    "returns", [lambda loss: loss, lambda loss: None, lambda loss: loss.item()], ids=["loss", "None", "number"]
)
def test_a_training_step_may_return_anything(returns):
    """Its loss, whose graph the backward pass has freed, or nothing that holds a tensor."""
    torch.manual_seed(0)
    layer = deq.nn.EquilibriumLinear(5, 24, "tanh")
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.0), torch.randn(6, 5)

    def step(x):
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        optimizer.step()
        return returns(loss)

    (one,) = profile(step, x).passes
    assert one.name == "step" and len(one.iterations) == 12 and one.counts.flops > 0


@pytest.mark.parametrize("backward", ["one_step", "phantom", "unrolled", "neumann"])
def test_a_training_step_whose_backward_pass_solves_nothing(backward):
    """Of an unrolled iteration or of its last step: no adjoint tells that it differentiates."""
    W, c = leaves(16, 6)

    def forward():
        return deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), torch.zeros(6, 16), backward=backward).z.sum()

    def step(gives_loss):
        W.grad = c.grad = None
        loss = forward()
        loss.backward()
        return loss if gives_loss else None

    def functional_step():
        loss = forward()
        return loss, torch.autograd.grad(loss, (W, c))

    flops = sum(one.counts.flops for one in profile(forward).passes)
    for call, *arguments in ((step, True), (step, False), (functional_step,)):
        (one,) = profile(call, *arguments).passes
        assert one.name == "step" and len(one.iterations) == 6 and one.counts.flops == flops


def test_a_training_step_of_a_structured_weight():
    d, c = torch.full((8,), 0.5, requires_grad=True), torch.ones(3, 8)

    def step():
        d.grad = None
        loss = deq.solve(weights.Diagonal(d), c).z.sum()
        loss.backward()
        return loss

    assert [one.name for one in profile(step).passes] == ["step"]


@pytest.mark.parametrize("structured", [False, True])
def test_arguments_that_were_computed_count_as_leaves(structured):
    """The graph that made them is the caller's: it is neither accounted for nor freed."""
    W, c = leaves(16, 6)
    made = [2 * W, 3 * c]
    if structured:
        made[0] = weights.LowerTriangular(made[0])
    report = profile(deq.solve, *made)
    expected = profile(
        deq.solve, *(weights.LowerTriangular(W) if structured else W.detach().mul(2).requires_grad_(), c)
    )
    assert [one.name for one in report.passes] == ["forward", "backward"]
    assert report.passes[1].counts.operators == expected.passes[1].counts.operators
    deq.solve(*made).z.sum().backward()
    assert W.grad is not None and c.grad is not None
    assert len(profile(lambda given: deq.solve(**given), {"W": 2 * W, "c": 3 * c}).passes) == 2


def test_fixed_points_of_any_f():
    W, c = leaves(16, 6)

    def solve():
        return deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), torch.zeros(6, 16), solver="plain").z

    report = profile(solve)
    forward, backward = report.passes
    told = deq.fixed_point(lambda z: torch.tanh(z @ W.mT + c), torch.zeros(6, 16), solver="plain").iterations
    assert report.shapes == [(6, 16)] and forward.iterations == told.tolist() and len(backward.iterations) == 6
    assert "\nplain, tol 1e-05\n  a sample is done at" in str(report) and report.memory.model_both is None
    with pytest.raises(ValueError, match="the call solved another f"):
        profile(solve, feed_forward=2)


def test_a_fixed_point_of_several_tensors():
    W, c = leaves(16, 6)

    def solve():
        state = torch.zeros(6, 16), torch.zeros(6, 3)
        return deq.fixed_point(lambda z: (torch.tanh(z[0] @ W.mT + c), 0.5 * z[1] + z[0][:, :3]), state)

    alone = profile(lambda: solve().z)
    for returns in (solve, lambda: [solve()]):
        report = profile(returns)
        assert [one.name for one in report.passes] == ["forward", "backward"] and report.shapes == [(6, 19)]
        assert [one.counts.flops for one in report.passes] == [one.counts.flops for one in alone.passes]


@pytest.mark.parametrize("ift", [False, True])
@pytest.mark.parametrize("writer", [None, lambda info: None])
def test_a_program_written_for_torchdeq(ift, writer):
    """It was told to have solved nothing."""
    W, c = leaves(16, 6)
    model = torchdeq.get_deq(ift=ift)

    def solve():
        return model(lambda z: torch.tanh(z @ W.mT + c), torch.zeros(6, 16), backward_writer=writer)

    forward, backward = (report := profile(solve)).passes
    assert report.shapes == [(6, 16)] and forward.iterations == solve()[1]["nstep"].tolist()
    assert len(backward.iterations) == (6 if ift else 0)
    assert len(report.plans) == 1 and report.memory.model_forward is None


@pytest.mark.parametrize("layers", [1, 3])
def test_feed_forward_nets_have_equal_shares(layers):
    m, B = 96, 32
    W, c = leaves(m, B)
    report = profile(deq.solve, W, c, feed_forward=layers)
    by = {net.equal: net for net in report.beside}
    assert set(by) == {"parameters", "FLOPs / iteration", "memory"}
    parameters = by["parameters"]
    assert abs(parameters.parameters - (m * m + m)) <= layers * (2 * parameters.width + 2)
    assert by["FLOPs / iteration"].width == m
    assert by["memory"].peak == pytest.approx(report.memory.tensors_both, rel=0.05)
    for net in report.beside:
        assert net.flops["forward"] == 2 * B * net.depth * net.width**2  # dx and dW of every layer:
        assert net.flops["backward"] == 2 * net.flops["forward"]


def test_a_float64_weight_comes_from_where_its_bytes_fit():
    """400^2 elements of 4 bytes lie in a cache of 1 MiB, of 8 bytes they do not."""
    for dtype, where in ((torch.float32, "cache"), (torch.float64, "memory")):
        report = profile(deq.solve, *leaves(400, 2, dtype))
        assert report.bandwidth_share(report.passes[0])[0] == where


def test_bytes_of_an_operator_are_its_inputs_and_outputs_once():
    a, given = torch.ones(4, 8), torch.empty(4, 4)
    for run in (lambda: torch.mm(a, a.mT), lambda: torch.mm(a, a.mT, out=given)):
        with counter.Counter() as counted:
            run()
        assert counted.counts.bytes == 4 * (2 * 4 * 8 + 4 * 4)


@pytest.mark.filterwarnings("ignore:Sparse [BC]S[RC] tensor support")
@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]
)
def test_a_sparse_tensor_is_its_indices_and_values(layout):
    """The adjacency of a graph, in a block or made by it: it has no storage of its own."""
    sizes = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    A = (0.3 * torch.eye(8)).to_sparse(layout=layout, **sizes)
    live = counter.Live()
    live.see([A], [])
    assert live.bytes == sum(part.untyped_storage().nbytes() for part in counter._parts(A)) > 8 * 4
    before = live.bytes
    live.see([A.detach()], [A])
    assert live.bytes == before


@pytest.mark.filterwarnings("ignore:Sparse [BC]S[RC] tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_block_of_a_sparse_graph(layout):
    A = (0.3 * torch.eye(6)).to_sparse(layout=layout)
    linear = torch.nn.Linear(4, 4)
    layer = deq.nn.Equilibrium(lambda z, x: torch.tanh(A @ linear(0.3 * z) + x))
    report = profile(layer, torch.randn(6, 4))
    assert [one.name for one in report.passes] == ["forward", "backward"] and report.passes[0].counts.flops > 0


def test_live_bytes():
    live = counter.Live()
    given = torch.zeros(1000)
    with counter.Counter(live) as mode:
        a = torch.ones(100)
        b = given.view(10, 100) + a
        del b
        d = a.view(10, 10)
        d.add_(1)
    assert mode.counts.peak == 400 + 4000 and mode.counts.retained == 400
    assert mode.counts.operators["aten.add_"] == 1 and "aten.view" not in mode.counts.operators


def test_the_theory_of_memory():
    one = memory.Solved((3, 5, 7), torch.float32)
    assert one.buffer == 3 * 5 * 7 * 4 and one.statistics == 15 * 9 and one.weight == 3 * 49 * 4
    trained = memory.Solved((5, 7), torch.float64, True)
    assert trained.statistics == 5 * 13
    forward = 5 * 7 * 8 + 5 * 13
    assert memory.forward_bytes([trained]) == forward
    assert memory.backward_bytes([trained], [trained]) == forward + 5 * 7 * 8 + 49 * 8


@pytest.mark.parametrize("backward", ["implicit", "one_step", "phantom", "unrolled"])
def test_gradients_through_steps_have_no_theory_of_memory(backward):
    W, c = leaves(16, 8)
    account = profile(deq.solve, W, c, backward=backward).memory
    step = profile(lambda: deq.solve(W, c, backward=backward).z.sum().backward()).memory
    W.grad = c.grad = None
    forward, both = (8 * 16 * 4 + 8 * 9, 2 * 8 * 16 * 4 + 16 * 16 * 4 + 8 * 9)
    told = (forward, both, forward, both) if backward == "implicit" else (None,) * 4
    assert (account.model_forward, account.model_both, account.model_retained, step.model_both) == told


def test_what_other_threads_solve_is_not_the_calls():
    """A thread that trains beside: its solves are not told as the call's, nor the call as a step for its adjoints."""
    W, c = leaves(16, 8)
    other, has_begun, is_over = leaves(5, 3), threading.Event(), threading.Event()

    def train():
        while not is_over.is_set():
            deq.solve(*other).z.sum().backward()
            has_begun.set()

    beside = threading.Thread(target=train)
    beside.start()
    try:
        assert has_begun.wait(60)
        report = profile(deq.solve, W, c)
    finally:
        is_over.set()
        beside.join()
    assert report.shapes == [(8, 16)]
    assert [(one.name, len(one.iterations)) for one in report.passes] == [("forward", 8), ("backward", 8)]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((3,), {}, TypeError, "call must be a layer or a callable; got int"),
        ((lambda: None,), {}, ValueError, "call must return tensors"),
        ((torch.zeros, 2), {"feed_forward": 0}, ValueError, "depth of at least 1; got 0"),
        ((torch.zeros, 2), {"feed_forward": 2}, ValueError, "the call made none"),
        ((torch.zeros, 2), {"feed_forward": True}, ValueError, "depth of at least 1; got True"),
        ((torch.zeros, 2), {"seconds": 0}, ValueError, "seconds must be positive"),
        ((torch.zeros, 2), {"seconds": float("nan")}, ValueError, "seconds must be positive; got nan"),
        ((torch.zeros, 2), {"seconds": "1"}, TypeError, "seconds must be a number; got str"),
        ((torch.zeros, 2), {"seconds": True}, TypeError, "seconds must be a number; got bool"),
        ((torch.zeros, 2), {"against": {}}, TypeError, "against must be deq.profiling.Ceilings or None; got dict"),
    ],
)
def test_what_cannot_be_profiled_is_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        deq.profile(*arguments, **({"against": CEILINGS} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flops_of_a_weight_that_the_plain_map_does_not_take(dtype):
    """The call that refuses it counts nothing, whatever its memory held."""
    m, B = 64, 8
    torch.manual_seed(0)
    A = torch.randn(m, m, dtype=dtype) / m**0.5
    W, c = 0.9 * torch.eye(m, dtype=dtype) - 4 * A.mT @ A, torch.randn(B, m, dtype=dtype)
    expected = 2 * m * m * int(deq.solve(W, c, "tanh").iterations.sum())
    for _ in range(3):
        torch.full((B * 16,), 77, dtype=torch.uint8)  # what the next buffer may be made of
        with FlopCounterMode(display=False) as mode:
            deq.solve(W, c, "tanh")
        assert 0.5 * expected <= mode.get_total_flops() <= 1.5 * expected
