"""How a kernel is compiled without a device: what a launch would tell the compiler, as plain data.

Every kernel file lists what it can launch as ``compilations()``; bench/resources.py compiles them for each architecture
and guards what comes out.
"""

from dataclasses import dataclass

from .tiles import OLDEST

# Types of what judge.rule gives a kernel.
RULE_TYPES = dict.fromkeys(("tol", "leave"), "fp32") | dict.fromkeys(("max_iter", "patience"), "i32")


@dataclass(frozen=True)
class Compilation:
    """One variant of one kernel.

    name: unique; the kernel, a comma, and what differs, in words.
    group: the name without what hardly changes the code around the product, such as the activation.
    function: "module:function" in deq.kernels.
    types: of every argument that is no compile-time constant, such as "*fp32", "i32" or "fp32".
    constants: the other arguments.
    aligned: arguments that are multiples of 16 at run time, which the compiler is told.
    registers: the most that a thread may have, where the launch says so.
    chosen: whether a plan can choose it by itself.
    oldest: the compute capability from which on it can be compiled.
    """

    name: str
    group: str
    function: str
    types: dict[str, str]
    constants: dict[str, int | str | None]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    registers: int | None = None
    chosen: bool = True
    oldest: tuple[int, int] = OLDEST

    def runs_on(self, architecture: str) -> bool:
        """architecture: such as "sm_90"."""
        number = int(architecture.removeprefix("sm_"))
        return (number // 10, number % 10) >= tuple(self.oldest)
