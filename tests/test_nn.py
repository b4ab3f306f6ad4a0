"""The layer: starts well, trains, keeps its guarantees, saves, copies and says what is wrong."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch.func import functional_call

import deq.nn
from deq.activations import ACTIVATIONS
from deq.nn import EquilibriumLinear
from deq.nn.weight_modules import WEIGHTS
from deq.solve import solve

KINDS = list(WEIGHTS)
GUARANTEED = ["contractive", "monotone", "lower_triangular", "diagonal"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestUntrained:
    @pytest.mark.parametrize("width", [1, 3, 64, 300])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_converges_quickly_with_the_plain_map(self, kind, width, activation):
        layer = EquilibriumLinear(5, width, activation, kind, solver="plain", on_failure="raise")
        layer(torch.randn(16, 5))
        assert layer.solution.converged.all()
        assert layer.solution.iterations.max() <= 30

    @pytest.mark.parametrize(("kind", "width"), [*((k, 1000) for k in KINDS), ("dense", 4096), ("diagonal", 4096)])
    def test_converges_quickly_when_wide(self, kind, width):
        layer = EquilibriumLinear(5, width, weight=kind, solver="plain", on_failure="raise")
        with torch.no_grad():
            layer(torch.randn(2, 5))
        assert layer.solution.iterations.max() <= 20

    @pytest.mark.parametrize("kind", KINDS)
    def test_variance_of_the_equilibrium(self, kind):
        """z must neither vanish nor blow up with the width: for a linear layer its variance is about 1.0 to 1.3."""
        for width in (64, 300):
            z = EquilibriumLinear(50, width, "identity", kind)(torch.randn(200, 50))
            assert 0.7 < z.var() < 1.7

    @pytest.mark.parametrize("kind", KINDS)
    def test_small_widths_stay_inside_the_limit(self, kind):
        """No draw of a width-1 layer may land outside the unit interval, where the plain map would not converge."""
        for _ in range(50):
            assert EquilibriumLinear(2, 1, weight=kind).weight().dense().abs().item() <= 0.46


class TestCall:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_solves_its_equation(self, kind, bias):
        layer = EquilibriumLinear(3, 6, "tanh", kind, bias=bias).double()
        x = torch.randn(2, 5, 3, dtype=torch.float64)
        z = layer(x)
        c = x @ layer.injection.weight.mT + (layer.injection.bias if bias else 0.0)
        assert z.shape == (2, 5, 6)
        torch.testing.assert_close(torch.tanh(z @ layer.weight().dense().mT + c), z, rtol=1e-8, atol=1e-8)
        assert layer.solution.converged.all()
        assert layer.solution.iterations.shape == (2, 5)

    def test_leading_dimensions(self):
        layer = EquilibriumLinear(3, 6)
        x = torch.randn(4, 3)
        z = layer(x)
        assert torch.equal(layer(x[:, None])[:, 0], z)
        torch.testing.assert_close(layer(x[0]), z[0])
        assert layer(x[:0]).shape == (0, 6)

    def test_start(self):
        layer = EquilibriumLinear(3, 6)
        x = torch.randn(4, 3)
        z = layer(x).detach()
        cold = layer.solution.iterations
        layer(x, z0=z)
        assert (layer.solution.iterations < cold).all()

    def test_options_reach_the_solve(self):
        x = torch.randn(4, 3)
        layer = EquilibriumLinear(3, 64, max_iter=2, on_failure="ignore")
        layer(x)
        assert (layer.solution.iterations == 2).all()
        with pytest.warns(deq.ConvergenceWarning):
            EquilibriumLinear(3, 64, max_iter=2)(x)
        with pytest.raises(deq.ConvergenceError):
            EquilibriumLinear(3, 64, max_iter=2, on_failure="raise")(x)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, kind, dtype):
        for layer in (
            EquilibriumLinear(3, 33, weight=kind).to(dtype),
            EquilibriumLinear(3, 33, weight=kind, dtype=dtype),
        ):
            z = layer(torch.randn(4, 3, dtype=dtype))
            assert z.dtype == dtype
            assert layer.solution.converged.all()
            z.sum().backward()
            assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_autocast_solves_in_the_dtype_of_the_weight(self, kind):
        layer = EquilibriumLinear(3, 16, "tanh", kind)
        x = torch.randn(4, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = layer(x)
            c = layer.injection(x)
        assert c.dtype == torch.bfloat16
        assert z.dtype == torch.float32
        assert torch.equal(z, solve(layer.weight(), c.float(), "tanh").z)
        z.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())

    def test_the_solution_holds_no_graph(self):
        layer = EquilibriumLinear(3, 6)
        z = layer(torch.randn(4, 3))
        assert z.requires_grad
        assert not layer.solution.z.requires_grad
        assert torch.equal(layer.solution.z, z)
        assert layer.solution.z.grad_fn is None
        output = weakref.ref(z)
        del z
        assert output() is None


class TestGradient:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("width", [1, 4])
    def test_exact_in_all_parameters_and_the_input(self, kind, width):
        layer = EquilibriumLinear(3, width, "tanh", kind, tol=1e-13).double()
        with torch.no_grad():
            for p in layer.weight.parameters():  # far enough from the start that every guarantee has to act
                p.mul_(1.6)
        names, values = zip(*layer.named_parameters(), strict=True)
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

        def run(x, *values):
            return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *values))

    @pytest.mark.parametrize("kind", KINDS)
    def test_does_not_depend_on_training_mode(self, kind):
        layer = EquilibriumLinear(3, 8, weight=kind)
        x = torch.randn(4, 3)
        gradients = []
        for mode in (True, False):
            layer.train(mode).zero_grad()
            layer(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
        assert all(map(torch.equal, *gradients))

    def test_follows_the_grad_mode(self):
        layer = EquilibriumLinear(3, 8)
        with torch.no_grad():
            assert not layer(torch.randn(4, 3)).requires_grad
        with torch.inference_mode():
            assert layer(torch.randn(4, 3)).is_inference()
        layer.requires_grad_(False)
        assert not layer(torch.randn(4, 3)).requires_grad
        assert layer(torch.randn(4, 3, requires_grad=True)).requires_grad


def train(layer: EquilibriumLinear, steps: int, lr: float) -> list[float]:
    """Fit a smooth function of 4 inputs through a linear read-out; every sample of every solve has to converge."""
    readout = torch.nn.Linear(layer.width, 1)
    optimiser = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr)
    x = torch.randn(64, 4)
    target = torch.sin(2 * x[:, :1]) * x[:, 1:2] + 2 * x[:, 2:3].abs()
    losses = []
    for _ in range(steps):
        loss = (readout(layer(x)) - target).square().mean()
        assert layer.solution.converged.all()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    def test_fits_and_every_solve_converges(self, kind):
        losses = train(EquilibriumLinear(4, 24, weight=kind, on_failure="raise"), steps=100, lr=2e-3)
        assert losses[-1] < 0.4 * losses[0]

    @pytest.mark.parametrize("kind", GUARANTEED)
    def test_guarantee_survives_training(self, kind):
        layer = EquilibriumLinear(4, 24, weight=kind, on_failure="raise")
        start = layer.weight().dense().detach()
        train(layer, steps=60, lr=3e-2)
        W = layer.weight().dense().detach()
        assert (W - start).norm() > 0.5 * start.norm(), "training hardly moved the weight: this would test nothing"
        W = W.double()
        if kind == "contractive":
            assert torch.linalg.matrix_norm(W, 2) <= 0.95
        elif kind == "monotone":
            lowest = torch.linalg.eigvalsh(torch.eye(24, dtype=torch.float64) - (W + W.mT) / 2)[0]
            A, B = layer.weight.A.double(), layer.weight.B.double()
            magnitude = 1 + A.norm() ** 2 + 2 * B.norm()  # an inner product of n terms is off by at most n eps |a|.|b|
            assert lowest >= 0.1 - 28 * torch.finfo(torch.float32).eps * magnitude
        else:
            assert W.diagonal().abs().max() <= torch.tensor(0.95).double() + torch.finfo(torch.float32).eps
            assert torch.equal(W, W.tril() if kind == "lower_triangular" else torch.diag(W.diagonal()))

    def test_the_contraction_bound_counts_the_activation(self):
        for activation in ACTIVATIONS:
            layer = EquilibriumLinear(4, 8, activation, "contractive")
            with torch.no_grad():
                layer.weight.V.mul_(100.0)
            factor = torch.linalg.matrix_norm(layer.weight().dense().double(), 2) * ACTIVATIONS[activation].lipschitz
            assert factor < 1


class TestModule:
    @pytest.mark.parametrize("kind", KINDS)
    def test_state_dict_round_trip(self, kind):
        layer, other = (EquilibriumLinear(3, 8, weight=kind) for _ in range(2))
        x = torch.randn(4, 3)
        z = layer(x)
        assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
        assert not torch.equal(other(x), z)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), z)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_are_independent_and_without_the_solution(self, kind, duplicate):
        layer = EquilibriumLinear(3, 8, weight=kind, tol=1e-6)
        x = torch.randn(4, 3)
        z = layer(x)
        other = duplicate(layer)
        assert other.solution is None
        assert layer.solution is not None
        assert torch.equal(other(x), z)
        assert other.options == {"tol": 1e-6}
        with torch.no_grad():
            other.injection.weight.zero_()
        assert torch.equal(layer(x), z)

    @pytest.mark.parametrize("kind", KINDS)
    def test_reset_parameters(self, kind):
        layer = EquilibriumLinear(3, 8, weight=kind)
        first = [p.detach().clone() for p in layer.parameters()]
        torch.manual_seed(0)
        again = EquilibriumLinear(3, 8, weight=kind)
        assert all(map(torch.equal, first, again.parameters()))
        layer.reset_parameters()
        changed = [not torch.equal(a, b) for a, b in zip(first, layer.parameters(), strict=True)]
        assert changed == [name != "injection.bias" for name, _ in layer.named_parameters()]  # b is zero every time

    def test_every_module_reset_by_itself(self):
        """As programs do after ``to_empty``: torch's own draw of a linear layer is not this one's."""
        layer = EquilibriumLinear(40, 50, device="meta").to_empty(device="cpu")
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert abs(float(layer.injection.weight.detach().std()) * 40**0.5 - 1) < 0.1
        assert not layer.injection.bias.any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_meta_device(self, kind):
        layer = EquilibriumLinear(3, 8, weight=kind, device="meta")
        assert all(p.is_meta for p in layer.parameters())
        layer.to_empty(device="cpu").reset_parameters()
        assert layer(torch.randn(2, 3)).isfinite().all()

    def test_repr(self):
        text = repr(EquilibriumLinear(3, 8, "tanh", "contractive", tol=1e-6, bias=False))
        assert "EquilibriumLinear(\n  in_features=3, width=8, activation='tanh', tol=1e-06\n" in text
        assert "(weight): ContractiveWeight(width=8, bound=0.95)" in text
        assert "bias=False" in text
        assert "mu=0.1" in repr(EquilibriumLinear(3, 8, weight="monotone"))
        assert "rank=4" in repr(EquilibriumLinear(3, 8, weight=deq.nn.DiagonalLowRankWeight(8, rank=4)))

    def test_own_weight_module(self):
        weight = deq.nn.DiagonalLowRankWeight(8, rank=2)
        layer = EquilibriumLinear(3, 8, weight=weight, dtype=torch.float64)
        assert layer.weight is weight
        assert weight.P.shape == (8, 2)
        assert layer(torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"max_iters": 9},
                TypeError,
                r"no option max_iters=9; did you mean 'max_iter'\? allowed are tol, ",
            ),
            ({"z0": torch.zeros(8)}, TypeError, "no option z0=tensor"),
            ({"f_tol": 1e-3, "b_tol": 1e-3}, TypeError, "no option f_tol=0.001"),
            ({"solver": "x"}, ValueError, "solver must be one of 'auto', .*; got 'x'"),
            ({"backend": 3}, TypeError, "backend must be a string; got 3"),
            ({"criterion": "x"}, ValueError, "criterion must be one of 'residual', 'error'; got 'x'"),
            ({"tol": -1}, ValueError, "tol must be positive and finite; got -1"),
            ({"max_iter": 2.5}, TypeError, "max_iter must be an integer; got 2.5"),
            ({"backward": "x"}, ValueError, "backward must be one of 'implicit', .*; got 'x'"),
            ({"on_failure": "x"}, ValueError, "on_failure must be one of 'warn', .*; got 'x'"),
            ({"activation": "gelu", "solver": "cayley"}, ValueError, "needs a nondecreasing activation"),
            ({"activation": "swish"}, ValueError, "activation must be one of .*relu.*; got 'swish'"),
            ({"weight": "sparse"}, ValueError, "weight must be one of 'dense', 'contractive'.*; got 'sparse'"),
            ({"weight": None}, ValueError, "weight must be one of"),
            (
                {"weight": deq.nn.DiagonalWeight(7)},
                ValueError,
                "weight must be of width 8; got a DiagonalWeight of width 7",
            ),
            ({"width": 0}, ValueError, "width must be a positive integer; got 0"),
            ({"width": 8.0}, ValueError, "width must be a positive integer; got 8.0"),
            ({"in_features": 0}, ValueError, "in_features must be a positive integer; got 0"),
        ],
    )
    def test_construction(self, arguments, error, message):
        with pytest.raises(error, match=message):
            EquilibriumLinear(**({"in_features": 3, "width": 8} | arguments))

    @pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "cuda", "reference"])
    def test_construction_asks_nothing_of_the_machine(self, backend):
        EquilibriumLinear(3, 8, backend=backend)

    def test_input_of_another_kind(self):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor; got ndarray"):
            EquilibriumLinear(3, 8)(torch.zeros(4, 3).numpy())

    @pytest.mark.parametrize("shape", [(4, 2), (), (3, 4)])
    def test_input_shape(self, shape):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 3\), in_features last; got"):
            EquilibriumLinear(3, 8)(torch.zeros(shape))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
    def test_input_dtype(self, dtype):
        with pytest.raises(TypeError, match=r"x must have the dtype of the layer, torch\.float32; got torch"):
            EquilibriumLinear(3, 8)(torch.zeros((4, 3), dtype=dtype))

    def test_weight_modules(self):
        with pytest.raises(ValueError, match="rank must be a positive integer; got 0"):
            deq.nn.DiagonalLowRankWeight(8, rank=0)
        with pytest.raises(ValueError, match=r"mu must lie in \(0, 1\]; got 2"):
            deq.nn.MonotoneWeight(8, mu=2.0)
        with pytest.raises(ValueError, match="width must be a positive integer; got -1"):
            deq.nn.DenseWeight(-1)
