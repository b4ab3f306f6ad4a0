"""The options of torchdeq: one table for argparse, for get_deq and for apply_norm."""

import argparse
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SOLVERS = ("fixed_point_iter", "anderson", "broyden", "newton_krylov", "simple_fixed_point_iter")


@dataclass(frozen=True)
class Option:
    """One command line option: its default, what parses it (None: a flag; ``many``: a list), and its help."""

    default: object
    parse: type | None
    help: str
    many: bool = False


OPTIONS = {
    "f_solver": Option("fixed_point_iter", str, f"forward solver: {', '.join(SOLVERS)}, or one that was registered"),
    "b_solver": Option("fixed_point_iter", str, "backward solver, of the same"),
    "f_max_iter": Option(40, int, "evaluations of f in a forward solve"),
    "b_max_iter": Option(40, int, "vector-Jacobian products in a backward solve"),
    "f_tol": Option(1e-3, float, "forward tolerance"),
    "b_tol": Option(1e-6, float, "backward tolerance, relative to the incoming gradient"),
    "f_stop_mode": Option("abs", str, "abs or rel: what f_tol bounds"),
    "b_stop_mode": Option("abs", str, "abs or rel; both are relative to the incoming gradient"),
    "eval_factor": Option(1.0, float, "factor of f_max_iter in evaluation"),
    "eval_f_max_iter": Option(0, int, "f_max_iter in evaluation, before eval_factor"),
    "norm_type": Option("weight_norm", str, "none, weight_norm or spectral_norm"),
    "norm_no_scale": Option(False, None, "no learnable norm"),
    "norm_clip": Option(False, None, "bound the factor of a weight by norm_clip_value"),
    "norm_clip_value": Option(1.0, float, "the bound of norm_clip"),
    "norm_target_norm": Option(1.0, float, "the norm where it is not learned"),
    "sn_n_power_iters": Option(1, int, "power iterations of the spectral norm in every training step"),
    "core": Option("sliced", str, "sliced: states continue from the gradient steps of the last; indexing: they do not"),
    "ift": Option(False, None, "exact gradients by implicit differentiation"),
    "hook_ift": Option(False, None, "the same as ift"),
    "n_states": Option(1, int, "states of the trajectory that carry gradients, evenly spaced"),
    "indexing": Option([], int, "evaluations after which a state carries gradients", many=True),
    "gamma": Option(0.8, float, "decay of the fixed-point correction's weights"),
    "grad": Option([1], int, "steps of the phantom gradient, for each state or for all", many=True),
    "tau": Option(1.0, float, "damping of the phantom gradient's steps"),
    "sup_gap": Option(-1, int, "return every sup_gap-th of the phantom steps"),
    "sup_loc": Option([], int, "phantom steps to return", many=True),
    "jac_loss_weight": Option(0.0, float, "weight of the Jacobian regulariser, for the program to use"),
    "jac_loss_freq": Option(0.0, float, "how often it is applied, for the program to use"),
    "jac_incremental": Option(0, int, "steps after which its weight grows, for the program to use"),
    "sradius_mode": Option(False, None, "estimate the spectral radius in evaluation, for the program to pass on"),
}


def add_deq_args(parser: argparse.ArgumentParser) -> None:
    """Add torchdeq's command line options to ``parser``, same names, types and defaults."""
    for name, option in OPTIONS.items():
        if option.parse is None:
            parser.add_argument(f"--{name}", action="store_true", help=option.help)
        else:
            many = {"nargs": "+"} if option.many else {}
            parser.add_argument(f"--{name}", type=option.parse, default=option.default, help=option.help, **many)


def gather(where: str, args: object, given: Mapping[str, object], own: Iterable[str] | None = ()) -> dict[str, object]:
    """Options out of a Namespace, dict or None and out of keywords, which win. Nobody's memory is shared.

    A Namespace may hold a program's other options. Raises TypeError for an unknown name in a dict or a keyword: one
    neither in OPTIONS nor in ``own``. With None for ``own`` there are no unknown ones, and all are returned.
    """
    known = None if own is None else (*OPTIONS, *own)
    if args is None:
        config: dict[str, object] = {}
    elif isinstance(args, Mapping):
        config = dict(args)
    elif hasattr(args, "__dict__"):
        config = {name: value for name, value in vars(args).items() if known is None or name in OPTIONS}
    else:
        raise TypeError(f"{where}: args must be a Namespace, a dict or None; got {type(args).__name__}")
    config |= given
    for name, value in config.items():
        if known is not None and name not in known:
            refuse(where, name, value, known)
    return config


def refuse(where: str, name: str, value: object, known: Iterable[str]) -> None:
    """Raise TypeError for an option that does not exist."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    close += [option for option in known if option.endswith(f"_{name}") and option not in close]
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise TypeError(f"{where} has no option {name}={value!r}; {hint}allowed are {', '.join(known)}")
