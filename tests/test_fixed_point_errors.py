"""Wrong options, states and results of deq.fixed_point are named."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from fixed_points import SOLVERS

import deq


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_mode": "rel"}, TypeError, "has no option stop_mode='rel'"),
        ({"solvr": "plain"}, TypeError, "did you mean 'solver'"),
        ({"solver": "newton"}, ValueError, "solver must be one of 'plain', 'anderson'"),
        ({"tol": 0.0}, ValueError, "tol must lie between 0"),
        ({"tol": 10**400}, ValueError, "tol must lie between 0"),
        ({"tol": Fraction(1, 10**400)}, ValueError, "tol must lie between 0"),
        ({"tol": True}, TypeError, "tol must be a number; got True"),
        ({"max_iter": 2.0}, TypeError, "max_iter must be an integer; got 2.0"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"damping": 2.5}, ValueError, "damping must lie between 0 and 2"),
        ({"backward": "ift"}, ValueError, "backward must be one of"),
        ({"criterion": "rel"}, ValueError, "criterion must be one of"),
        ({"on_failure": "warning"}, ValueError, "on_failure must be one of"),
        ({"batch_dims": 3}, ValueError, r"batch_dims must lie in 0..2"),
        ({"batch_dims": True}, TypeError, "batch_dims must be an integer; got True"),
        ({"keep": (0,)}, ValueError, "keep must be at least 1"),
        ({"keep": 3}, TypeError, "keep must be a sequence of integers; got 3"),
        ({"keep": [1, 2.5]}, TypeError, "keep must be a sequence of integers; got one with 2.5"),
        ({"keep": (1, 2.5)}, TypeError, "keep must be an integer; got 2.5"),
        ({"tensors": 5}, TypeError, "tensors must be a sequence of tensors; got 5"),
        ({"tensors": [torch.zeros(2), None]}, TypeError, "tensors must be a sequence of tensors; got one with None"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        deq.fixed_point(torch.cos, torch.zeros(2, 3), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"tol": Fraction(1, 1000)},
        {"tol": 1e300},
        {"damping": Fraction(1, 2)},
        {"backward_tol": Fraction(1, 1000)},
        {"backward": "phantom", "backward_damping": Fraction(1, 2)},
        {"damping": np.float32(0.5)},
        {"batch_dims": np.int64(1)},
        {"max_iter": np.int64(50), "depth": np.int64(3)},
    ],
)
def test_numbers_of_other_types(options):
    w = torch.tensor(0.3, requires_grad=True)
    plain = {
        name: float(v) if isinstance(v, Fraction | np.float32) else int(v)
        for name, v in options.items()
        if name != "backward"
    }
    found = []
    for given in (options, options | plain):
        z = deq.fixed_point(lambda z: torch.tanh(w * z + 1), torch.zeros(2, 3), **given).z
        found.append((z, *torch.autograd.grad(z.sum(), w)))
    assert all(map(torch.equal, *found))


def test_wrong_states():
    with pytest.raises(TypeError, match=r"z0 must be a torch\.Tensor, or a tuple or list of them; got int"):
        deq.fixed_point(torch.cos, 3)
    with pytest.raises(TypeError, match="z0 must be dense; got layout"):
        deq.fixed_point(lambda z: z, torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="z0 must be float32, float64"):
        deq.fixed_point(torch.cos, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="z0 must be finite; sample 1 holds NaN"):
        deq.fixed_point(torch.cos, torch.tensor([[0.0], [torch.nan]]))
    with pytest.raises(ValueError, match="must agree in its first 1 dimension"):
        deq.fixed_point(lambda z: z, (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match=r"f's result must be a tensor of the shape of z0, \(2, 3\); got .* \(2, 4\)"):
        deq.fixed_point(lambda z: torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="f's result must be tensors of"):
        deq.fixed_point(lambda z: z[0], (torch.zeros(2, 3), torch.zeros(2, 1)))
    with pytest.raises(TypeError, match="f's result must be dense; got layout torch"):
        deq.fixed_point(lambda z: z.to_sparse(), torch.zeros(2, 3))
    for dtype in (torch.complex64, torch.int32, torch.bool):
        with pytest.raises(
            TypeError, match=f"f's result must be of the dtype of z0 or another floating one; got {dtype}"
        ):
            deq.fixed_point(lambda z, dtype=dtype: z.to(dtype), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="f's result must be on the device of z0, cpu; got meta"):
        deq.fixed_point(lambda z: (z[0], z[1].to("meta")), (torch.zeros(2, 3), torch.zeros(2, 1)))
    with pytest.raises(RuntimeError, match="f must not modify its argument in place"):
        deq.fixed_point(lambda z: z.add_(1), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="f must be callable"):
        deq.fixed_point(None, torch.zeros(2, 3))


def test_raise_carries_the_solution():
    with pytest.raises(deq.ConvergenceError, match="2 DIVERGED") as caught:
        deq.fixed_point(lambda z: 3 * z + 1, torch.zeros(2, 3), solver="plain", on_failure="raise")
    assert caught.value.solution.z.shape == (2, 3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_result_on_another_device(solver, grad):
    """Is named, where its memory would be read."""
    w = torch.ones(3, requires_grad=grad)
    with pytest.raises(ValueError, match="f's result must be on the device of z0, cpu; got meta"):
        deq.fixed_point(lambda z: (0.5 * z + w).to("meta"), torch.zeros(2, 3), solver=solver)
