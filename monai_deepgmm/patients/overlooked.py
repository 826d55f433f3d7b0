"""Files beside a patient's images that no name of the layout fits, and that may be what is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from monai_deepgmm.patients.claims import Found
from monai_deepgmm.patients.directory import READABLE
from monai_deepgmm.patients.layout import Layout
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import shown

#: What stands in the names of masks.
LIKE_A_MASK = re.compile(r"(?i)mask|roi|seg|label|contour|kontur|outline|epi|endo|myo|lv|manual|annot")
_SHOWN = 3  # names in a message


def find(found: Found, layout: Layout | None, protocol: Protocol) -> dict[str, str]:
    """What to say of such files, and how to have them used.

    Args:
        found: the patient's files.
        layout: by which they were found; None for a table, which overlooks nothing.
        protocol: whose sequences are looked for.

    Returns:
        "mask", or a sequence that is missing → what to do if one of the files is that.
    """
    if layout is None:
        return {}
    names = [name.rpartition("/")[2] for name in found.unused]
    masks = [name for name in names if LIKE_A_MASK.search(name)]
    said = {"mask": _said(masks, "the mask", next(iter(layout.mask_examples(found.patient)), ""))}
    for sequence in protocol.sequences:
        if not (found.images.get(sequence) or found.foreign.get(sequence) or sequence in found.dicom):
            aliases = layout.names_of(sequence)
            near = [name for name in names if name not in masks and _is_like(name, aliases)]
            said[sequence] = _said(near, sequence, layout.image_example(found.patient, sequence))
    return {what: text for what, text in said.items() if text}


def _said(names: Sequence[str], what: str, called: str) -> str:
    if not names:
        return ""
    way = f"name it {shown(called)}, or " if called else ""
    return f"if {' or '.join(map(shown, names[:_SHOWN]))} is {what}, {way}name it in a table (--manifest)"


def _is_like(name: str, aliases: Sequence[str]) -> bool:
    """Whether a word of a file's name is one of these, or begins with one that is no part of other words."""
    words = re.findall(r"[^\W_]+", READABLE.sub("", name).casefold())
    begins = tuple(alias for alias in aliases if len(alias) > 2 or not alias.isalpha())
    return any(word in aliases or (bool(begins) and word.startswith(begins)) for word in words)
