"""torchdeq 0.1.0's names, call shapes and return values on deq's solvers: change the import, keep the program.

``README.md`` beside this file lists every feature with its name in deq, what differs from torchdeq and why.
"""

from .arguments import add_deq_args
from .core import DEQIndexing, DEQSliced, get_deq, register_deq, reset_deq
from .dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
    reset_dropout,
)
from .loss import fp_correction, jac_reg, power_method, register_weight_func
from .norm import apply_norm, register_norm, register_norm_module, remove_norm, reset_norm
from .solver import get_solver, register_solver, solver_stat_from_final_step
from .utils import mem_gc, mixed_init

__all__ = [
    "DEQIndexing",
    "DEQSliced",
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "add_deq_args",
    "apply_norm",
    "fp_correction",
    "get_deq",
    "get_solver",
    "jac_reg",
    "mem_gc",
    "mixed_init",
    "power_method",
    "register_deq",
    "register_norm",
    "register_norm_module",
    "register_solver",
    "register_weight_func",
    "remove_norm",
    "reset_deq",
    "reset_dropout",
    "reset_norm",
    "solver_stat_from_final_step",
]
