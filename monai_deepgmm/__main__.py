"""``python -m monai_deepgmm`` is ``deepgmm``; where both begin, before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run() -> int:
    """Runs the command that was typed; its exit code, also where it is interrupted before it has begun."""
    # ``python -m`` looks for modules where the user happens to stand, which may be a stranger's folder.
    here = Path(__file__).resolve().parents[1]
    if "--trust-code" not in sys.argv and sys.path and Path(sys.path[0] or os.curdir).resolve() != here:
        # Where this package itself lies stays: worker processes find it by the same list.
        sys.path[:] = [p for p in sys.path if p and (Path(p).resolve() == here or Path(p).resolve() != Path.cwd())]
    try:
        signal.signal(signal.SIGTERM, _stop)
        from monai_deepgmm.cli import main

        return main()
    except KeyboardInterrupt:
        print("deepgmm: interrupted before it had begun; nothing was done", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
