"""The Triton kernels of Anderson's history, through the interpreter, against their formulas in torch."""

from collections import defaultdict

import pytest
import torch

from deq.kernels import history
from deq.solvers.generic import Rule
from deq.solvers.generic.torch_steps import TorchSteps
from deq.solvers.generic.triton_steps import TritonSteps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "depth", "D"), [(1, 1, 1), (3, 5, 17), (2, 6, 300), (0, 2, 4)])
def test_measure(B, depth, D, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    y, fy, images, residuals = draw(B, D), draw(B, D), draw(B, depth, D), draw(B, depth, D)
    slots = torch.tensor([depth - 1, -1, 0], dtype=torch.int64)[:B]
    expected_images, expected_residuals = images.clone(), residuals.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_images[row, slot], expected_residuals[row, slot] = fy[row], fy[row] - y[row]
    norms, dots = history.measure(y, fy, images, residuals, slots)
    assert torch.equal(images, expected_images) and torch.equal(residuals, expected_residuals)
    wide = [t.double() for t in (fy - y, fy, y)]
    torch.testing.assert_close(norms, torch.stack([t.norm(dim=1) for t in wide], 1), rtol=1e-13, atol=0)
    products = (expected_residuals.double() @ wide[0].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(dots, torch.where((slots >= 0).unsqueeze(1), products, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize(("B", "depth", "D"), [(1, 1, 1), (3, 5, 17), (2, 6, 1500), (0, 2, 4)])
def test_mix(B, depth, D, damped):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    images, residuals, a, b, out = draw(B, depth, D), draw(B, depth, D), draw(B, depth), draw(B, depth), draw(B, D)
    a[:, depth // 2] = 0
    b[:, depth // 2] = 0
    images[:, depth // 2] = torch.nan  # what has no weight is not read
    mixing = torch.tensor([True, False, True])[:B]
    clean = images.nan_to_num()
    total = (a.unsqueeze(1) @ clean).squeeze(1) + ((b.unsqueeze(1) @ residuals).squeeze(1) if damped else 0)
    expected = torch.where(mixing.unsqueeze(1), total, out)
    history.mix(images, residuals, a, b if damped else None, mixing, out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_solves_with_the_kernels(damping, turned):
    """Whole solves in step with those of plain PyTorch, a sample that turns NaN and one that grows among them."""
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(9, 9, generator=generator, dtype=torch.float64) * 0.2
    c = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    number = torch.arange(4).unsqueeze(1)

    def f(z):
        y = torch.tanh(z @ W.T + c)
        y = torch.where((number == 1) & (z.norm(dim=1, keepdim=True) > 1), torch.nan, y)
        y = torch.where(number == 2, z.square() + 2, y)
        return y.mT.contiguous().mT if turned else y  # values column by column

    for method in ("anderson", "auto"):
        rule = Rule(method, 1e-9, 60, depth=4, damping=damping)
        ours, theirs = TritonSteps(torch.zeros_like(c), rule), TorchSteps(torch.zeros_like(c), rule)
        while theirs.is_running():
            for steps in (ours, theirs):
                steps.advance(f(steps.y))
        assert torch.equal(ours.status, theirs.status) and torch.equal(
            ours.iterations[[0, 3]], theirs.iterations[[0, 3]]
        )
        torch.testing.assert_close(ours.z[[0, 3]], theirs.z[[0, 3]], rtol=1e-8, atol=1e-9)
        assert torch.isfinite(ours.z).all()


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whatever the pointers are of."""
    entered, kernels = [], {"_measure": [], "_mix": []}

    class On:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *error):
            entered.clear()

    monkeypatch.setattr(torch.cuda, "device_of", On)
    for name, seen in kernels.items():
        launcher = lambda *_, seen=seen: seen.extend(entered)  # noqa: E731
        monkeypatch.setattr(history, name, defaultdict(lambda launcher=launcher: launcher))
    y, pairs, slots = torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, dtype=torch.int64)
    history.measure(y, y, pairs, pairs, slots)
    history.mix(pairs, pairs, torch.zeros(2, 4), None, slots > 0, y)
    assert kernels["_measure"][0] is y and kernels["_mix"][0] is pairs


def test_states_of_any_size_are_launched(monkeypatch):
    """CUDA has 2^31 - 1 programs in the first dimension of a grid, 65535 in the others."""
    grids = []

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_: None

    monkeypatch.setattr(history, "_mix", Launcher())
    state = torch.empty(1, 70_000 * history.BLOCK, device="meta")
    history.mix(state[:, None], state[:, None], torch.ones(1, 1), None, torch.ones(1, dtype=torch.bool), state)
    assert all(n <= 65535 for n in grids[0][1:])
