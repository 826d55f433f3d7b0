"""``python -m monai_deepgmm`` is ``deepgmm``."""

import sys

from monai_deepgmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
