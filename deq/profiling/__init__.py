"""FLOPs, bytes, iterations, memory and ranges of what the engine does. ``deq.profile`` is the front door."""

from .account import profile
from .ceilings import Ceilings, ceilings
from .flops import register as _register
from .ranges import phase, record
from .report import Report
from .timeline import timeline

_register()

__all__ = ["Ceilings", "Report", "ceilings", "phase", "profile", "record", "timeline"]
