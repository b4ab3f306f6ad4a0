"""The experiments of the paper, one registry: ``deq run NAME``.

Reference: "Separation and Bias of Deep Equilibrium Models on Expressivity and Learning Dynamics", NeurIPS 2024.
"""

from . import (
    audio,
    bias,
    density,
    features,
    flops,
    gotu,
    multiscale,
    norms,
    regions,
    saliency,
    sawtooth,
    spectrum,
    steep,
)
from ._ledger import write_ledger
from ._run import SCHEMA, Experiment, Settings, SettingsError, execute, forget_parts, parts_path

REGISTRY: dict[str, Experiment] = {
    e.name: e
    for e in (
        regions.EXPERIMENT,
        sawtooth.EXPERIMENT,
        steep.EXPERIMENT,
        norms.EXPERIMENT,
        bias.EXPERIMENT,
        density.EXPERIMENT,
        gotu.EXPERIMENT,
        features.EXPERIMENT,
        flops.EXPERIMENT,
        spectrum.EXPERIMENT,
        audio.EXPERIMENT,
        saliency.EXPERIMENT,
        multiscale.EXPERIMENT,
    )
}

__all__ = [
    "REGISTRY",
    "SCHEMA",
    "Experiment",
    "Settings",
    "SettingsError",
    "execute",
    "forget_parts",
    "parts_path",
    "write_ledger",
]
