"""The benchmark of a classifier of digits: both models are one, and what is measured is told."""

import re

import pytest
import torch
from click.testing import CliRunner
from rendered import render

from deq import _library
from deq.bench import digits, report
from deq.bench.cli import bench

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return digits.load()


class TestDigits:
    def test_data(self, data):
        (x, y), (x_test, y_test) = data.train, data.test
        assert (len(x), len(x_test)) == (1437, 360)
        assert x.mean().item() == pytest.approx(0, abs=1e-5)
        assert x.std().item() == pytest.approx(1, abs=1e-5)
        assert set(y.tolist()) == set(y_test.tolist()) == set(range(10))

    @pytest.mark.parametrize("solver", digits.SOLVERS)
    def test_both_models_are_one(self, data, solver):
        pytest.importorskip("torchdeq")
        models = []
        for make in (digits.Model, lambda: digits.TorchdeqModel(solver)):
            torch.manual_seed(0)
            models.append(make())
        x, y = (t[:50] for t in data.train)
        gradients = []
        for model in models:
            logits, iterations, failed = model(x)
            torch.nn.functional.cross_entropy(logits, y).backward()
            gradients.append(model.layer.weight.W.grad)
            assert failed.shape == (50,) and not failed.any()
            assert 5 < float(iterations.double().mean()) < 50
        assert torch.linalg.vector_norm(gradients[0] - gradients[1]) < 1e-3 * torch.linalg.vector_norm(gradients[0])

    def test_measure(self, data, monkeypatch):
        monkeypatch.setattr(digits, "has_torchdeq", lambda: False)
        seen = []
        (row,) = digits.measure(epochs=2, threads=1, progress=seen.append)
        assert seen == [1, 2]
        assert row["ratio"] == 1.0
        assert row["accuracy"] == row["accuracies"][-1] > 0.8
        assert row["reached"] == (row["failed"] == row["warnings"] == 0)
        text = render(report.digits([row]))
        assert "…" not in text and re.search(rf"deq +{row['seconds']:.1f} +1.0 +{100 * row['accuracy']:.1f}%", text)

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setattr(digits, "has_sklearn", lambda: False)
        monkeypatch.setattr(_library, "compiled", object())
        result = CliRunner().invoke(bench, ["digits"])
        assert result.exit_code == 1
        assert "pip install scikit-learn" in result.output
