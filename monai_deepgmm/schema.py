"""Text files at the door: read within limits, and held against a table before anything else looks at them.

The tables are JSON Schemas (``schemas/*.json``), of which the keywords below are understood. What a file has too much,
too little or wrong is refused with its place: the file, the line where there is one, and the way to the key.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from monai_deepgmm.errors import UsageError

#: The largest text that is read; a protocol has 4 kB, and YAML is read at 0.2 MB/s.
MAX_BYTES = 1 << 17
#: How deep lists and mappings may be nested.
MAX_DEPTH = 12
#: The largest number where a table names none.
MAX_NUMBER = 1e9

Way = tuple[str, ...]


class Document(NamedTuple):
    """What a text says.

    Attributes:
        content: numbers, text, lists and mappings.
        lines: the way to a value → its line, counted from 1.
        name: of the file, as messages call it.
    """

    content: Any
    lines: Mapping[Way, int]
    name: str


# Reading -------------------------------------------------------------------------------------------------------------


def read_text(path: Path, name: str, *, limit: int = MAX_BYTES) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark.

    Raises:
        UsageError: there is no such file, it cannot be read, is too large, or is no text.
    """
    if not path.is_file():
        raise UsageError(f"{name}: there is no file {path}")
    try:
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from error
    return decoded(raw, name, limit=limit)


def decoded(raw: bytes, name: str, *, limit: int = MAX_BYTES) -> str:
    """As ``read_text``, of what was read.

    Raises:
        UsageError: it is too large, or no text.
    """
    if len(raw) > limit:
        raise UsageError(f"{name}: has more than {limit} bytes; is it the right file?")
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{name}, line {line}: is not UTF-8; save the file as UTF-8 text") from error
    if "\0" in text:
        raise UsageError(f"{name}: is no text file")
    return text


class _Loader(yaml.SafeLoader):
    """YAML of bounded depth, without aliases (a few lines of which can stand for gigabytes) and repeated keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise self._refused("aliases (*name) are not read; write it out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._refused(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refused(self, problem: str) -> yaml.MarkedYAMLError:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"{_short(key.value)} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


# 1e-4 is a number, as people and YAML 1.2 have it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, name: str) -> Document:
    """What a YAML text says.

    Raises:
        UsageError: it is no YAML, or uses what is not read: aliases, repeated keys, tags, great depth.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = {} if node is None else dict(_lines(node, ()))
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{place}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UsageError(f"{name}, line {line}: the character {error.character!r} is not allowed") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UsageError(f"{name}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
    return Document(content, lines, name)


def _lines(node: Any, way: Way) -> Iterator[tuple[Way, int]]:
    yield way, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield from _lines(value, (*way, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*way, str(index)))


def parse_json(text: str, name: str) -> Document:
    """What a JSON text says.

    Raises:
        UsageError: it is no JSON, is nested too deep, or holds NaN, infinity or a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands there twice")
        return found

    def no_number(word: str) -> None:
        raise ValueError(f"{word} is no number")

    try:
        content = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
        level, deep = [content], 0
        while level and (deep := deep + 1) <= MAX_DEPTH + 1:
            inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
            level = [value for values in inside for value in values]
        if level:
            raise RecursionError
        return Document(content, {}, name)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name}, line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{name}: {reason}") from error


# Checking ------------------------------------------------------------------------------------------------------------


@functools.cache
def table(kind: str) -> Mapping[str, Any]:
    """The JSON Schema of a format: ``protocol``, ``layout``, ``means`` or ``model``."""
    found: Mapping[str, Any] = json.loads((resources.files("monai_deepgmm") / "schemas" / f"{kind}.json").read_bytes())
    return found


def check(document: Document, rules: str | Mapping[str, Any]) -> Any:
    """A document's content, once it is found to be as a table says.

    Args:
        document: what was read.
        rules: a table or its name.

    Raises:
        UsageError: naming the first place that is not, what stands there, and what should.
    """
    root = table(rules) if isinstance(rules, str) else rules
    for way, problem in _problems(document.content, root, (), root):
        near = next((way[:n] for n in range(len(way), -1, -1) if way[:n] in document.lines), None)
        line = "" if near is None else f", line {document.lines[near]}"
        raise UsageError(f"{document.name}{line}: {_shown(way)}{problem}")
    return document.content


def several(given: Any) -> list[Any]:
    """A list, of which the only member may have been given by itself: ``--patients p1`` to MONAI's command line."""
    return [given] if isinstance(given, str | int | float) else list(given)


def numbers(given: Any, option: str) -> tuple[float, ...]:
    """The same of numbers.

    Raises:
        UsageError: one of them is no number; names the option.
    """
    try:
        return tuple(float(value) for value in several(given))
    except (TypeError, ValueError):
        raise UsageError(f"{option}: got {given!r}, expected one number or several") from None


def nearest(word: object, choices: Iterable[object], *, least: float = 0.6) -> str:
    """`` (did you mean …?)``, or nothing where no choice is like the word."""
    known = {choice.casefold(): choice for choice in choices if isinstance(choice, str)}
    near = difflib.get_close_matches(str(word).casefold(), known, n=1, cutoff=least)
    return f" (did you mean {known[near[0]]}?)" if near else ""


def _problems(value: Any, rule: Mapping[str, Any], way: Way, root: Mapping[str, Any]) -> Iterator[tuple[Way, str]]:
    """What is wrong, and where; a value of a wrong kind is not looked into."""
    while "$ref" in rule:
        rule = root["$defs"][rule["$ref"].rpartition("/")[2]]
    if "anyOf" in rule:
        if all(any(True for _ in _problems(value, each, way, root)) for each in rule["anyOf"]):
            yield way, f"got {_short(value)}, expected {' or '.join(expected(each) for each in rule['anyOf'])}"
        return
    if not _fits(value, rule):
        hint = nearest(value, rule["enum"]) if "enum" in rule and isinstance(value, str) else ""
        yield way, f"got {_short(value)}{hint}, expected {expected(rule)}"
    elif isinstance(value, dict):
        yield from _in_mapping(value, rule, way, root)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, rule.get("items", {}), (*way, str(index)), root)
        if rule.get("uniqueItems") and len({repr(item) for item in value}) < len(value):
            yield way, f"got {_short(value)}, expected each once"
    elif isinstance(value, str) and rule.get("format") == "regex" and (problem := _regex_problem(value)):
        yield way, problem


def _in_mapping(
    value: Mapping[Any, Any], rule: Mapping[str, Any], way: Way, root: Mapping[str, Any]
) -> Iterator[tuple[Way, str]]:
    known, others = rule.get("properties", {}), rule.get("additionalProperties", {})
    for key, item in value.items():
        place = (*way, str(key))
        if key in known:
            yield from _problems(item, known[key], place, root)
        elif others is False:
            yield place, f"no such key{nearest(key, known)}; there are {', '.join(known)}"
        else:
            yield from (
                (place, f"the key: {p}") for _, p in _problems(str(key), rule.get("propertyNames", {}), (), root)
            )
            yield from _problems(item, others, place, root)
    for key in rule.get("required", ()):
        if key not in value:
            yield way, f"{key!r} is missing"


_KINDS: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def _fits(value: Any, rule: Mapping[str, Any]) -> bool:
    """Whether a value is of the kind, within the limits and among the choices; not what is inside it."""
    kinds = _types(rule)
    named = [k for k in kinds if isinstance(value, _KINDS[k]) and (k == "boolean" or not isinstance(value, bool))]
    if kinds and not named:
        return False
    if "enum" in rule and value not in rule["enum"]:
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = rule.get("minimum", -MAX_NUMBER), rule.get("maximum", MAX_NUMBER)
        return bool(low <= value <= high and value > rule.get("exclusiveMinimum", -math.inf))
    if isinstance(value, str):
        fits: bool = rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", MAX_BYTES)
        return fits and re.search(rule.get("pattern", ""), value) is not None
    if isinstance(value, list | dict):
        what = "Items" if isinstance(value, list) else "Properties"
        return bool(rule.get(f"min{what}", 0) <= len(value) <= rule.get(f"max{what}", MAX_BYTES))
    return True


def _types(rule: Mapping[str, Any]) -> Sequence[str]:
    kinds = rule.get("type", ())
    return (kinds,) if isinstance(kinds, str) else kinds


def expected(rule: Mapping[str, Any]) -> str:
    """A rule in words."""
    if "enum" in rule:
        return f"one of {', '.join(str(choice) for choice in rule['enum'] if choice is not None)}"
    if "expected" in rule:
        return str(rule["expected"])
    words = {"object": "keys with values", "array": "a list", "string": "text", "boolean": "true or false"}
    words |= {"null": "null", "integer": "a whole number", "number": "a number"}
    said = " or ".join(words[kind] for kind in _types(rule) if kind != "null") or "something else"
    low, high, above = (rule.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    said += "" if above is None else f" above {above:g}"
    said += f" from {low:g} to {high:g}" if None not in (low, high) else "" if low is None else f" of at least {low:g}"
    said += f" up to {high:g}" if low is None and high is not None else ""
    least, most = rule.get("minItems"), rule.get("maxItems")
    if least is not None:
        said += f" of {least}" if least == most else f" of at least {least}"
    elif most is not None:
        said += f" of up to {most}"
    return f"{said}, or null" if "null" in _types(rule) else said


def _shown(way: Way) -> str:
    said = "".join(f"[{step}]" if step.isdigit() else f".{_plain(step)}" for step in way).removeprefix(".")
    return f"{said}: " if said else ""


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)[:60]


def _short(value: Any) -> str:
    try:
        said = repr(value)
    except (ValueError, RecursionError):
        return "a number of very many digits"
    return said if len(said) <= 60 else f"{said[:57]}…"


# Regular expressions -------------------------------------------------------------------------------------------------


def _regex_problem(text: str) -> str | None:
    """Why a regular expression is not taken: it is none, or a name of 255 letters could keep it busy for years.

    Repeats of single characters cost at most the length of the name each; of groups, they can cost its power.
    """
    try:
        parsed = re._parser.parse(text)  # type: ignore[attr-defined]
        re.compile(text)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        return f"is no regular expression ({str(error).splitlines()[0]})"
    repeats = list(_repeats(parsed))
    if any(not single for single in repeats):
        return "a repeated group is not taken; repeat single characters or sets, such as [^_]+"
    return f"has {len(repeats)} repeats, expected at most 2" if len(repeats) > 2 else None


def _repeats(parsed: Any) -> Iterator[bool]:
    """For each repeat of more than once at most: whether it is of a single character."""
    single = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = argument
            if int(most) > 1:
                yield len(inner) == 1 and str(inner[0][0]) in single
            yield from _repeats(inner)
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            yield False
        elif isinstance(argument, tuple | list):
            for part in argument:
                if isinstance(part, re._parser.SubPattern):  # type: ignore[attr-defined]
                    yield from _repeats(part)
                elif isinstance(part, list):
                    for branch in part:
                        if isinstance(branch, re._parser.SubPattern):  # type: ignore[attr-defined]
                            yield from _repeats(branch)
        elif isinstance(argument, re._parser.SubPattern):  # type: ignore[attr-defined]
            yield from _repeats(argument)
