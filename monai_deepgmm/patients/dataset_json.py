"""nnU-Net's ``dataset.json``: which sequence is which channel, which value is which label, how files end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from monai_deepgmm.errors import UsageError


class DatasetJson(NamedTuple):
    """What the file says, as far as it is of use here.

    Attributes:
        channels: number → name, from ``channel_names`` (version 2) or ``modality`` (version 1).
        labels: name → its values, from ``labels``: name → value or list of values (version 2, regions), or value →
            name (version 1); empty: the file says nothing.
        ending: ``file_ending``, such as ``.nii.gz``; empty: the file says nothing.
    """

    channels: Mapping[str, str]
    labels: Mapping[str, tuple[int, ...]]
    ending: str


def read(path: Path) -> DatasetJson:
    """Reads the file.

    Raises:
        UsageError: it is missing, damaged, or its channels or labels are not what nnU-Net writes.
    """
    try:
        content = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        names = content.get("channel_names", content.get("modality"))
        channels = {str(int(key)): str(value) for key, value in names.items()}
        ending = content.get("file_ending")
        labels = content.get("labels")
    except OSError as error:
        remedy = 'write {"channel_names": {"0": "LGE"}} into it'
        raise UsageError(
            f"{path.name}: cannot be read ({error.strerror}), so nothing says what 0000 is: {remedy}"
        ) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f'{path.name}: "channel_names" is missing or wrong; expected {{"0": "LGE"}}') from error
    return DatasetJson(channels, _labels(path, labels), ending if isinstance(ending, str) else "")


def _labels(path: Path, raw: Any) -> dict[str, tuple[int, ...]]:
    """Name → values, from either version."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for key, value in (raw or {}).items():
            if isinstance(value, str) and not _is_whole(value):
                found[value] = (*found.get(value, ()), int(key))
            else:
                found[key] = tuple(int(v) for v in (value if isinstance(value, list) else [value]))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f'{path.name}: "labels" is wrong; expected {{"background": 0, "blood": 1}}') from error
    return found


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdigit()
