"""What the Triton backend is asked to solve, apart from tensors, and how a GPU's plan says to do it."""

from functools import lru_cache
from typing import NamedTuple

import torch

from deq.kernels import judge, records

from ..activations import Activation
from ..gpu_device import Device, device_at, find_device
from ..gpu_plan import TRITON_INCREMENTS, GpuPlan, choose
from ..plan import INCREMENTS_TOL, Plan

PRECISION = "tf32x3"  # three products on tensor cores: as exact as float32 multiplied by itself


class Kind(NamedTuple):
    """What is solved, apart from tensors."""

    masked: bool
    reflects: bool
    activation: Activation
    plan: Plan

    @property
    def ending(self) -> str:
        names = (("value", "reflected"), ("adjoint", "reflected adjoint"))
        return names[self.masked][self.reflects]

    @property
    def homogeneous(self) -> bool:
        return self.masked or self.activation.homogeneous

    @property
    def accelerates(self) -> bool:
        return self.plan.acceleration != "none" and self.plan.depth > 1  # of one residual there is nothing to mix

    @property
    def acceleration(self) -> str:
        return self.plan.acceleration if self.accelerates else "none"

    @property
    def constants(self) -> dict[str, int]:
        """What every kernel of a solve is compiled for."""
        return {
            "ENDING": records.ENDINGS[self.ending],
            "ACTIVATION": self.activation.number,
            "HOMOGENEOUS": self.homogeneous,
            "ACCELERATION": records.ACCELERATIONS[self.acceleration],
            "CRITERION": judge.CRITERIA[self.plan.criterion],
        }

    @property
    def depth(self) -> int:
        return self.plan.depth if self.accelerates else 1

    @property
    def increments(self) -> tuple[str, ...]:
        """Those that the device's plan may choose among. The plain solver follows its path in full precision;
        increments leave a tight tolerance nothing to do but wait for anchors, and samples that are all accelerated need
        an anchor at every turn."""
        if self.plan.increments != "native":
            return (self.plan.increments,)
        rounds = self.plan.tol >= INCREMENTS_TOL and self.plan.acceleration == "on_demand"
        return TRITON_INCREMENTS if rounds else ("native",)

    def gpu_plan(self, B: int, m: int, device: torch.device) -> GpuPlan:
        """Regime, tiles and increments for B samples of width m. Raises ValueError where the plan's increments are not
        to be had on this device."""
        return choose(
            m, B, dtype="float32", device=constants_of(device), increments=self.increments, precision=PRECISION
        )


@lru_cache(maxsize=16)
def constants_of(device: torch.device) -> Device:
    """What plans for tensors on a device are made from."""
    if device.type == "cuda":
        return device_at(device)
    return find_device("H200")  # what is interpreted is what would run there
