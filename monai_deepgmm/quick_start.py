"""All that patients are worked on with, imported in nine tenths of the time: nothing of it is garbage to be looked for.

Where a process begins with this module, as the command does and what workers are forked from.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType

_NAME = "monai_deepgmm.batch"


def _imported() -> ModuleType:
    """``batch``; what it brings with it stays out of the collector's sight."""
    if _NAME in sys.modules or not gc.isenabled():
        return importlib.import_module(_NAME)
    gc.disable()
    try:
        found = importlib.import_module(_NAME)
        gc.freeze()
    finally:
        gc.enable()
    return found


batch = _imported()
