"""Deep equilibrium models in PyTorch: solve ``z = act(W z + c)`` fast and train through it exactly."""

from pathlib import Path

__version__ = "0.1.0"

# kernels/ and bench/ stand beside deq/ in the sources and are installed inside it; this finds them in a checkout, bare
# or installed as editable.
if not any((Path(folder) / "kernels").is_dir() for folder in __path__):
    __path__.append(str(Path(__file__).resolve().parents[1]))

from . import nn, weights
from .fixed_point import fixed_point
from .info import info
from .profiling import profile
from .solution import ConvergenceError, ConvergenceWarning, Solution, Status
from .solve import solve

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "Solution",
    "Status",
    "fixed_point",
    "info",
    "nn",
    "profile",
    "solve",
    "weights",
]
