"""What is compiled, loaded and usable here, and why not if not."""

import platform
import textwrap
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

from . import __version__, _cuda, _library, _triton
from .plan import INCREMENTS

WIDTH = 80
LABEL = 14


@dataclass(frozen=True)
class Info:
    """What :func:`info` found; ``str`` of it is a report of at most 80 columns (paths are never broken).

    library: path of the loaded compiled library, or None; ``why_no_library`` then says why.
    isa: the instruction set that the CPU kernels use here, "" without a library; ``isas_built`` those compiled.
    increments: the low precisions that the CPU kernels can multiply increments in, see :data:`deq.plan.INCREMENTS`.
    threads: threads of torch, which the CPU kernels follow (``torch.set_num_threads``).
    openmp: whether the library was built with OpenMP; without it one thread works.
    cuda_kernels: architectures that CUDA kernels were compiled for; ``why_no_cuda_kernels`` says why there are none.
    gpus: names of the GPUs that torch sees; ``why_no_gpu`` says why there are none.
    backends: for each backend "" if it is usable here, else why it is not.
    """

    deq: str
    torch: str
    triton: str | None
    python: str
    platform: str
    library: str | None
    why_no_library: str
    compiler: str
    isa: str
    isas_built: tuple[str, ...]
    increments: tuple[str, ...]
    threads: int
    openmp: bool
    cuda_kernels: tuple[str, ...]
    why_no_cuda_kernels: str
    gpus: tuple[str, ...]
    why_no_gpu: str
    backends: dict[str, str]

    def as_dict(self) -> dict:
        """The same as plain Python values, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        rows = [
            ("deq", self.deq),
            ("torch", self.torch),
            ("triton", self.triton or "not installed"),
            ("python", f"{self.python}, {self.platform}"),
        ]
        if self.library:
            team = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
            rows += [
                ("library", self.library),
                ("", f"{self.compiler}; {', '.join(self.isas_built)}; {'with' if self.openmp else 'without'} OpenMP"),
                ("CPU", f"{self.isa}, {team if self.openmp else 'one thread (the library has no OpenMP)'}"),
                ("", f"increments in {', '.join(self.increments) or 'float32 only'}"),
            ]
        else:
            cost = "Solves give the same answers through plain PyTorch, several times slower."
            rows += [("library", f"none: {self.why_no_library}. {cost}")]
        rows += [
            ("CUDA kernels", ", ".join(self.cuda_kernels) or f"none: {self.why_no_cuda_kernels}"),
            ("GPU", ", ".join(self.gpus) or f"none: {self.why_no_gpu}"),
        ]
        rows += [
            ("" if i else "backends", f"{name}: {f'no, {why}' if why else 'usable'}")
            for i, (name, why) in enumerate(self.backends.items())
        ]
        return "\n".join(_row(label, text) for label, text in rows)


def _row(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=label.ljust(LABEL),
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def info() -> Info:
    """Versions, the compiled library, CPU and GPU, and which backends are usable here; ``print(deq.info())``."""
    library, build = _library.compiled, _library.build
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    gpus, why_no_gpu = _gpus()
    return Info(
        deq=__version__,
        torch=torch.__version__,
        triton=triton,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        library=str(_library.path) if library else None,
        why_no_library="" if library else _library.reason,
        compiler=build.get("compiler", ""),
        isa=library.deq_cpu_isa().decode() if library else "",
        isas_built=tuple(build.get("isas", ())),
        increments=tuple(n for n, i in INCREMENTS.items() if i and library and library.deq_cpu_has_precision(i)),
        threads=torch.get_num_threads(),
        openmp=build.get("openmp", False),
        cuda_kernels=tuple(build.get("cuda", ())),
        why_no_cuda_kernels=build.get("why_not_cuda", _library.reason),
        gpus=gpus,
        why_no_gpu=why_no_gpu,
        backends=_backends(),
    )


def _gpus() -> tuple[tuple[str, ...], str]:
    if torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), ""
    built_for = torch.version.cuda or torch.version.hip
    return (), "torch sees no device" if built_for else "this torch is a CPU build"


def _backends() -> dict[str, str]:
    backends = {}
    for name in ("cpu", "triton", "cuda", "reference"):
        if name == "cuda":
            backends[name] = _cuda.why_not("cuda")
        elif name == "triton":
            backends[name] = _triton.why_not("cuda" if torch.cuda.is_available() else "cpu")
        elif name == "cpu" and _library.compiled is None:
            backends[name] = "it is the compiled library"
        else:
            backends[name] = ""
    return backends
