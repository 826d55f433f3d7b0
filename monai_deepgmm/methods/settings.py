"""``--set``: from ``key=value`` to the fields of a dataclass, and the checks and the help that its fields share.

A configuration may hold others (a training holds its teacher's). Their fields can be set too, by ``outer.inner``, or by
the inner name alone where no outer field bears it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError

#: Names that ``--set`` still understands, and what they are called now.
FORMER_NAMES = {"labels": "label_rule"}
#: What ``--set`` takes after the equals sign.
_PLAIN: dict[str, Any] = {"type": ["number", "string", "boolean", "null"], "maximum": 1e300, "minimum": -1e300}
_VALUE = {
    "anyOf": [
        {**_PLAIN, "expected": "a number, a word, true, false, null"},
        {"type": "array", "maxItems": 32, "items": _PLAIN, "expected": "a list of those"},
    ]
}
#: Marks a field that is set by an option of its own, never by ``--set``.
NOT_SET = {"set": False}


def parsed(settings: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """``key=value`` strings (or a mapping) as values by name.

    Raises:
        UsageError: a string without ``=``, or with a value that no setting has.
    """
    if not isinstance(settings, Mapping):
        pairs = [setting.partition("=") for setting in schema.several(settings or ())]
        if broken := [key for key, equals, _ in pairs if not equals]:
            raise UsageError(f"--set {broken[0]}: expected key=value")
        settings = {key.strip(): _value(key.strip(), value) for key, _, value in pairs}
    return {FORMER_NAMES.get(key, key): value for key, value in settings.items()}


def keys(config: Any) -> dict[str, tuple[str, ...]]:
    """What ``--set`` reaches in a configuration: name → the way to the field.

    Args:
        config: a dataclass, or an instance of one; of a class, the fields of nested configurations are not known.
    """
    ways: dict[str, tuple[str, ...]] = {}
    nested: list[tuple[str, Any]] = []
    for field in dataclasses.fields(config):
        value = None if isinstance(config, type) else getattr(config, field.name)
        if field.metadata.get("set", True) and not dataclasses.is_dataclass(value):
            ways[field.name] = (field.name,)
        elif dataclasses.is_dataclass(value) and field.metadata.get("set", True):
            nested.append((field.name, value))
    for outer, value in nested:
        for name, way in keys(value).items():
            ways.setdefault(name, (outer, *way))
            ways[f"{outer}.{name}"] = (outer, *way)
    return ways


def changed(config: Any, values: Mapping[str, Any], what: str) -> Any:
    """A configuration with some of its fields replaced.

    Args:
        config: an instance of a dataclass.
        values: from ``parsed``.
        what: whose settings these are, for the message.

    Raises:
        UsageError: a key that it does not have, or a value that it cannot have.
    """
    known = keys(config)
    check_keys(values, known, what)
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        first, *rest = known[key]
        if rest:
            inner.setdefault(first, {})[".".join(rest)] = value
        else:
            own[first] = value
    own |= {name: changed(getattr(config, name), given, what) for name, given in inner.items()}
    return dataclasses.replace(config, **own) if own else config


def help_lines(config: Any) -> Iterator[str]:
    """A line for each setting: name, default, and what its class's docstring says of it, units included."""
    documented = _documented(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value) and field.metadata.get("set", True):
            yield f"  {field.name} = {_shown(value)}\n      {documented.get(field.name, '')}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and field.metadata.get("set", True):
            if hasattr(value, "name"):  # one of several kinds
                yield f"  {field.name} = {value.name}\n      {documented.get(field.name, '')}"
            yield from (line.replace("  ", f"  {field.name}.", 1) for line in help_lines(value))


def _documented(kind: type) -> dict[str, str]:
    """What the sections ``Attributes`` of a class's docstring, and of those it builds on, say of its fields."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, flags=re.MULTILINE)
        found |= {name: " ".join(text.split()) for name, text in entries}
    return found


def _shown(value: Any) -> str:
    """A value as it could be typed."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


# Checks ----------------------------------------------------------------------------------------------------------


def check_keys(values: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuses settings that are not among the known ones.

    Raises:
        UsageError: naming the nearest, and listing all.
    """
    names = list(known)
    for key in values:
        if key not in names:
            listed = ", ".join(name for name in names if "." not in name) or "none"
            raise UsageError(f"--set {key}: no such setting of {what}{schema.nearest(key, names)}; it has {listed}")


def check_numbers(settings: object, limits: Mapping[str, tuple[type, float]]) -> None:
    """Refuses settings that are no finite numbers of their kind, or below their limit; None passes where it may stand.

    Raises:
        UsageError: naming the setting.
    """
    optional = {f.name for f in dataclasses.fields(settings) if "None" in str(f.type)}  # type: ignore[arg-type]
    for name, (kind, low) in limits.items():
        value: Any = getattr(settings, name)
        if value is None and name in optional:
            continue
        number = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
        if not number or not low <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise UsageError(f"{name}: got {value!r}, expected {what} of at least {low}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuses what is not among the choices.

    Raises:
        UsageError: naming the nearest, and listing all.
    """
    if value not in choices or (isinstance(value, int) and not isinstance(value, bool)):
        listed = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices if c is not None)
        near = schema.nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
        raise UsageError(f"{name}: {value!r} is unknown{near}; choose one of {listed}")


def _value(key: str, text: str) -> Any:
    """A value as YAML has it; what is no YAML is text.

    Raises:
        UsageError: it is no number, word or list of those.
    """
    label = f"--set {key}"
    try:
        document = schema.parse_yaml(text, label)
    except UsageError:
        return text
    with contextlib.suppress(ValueError):  # whether a setting can be infinite, it knows itself
        if isinstance(document.content, str | float):
            return float(document.content)
    return schema.check(document, _VALUE)
