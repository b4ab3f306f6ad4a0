"""Fixed points of any function of a matrix (B, D), every row a sample: plain, Anderson, Broyden, Newton-Krylov."""

from .compiled_steps import norm
from .loop import run
from .result import Result, Told
from .rule import CRITERIA, METHODS, Rule

__all__ = ["CRITERIA", "METHODS", "Result", "Rule", "Told", "norm", "run"]
