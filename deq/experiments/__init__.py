"""The experiments of the paper, one registry: ``deq run NAME``.

Reference: "Separation and Bias of Deep Equilibrium Models on Expressivity and Learning Dynamics", NeurIPS 2024.
"""

from . import regions, steep
from ._run import Experiment, Settings, SettingsError, execute, parts_path

REGISTRY: dict[str, Experiment] = {e.name: e for e in (steep.EXPERIMENT, regions.EXPERIMENT)}

__all__ = ["REGISTRY", "Experiment", "Settings", "SettingsError", "execute", "parts_path"]
