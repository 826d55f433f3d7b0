"""What ``torch.save`` wrote, read so that nothing in it runs and no damage goes unnoticed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read(path: Path) -> Any:
    """What ``torch.save`` wrote; nothing in it is executed, and a bit that has flipped since is noticed.

    Raises:
        Exception: of many kinds, for a file that is damaged or was written by something else.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
        if sum(part.file_size for part in archive.infolist()) > size:
            raise ValueError("it is compressed, which torch does not do")
        if (part := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {part} does not agree")
    found = torch.load(path, map_location="cpu", weights_only=True)
    # A tensor of no stride is as large as it says it is without being there.
    held = sum(value.nbytes for value in found.values() if isinstance(value, Tensor)) if isinstance(found, dict) else 0
    if held > size:
        raise ValueError(f"its tensors would have {held} bytes, but the file has {size}")
    return found


def reason(error: BaseException) -> str:
    """An error's first line, or its kind where it has none to say."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    # PyTorch goes on with how to run what such a file holds.
    return "it holds more than plain values" if line.startswith("Weights only load failed") else line
