"""``--config FILE`` and ``--save-config FILE``: a command's options in a YAML file, by the names that are typed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from monai_deepgmm import schema

#: Options that say nothing of what is to be done.
NOT_KEPT = ("help", "config", "save-config", "help-method", "verbose", "quiet")
_WORD: Mapping[str, Any] = {"type": ["string", "number", "null"], "expected": "a word or a number"}


def words(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """What would have to be typed instead of a file.

    Args:
        parser: of the command.
        path: the file; its keys are the options' names, with ``-`` or ``_``.

    Raises:
        UsageError: it cannot be read, or holds what the command has no option for.
    """
    name, actions = f"--config {path}", dict(_kept(parser))
    read = schema.parse_yaml(schema.read_text(path, name), name)
    content = read.content
    if isinstance(content, dict):
        content = {_dashed(key): value for key, value in content.items()}
        # In YAML, off is a word for false.
        offs = [key for key, action in actions.items() if "off" in (action.choices or ())]
        content |= {key: "off" for key in offs if content.get(key) is False}
    lines = {tuple(map(_dashed, way[:1])) + way[1:]: line for way, line in read.lines.items()}
    rules = {"type": "object", "additionalProperties": False, "properties": {k: _rule(a) for k, a in actions.items()}}
    checked: dict[str, Any] = schema.check(schema.Document(content, lines, name), rules)
    # Options that take every word after them first, so that none takes what is typed.
    several = sorted(checked.items(), key=lambda item: not isinstance(item[1], list | dict))
    return [word for key, value in several for word in _typed(key, value)]


def save(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What ``words`` reads, of the options that were given or are not at their defaults."""
    found = {}
    for key, action in _kept(parser):
        value = getattr(arguments, action.dest)
        if value != action.default and value not in (None, [], ()):
            found[key] = _plain(value)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _kept(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        name = next((o.removeprefix("--") for o in action.option_strings if o.startswith("--")), None)
        if name is not None and name not in NOT_KEPT:
            yield name, action


def _rule(action: argparse.Action) -> Mapping[str, Any]:
    """What an option takes."""
    if action.nargs == 0:
        return {"type": "boolean"}
    if action.choices is not None:
        return {"enum": [*action.choices, None]}
    if action.nargs != "+":
        return _WORD
    several = {"type": "array", "items": _WORD, "expected": "a list of words or numbers"}
    plain = {"type": ["string", "number", "boolean", "null"]}
    settings = {"type": "object", "additionalProperties": plain, "expected": "names with values"}
    return {"anyOf": [several, settings] if action.dest == "set" else [several, _WORD]}


def _typed(key: str, value: Any) -> list[str]:
    if value is None or value is False or value in ([], {}):
        return []
    if value is True:
        return [f"--{key}"]
    if isinstance(value, dict):
        text = {True: "true", False: "false", None: "null"}
        plain = {k: text[v] if v is None or isinstance(v, bool) else str(v) for k, v in value.items()}
        return [f"--{key}", *(f"{k}={v}" for k, v in plain.items())]
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]


def _dashed(key: object) -> str:
    return str(key).replace("_", "-")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
