"""Which networks are made without further trust: this package's and MONAI's, of plain arguments that load nothing.

A network's class is found by importing its module, which runs it, and some classes fetch weights from elsewhere. So a
definition, which may come from a stranger's folder, is looked at before anything is imported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError

logger = logging.getLogger(__name__)

#: Words for ``--network``; ``registry.NAMED`` says what they stand for.
WORDS = (
    *("unet", "quickunet", "foldedunet", "basicunet", "dynunet", "segresnet", "modifiedunet", "basicunetplusplus"),
    *("attentionunet", "unetr", "swinunetr"),
)
OURS = ("UNet", "FoldedUNet", "ModifiedUNet")
#: MONAI's networks that give a class for each voxel; how their names are written in capitals varies there.
MONAI = (
    *("AHNet", "AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DynUNet", "FlexibleUNet", "FlexUNet", "HighResNet"),
    *("MedNeXt", "SegResNet", "SegResNetDS", "SegResNetDS2", "SwinUNETR", "UNet", "UNETR", "VNet"),
)
#: What any definition is: plain data.
TABLE = {"$ref": "#/$defs/network", "$defs": schema.table("model")["$defs"]}
#: Arguments by which a network loads something, from the disk or from elsewhere.
_LOADS = re.compile(r"pretrain|url|weights|progress|repo|file|checkpoint|ckpt|load|cache|path$|dir$", re.IGNORECASE)


def check(definition: Mapping[str, Any], option: str, *, trust_code: bool = False) -> bool:
    """Refuses a definition that could run or fetch something, unless that is trusted.

    Args:
        definition: a mapping with ``_target_``.
        option: what it was given with, for the message.
        trust_code: whether a class or an argument beyond the lists is let through.

    Returns:
        Whether it needed that trust.

    Raises:
        UsageError: it is no plain data, or it needs trust.
    """
    schema.check(schema.Document(dict(definition), {}, option), TABLE)
    reason = _beyond(definition)
    if reason is not None and not trust_code:
        known = ", ".join(WORDS)
        raise UsageError(
            f"{option}: {reason}; name one of {known}, or a network of monai.networks.nets, or add --trust-code if you "
            "trust whoever wrote it: it runs their code"
        )
    if reason is not None:
        logger.warning("--trust-code: %s; its code is run", reason)
    return reason is not None


def _beyond(definition: Mapping[str, Any]) -> str | None:
    """What a definition asks for beyond the lists."""
    target = str(definition["_target_"])
    place, _, name = target.rpartition(".")
    if place:
        ours = re.fullmatch(r"monai_deepgmm\.networks(\.\w+)?", place) and name in OURS
        theirs = re.fullmatch(r"monai\.networks\.nets(\.\w+)?", place)
        known = ours or (theirs and name.casefold() in {each.casefold() for each in MONAI})
    else:
        known = name.casefold() in WORDS
    if not known:
        return f"{target!r} is no network that this software knows{schema.nearest(name, (*WORDS, *MONAI))}"
    loads = [key for key in definition if key != "_target_" and _LOADS.search(key)]
    return f"{loads[0]} of {target} may load something" if loads else None
