"""Fixed points of a cell ``tanh(z W^T + c)``, for tests."""

import torch

import deq

SOLVERS = ("plain", "anderson", "broyden", "newton_krylov", "auto")


def cell(W, c):
    return lambda z: torch.tanh(z @ W.mT + c)


def solve(W, c, **options):
    return deq.fixed_point(cell(W, c), torch.zeros_like(c), **options)
