"""How a user names a network: a word, a class, or a mapping in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_deepgmm import schema
from monai_deepgmm.networks import allowed


def network_definition(
    given: str | Mapping[str, Any] | None, *, trust_code: bool = False
) -> tuple[Mapping[str, Any] | None, bool]:
    """A network as ``registry.build`` takes it, and whether its code is a stranger's.

    Args:
        given: a name, a class's dotted name, a mapping with ``_target_`` (also as text), or a JSON or YAML file of one.
        trust_code: whether it may be.

    Raises:
        UsageError: the file cannot be read, what it holds is no such mapping, or it needs trust.
    """
    found = given if given is None or isinstance(given, Mapping) else _read(given)
    return found, found is not None and allowed.check(found, "--network", trust_code=trust_code)


def _read(given: str) -> Mapping[str, Any]:
    text, name = given, given.strip()
    if name.endswith((".json", ".yaml", ".yml")):
        name = f"--network {name}"
        text = schema.read_text(Path(given.strip()), name)
    elif not name.startswith("{"):
        return {"_target_": name}
    else:
        name = "--network"
    found: dict[str, Any] = schema.check(schema.parse_yaml(text, name), allowed.TABLE)
    return found
