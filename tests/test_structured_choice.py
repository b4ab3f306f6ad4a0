"""When a structure is solved directly, and what is said where it cannot be."""

import pytest
import torch
from structures import BACKENDS, KINDS, WORDS, injection, needs_library, parts, structure

import deq
from deq import weights


@needs_library
def test_auto_takes_the_structure_and_says_so():
    for kind in KINDS:
        m, B = (330, 24) if kind == "diagonal_low_rank" else (24, 6)  # a small low-rank problem is iterated
        W, c = structure(kind, *parts(kind, m)), injection(m, B)
        solution, plain = deq.solve(W, c), deq.solve(W, c, solver="plain")
        assert WORDS[kind] in str(solution.plan) and WORDS[kind].split()[0] in solution.plan.explain().splitlines()[1]
        assert plain.plan.map == "plain"
        assert torch.allclose(plain.z, solution.z, atol=1e-4)
    c = injection(24, 6)
    assert deq.solve(structure("diagonal_low_rank", *parts("diagonal_low_rank", 24)), c).plan.map == "plain"
    assert "direct" in str(deq.solve(*parts("dense", 24), c, "identity").plan)
    assert deq.solve(*parts("dense", 24), c).plan.map == "plain"


@needs_library
def test_what_has_no_unique_root_is_iterated():
    c = -torch.rand(4, 10) - 0.5
    for W in (
        weights.Diagonal(torch.full((10,), 1.5)),
        weights.LowerTriangular(1.5 * torch.eye(10)),
        weights.DiagonalLowRank(torch.full((10,), 1.5), torch.zeros(10, 1), torch.zeros(10, 1)),
    ):
        solution = deq.solve(W, c)
        assert solution.plan.map == "plain" and solution.converged.all() and (solution.z == 0).all()
        with pytest.raises(ValueError, match=r"solver='direct' cannot solve this: .* more than one root.*\[1.5, 1.5\]"):
            deq.solve(W, c, solver="direct")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_named(value, backend):
    for kind, names in (
        *((k, "W") for k in ("lower_triangular", "strictly_lower", "dense")),
        ("diagonal", "d"),
        ("diagonal_low_rank", "dPQ"),
    ):
        activation = "identity" if kind == "dense" else "relu"
        for i, name in enumerate(names):
            tensors, c = [t.clone() for t in parts(kind, 7)], injection(7, 5)
            place = (4,) if name == "d" else (5, 0)
            tensors[i][place] = value
            with pytest.raises(ValueError, match=rf"^{name} must be finite; {name}\[{', '.join(map(str, place))}\] is"):
                deq.solve(structure(kind, *tensors), c, activation, solver="direct", backend=backend)
        c = injection(7, 5)
        c[3, 2] = value
        with pytest.raises(ValueError, match=r"^c must be finite; c\[3\] holds NaN or infinity"):
            deq.solve(structure(kind, *parts(kind, 7)), c, activation, solver="direct", backend=backend)
    with pytest.raises(ValueError, match="z0 must be finite"):
        deq.solve(weights.Diagonal(torch.zeros(3)), torch.ones(2, 3), z0=torch.full((2, 3), value))


def test_what_direct_cannot_do_is_said():
    W, c = parts("dense", 5)[0], injection(5, 2)
    with pytest.raises(
        ValueError, match=r"W is dense and the activation is 'relu'; it serves the identity .* DiagonalLowRank"
    ):
        deq.solve(W, c, solver="direct")
    with pytest.raises(ValueError, match="backward='implicit'; got 'phantom'"):
        deq.solve(weights.Diagonal(torch.zeros(5)), c, solver="direct", backward="phantom")
    low_rank = structure("diagonal_low_rank", *parts("diagonal_low_rank", 5))
    with pytest.raises(ValueError, match=r"criterion='error' is not estimated"):
        deq.solve(low_rank, c, solver="direct", criterion="error")
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda c: deq.solve(weights.Diagonal(torch.zeros(5)), c, solver="direct").z)(c)
    with pytest.raises(ValueError, match=r"c must be .* 5"):
        deq.solve(weights.Diagonal(torch.zeros(5)), c[:, :4])
    with pytest.raises(TypeError, match="c must have the dtype of W"):
        deq.solve(weights.Diagonal(torch.zeros(5)), c.double())


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_transforms_fall_back_to_the_iteration():
    (d,), c = parts("diagonal", 5), injection(5, 2)
    run = lambda d: deq.solve(weights.Diagonal(d), c, "tanh").z.sum()  # noqa: E731
    leaf = d.clone().requires_grad_()
    run(leaf).backward()
    assert torch.allclose(torch.func.grad(run)(d), leaf.grad, atol=1e-4)
    compiled = torch.compile(
        lambda d: deq.solve(weights.Diagonal(d), c, "tanh", on_failure="ignore").z, backend="eager"
    )
    assert torch.allclose(compiled(d), deq.solve(weights.Diagonal(d), c, "tanh").z, atol=1e-4)
