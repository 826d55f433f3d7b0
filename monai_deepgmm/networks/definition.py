"""How a user names a network: a word, a class, or a mapping in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from monai_deepgmm.errors import UsageError


def network_definition(given: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A network as ``registry.build`` takes it.

    Args:
        given: a name, a class's dotted name, a mapping with ``_target_`` (also as text), or a JSON or YAML file of one.

    Raises:
        UsageError: the file cannot be read, or what it holds is no such mapping.
    """
    if given is None or isinstance(given, Mapping):
        return given
    text, name = given, given.strip()
    if name.endswith((".json", ".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--network {name}: cannot be read ({getattr(error, 'strerror', error)})") from error
    elif not name.startswith("{"):
        return {"_target_": name}
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--network: not YAML or JSON ({error})") from error
    if not (isinstance(found, dict) and isinstance(found.get("_target_"), str)):
        raise UsageError(f"--network: expected a mapping with _target_, got {str(found)[:80]}")
    return found
