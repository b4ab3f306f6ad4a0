"""Weights of a deep equilibrium classifier that was really trained, after some epochs: the spectra that users meet.

Nothing keeps its spectral radius down. To 1e-5 the plain iteration needs 24, 38 and 45 evaluations of a mean sample
after 10, 15 and 20 epochs and 38, 100 and 163 of the slowest; consecutive steps are nearly parallel (cosine 0.9).
"""

from functools import cache

import torch
from torch import Tensor

from deq.solve import solve

WIDTH, FEATURES, CLASSES, SAMPLES, BATCH = 128, 32, 10, 2048, 256
EPOCHS = (10, 15, 20)  # those whose weights are kept
LEARNING_RATE = 2e-3


def draw(epoch: float, m: int, B: int) -> tuple[Tensor, Tensor]:
    """W (128, 128) after an epoch of ``EPOCHS`` and the injections c (B, 128) of the first training samples, float64.
    Raises ValueError for what was not trained."""
    for name, value, allowed in (("epoch", epoch, EPOCHS), ("m", m, (WIDTH,))):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(str, allowed))} with trained weights; got {value:g}")
    if B > SAMPLES:
        raise ValueError(f"B must be at most {SAMPLES} with trained weights; got {B}")
    W, c = _train(max(EPOCHS))[epoch]
    return W, c[:B]


@cache
def _train(epochs: int) -> dict[int, tuple[Tensor, Tensor]]:
    """W and all c after the kept epochs. Solved in float64, plainly and to 1e-8, so that the weights depend on the
    equilibria and not on how an engine rounds: late epochs amplify every difference. Takes some seconds."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(SAMPLES, FEATURES)
    teacher = normal(FEATURES, 64) / FEATURES**0.5, normal(64, CLASSES)
    labels = (torch.sin(2 * x @ teacher[0]) @ teacher[1]).argmax(1)
    W, U = normal(WIDTH, WIDTH) * (0.5 / WIDTH**0.5), normal(WIDTH, FEATURES) / FEATURES**0.5
    b, head = torch.zeros(WIDTH, dtype=torch.float64), normal(CLASSES, WIDTH) / WIDTH**0.5
    parameters = [t.requires_grad_() for t in (W, U, b, head)]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    kept = {}
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(SAMPLES, generator=generator).split(BATCH):
            c = torch.addmm(b, x[rows], U.mT)
            z = solve(W, c, "relu", tol=1e-8, max_iter=5000, solver="plain", on_failure="ignore").z
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(z @ head.mT, labels[rows]).backward()
            optimizer.step()
        if epoch in EPOCHS:
            kept[epoch] = W.detach().clone(), torch.addmm(b, x, U.mT).detach()
    return kept
