"""``python -m monai_deepgmm`` is ``deepgmm``; an interrupt is one from the first moment on."""

import signal
import sys
from types import FrameType
from typing import NoReturn


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run() -> int:
    """Runs the command, and says the same of an interrupt while modules are imported as of one later."""
    try:
        signal.signal(signal.SIGTERM, _stop)
        from monai_deepgmm.cli import main

        return main()
    except KeyboardInterrupt:
        print("deepgmm: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
