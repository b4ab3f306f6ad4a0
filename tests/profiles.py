"""Profiles of small problems against fixed ceilings."""

import torch
from problems import gaussian

import deq
from deq.profiling import Ceilings

CEILINGS = Ceilings(  # fixed ones: measuring them takes two seconds
    "cpu",
    1,
    {"float32": 1e11, "float64": 5e10, "bfloat16": 2e11, "float16": 2e11, "int8": 4e11},
    {},
    {"cache": 2e11, "memory": 3e10},
    {"cache": 1 << 20, "memory": 1 << 28},
)


def leaves(m, B, dtype=torch.float32, **options):
    W, c, _ = gaussian(m, B, dtype, **options)
    return W.requires_grad_(), c.requires_grad_()


def profile(*arguments, **options):
    return deq.profile(*arguments, seconds=0.01, against=CEILINGS, **options)
