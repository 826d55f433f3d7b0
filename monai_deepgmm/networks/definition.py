"""How a user names a network: a word, a class, or a mapping in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_deepgmm import schema

#: What any network's definition is; whose class it may name, and with which arguments, ``allowed`` knows.
_MAPPING: Mapping[str, Any] = {
    "type": "object",
    "expected": "a mapping with _target_",
    "required": ["_target_"],
    "properties": {"_target_": {"type": "string", "maxLength": 200}},
    "propertyNames": {"pattern": "^[A-Za-z_]", "expected": "the name of an argument"},
}


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
        name = f"--network {name}"
        text = schema.read_text(Path(given.strip()), name)
    elif not name.startswith("{"):
        return {"_target_": name}
    else:
        name = "--network"
    found: dict[str, Any] = schema.check(schema.parse_yaml(text, name), _MAPPING)
    return found
