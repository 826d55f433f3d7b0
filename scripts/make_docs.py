#!/usr/bin/env python
"""Writes the pages that are made from the code: commands, settings, file formats, the Python API and the notebook.

    python scripts/make_docs.py            writes them into bundle/docs
    python scripts/make_docs.py --check    says which of them are not what the code says, and ends with 1

Nothing in these pages is written by hand, so that no key is missing and no default is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import monai_deepgmm
from monai_deepgmm import cli, protocol, schema
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS, registry, settings, training_config
from monai_deepgmm.methods.cohort import CohortConfig
from monai_deepgmm.phantom.brain import BrainConfig
from monai_deepgmm.phantom.heart import PhantomConfig

DOCS = Path(__file__).parents[1] / "bundle" / "docs"
NOTEBOOK = DOCS / "notebook.ipynb"
MADE = "<!-- Made by scripts/make_docs.py from the code: change that, not this page. -->\n"
Rule = Mapping[str, Any]


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page is out of date")
    check = parser.parse_args().check
    stale = [name for name, text in pages().items() if not (DOCS / name).is_file() or read(name) != text]
    for name in stale:
        if check:
            print(f"bundle/docs/{name} is out of date: run python scripts/make_docs.py")
        else:
            (DOCS / name).write_text(pages()[name], encoding="utf-8")
            print(f"bundle/docs/{name}")
    return int(check and bool(stale))


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def pages() -> dict[str, str]:
    """File → text."""
    made = {"commands.md": commands, "settings.md": method_settings, "formats.md": formats, "api.md": api}
    made |= {"notebook.md": notebook}
    texts = {name: "\n".join(lines()).strip() for name, lines in made.items()}
    return {name: f"{MADE}\n{text}\n" for name, text in texts.items()}


def row(*cells: object) -> str:
    """A line of a table."""
    inside = " | ".join(str(cell).replace("|", "\\|") for cell in cells)
    return f"| {inside} |"


# Commands ----------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Every command and option, as ``--help`` has them."""
    yield "# Every command and option\n"
    yield "`deepgmm COMMAND --help` prints the same.\n"
    for name, parser in cli.parser().commands.choices.items():
        yield f"## deepgmm {name}\n\n{parser.description}\n"
        for group in parser._action_groups:
            shown = [action for action in group._group_actions if action.dest != "help"]
            if shown and group.title not in ("positional arguments", "options"):
                yield f"**{group.title}**\n"
            if shown:
                yield row("", "default", "meaning") + "\n|---|---|---|"
                yield "\n".join(map(option, shown)) + "\n"


def option(action: argparse.Action) -> str:
    """The line of an option or argument."""
    value = action.metavar or ("/".join(action.choices) if action.choices else "")
    names = ", ".join(action.option_strings)
    plain = action.default in (None, argparse.SUPPRESS, (), []) or action.default is False
    default = action.default if plain or not isinstance(action.default, tuple) else "/".join(map(str, action.default))
    typed = f"{names} {value}".strip() if action.nargs != 0 else names
    return row(f"`{typed}`", "" if plain else f"`{default}`", action.help)


# Settings ----------------------------------------------------------------------------------------------------------


def method_settings() -> Iterator[str]:
    """Every key of ``--set``."""
    yield "# Every setting: `--set KEY=VALUE`\n"
    yield "Each method has its own keys; others are refused with the list. `null` stands for *as the last column says*."
    yield "`deepgmm segment --help-method NAME` prints the same. Several may follow one `--set`.\n"
    infarct = protocol.load("infarct")
    for name in METHODS:
        kind = registry.method_class(name)
        yield f"## --method {name}\n"
        if kind is CohortConfig:
            yield "Those of [a training](#deepgmm-train), its teacher's included.\n"
            continue
        yield summary(kind) + "\n"
        yield from table((kind(), ""), (Preprocessing(), ""))
    training = training_config.configure({}, infarct)
    yield "## deepgmm train\n\nThe same keys are those of `--method cohort`. The teacher's can be typed without"
    yield "`teacher.` where the training has no key of that name.\n"
    yield from table((training, ""), (training.teacher, "teacher."), (training.preprocessing, ""))
    yield "## deepgmm phantom\n\nWith `--protocol infarct`:\n"
    yield from table((PhantomConfig(), ""))
    yield "With `--protocol brain`:\n"
    yield from table((BrainConfig(), ""))


def summary(kind: type) -> str:
    """What a class's docstring says before its sections."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0].partition("\n\nRaises:")[0]


def table(*configs: tuple[Any, str]) -> Iterator[str]:
    """The settings of dataclasses, each with what stands before its keys.

    Raises:
        ValueError: a setting is not documented.
    """
    yield row("key", "default", "kind", "meaning") + "\n|---|---|---|---|"
    for config, before in configs:
        documented = settings._documented(type(config))
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if not field.metadata.get("set", True) or (dataclasses.is_dataclass(value) and not hasattr(value, "name")):
                continue
            if not documented.get(field.name):
                raise ValueError(f"{type(config).__name__}.{field.name} is not documented")
            shown = value.name if dataclasses.is_dataclass(value) else settings._shown(value)
            text = documented[field.name].replace("``", "`")
            yield row(f"`{before}{field.name}`", f"`{shown}`", kind_of(field), text)
    yield ""


def kind_of(field: dataclasses.Field[Any]) -> str:
    """A setting's kind in words, and its unit."""
    annotation = str(field.type).replace("tuple[int", "tuple[").replace("tuple[float, float", "tuple[")
    words = {"bool": "true, false", "int": "whole number", "float": "number", "tuple": "list"}
    found = [word for name, word in words.items() if re.search(rf"\b{name}\b", annotation)]
    unit = " in mm" if field.name.endswith("_mm") else ""
    return (" or ".join(found) or "word") + unit


# Formats -----------------------------------------------------------------------------------------------------------

FORMATS = {
    "protocol": "Given to `--protocol`: what to look for. [One explained by an example](own_anatomy.md).",
    "layout": "Given to `--layout`: how files are named. `{patient}` and `{sequence}` stand for the id and a "
    "sequence's names, `*` for anything without a slash, `**/` for folders; endings (`.nii.gz` …) are left out.",
    "dicom_layout": "Given to `--layout` for DICOM: which series is which sequence. [Explained](dicom.md).",
    "means": "Written by `deepgmm means`, given to `--means`.",
    "model": "Written by `deepgmm train` into MODEL_DIR, read by `--model`.",
}


def formats() -> Iterator[str]:
    """Every key of the files that users write or commands read."""
    yield "# File formats, key by key\n"
    yield "These tables are what the commands themselves check against (`monai_deepgmm/schemas/*.json`, JSON Schema). A"
    yield "dotted key lies inside another; `[]` is each entry of a list, `NAME` stands for a name of your own."
    yield "The table of patients and files is [the manifest](manifest.md); a file for `--config` takes the options of"
    yield "[its command](commands.md) without the dashes.\n"
    for name, text in FORMATS.items():
        found = schema.table(name)
        ending = "JSON" if name in ("means", "model") else "YAML"
        yield f"## {name.replace('dicom_layout', 'layout of DICOM').capitalize()} ({ending})\n\n{text}\n"
        yield row("key", "needed", "what", "meaning") + "\n|---|---|---|---|"
        yield from keys(found, found, "")
        yield ""
    yield "## Examples\n\nThe protocols and layouts that come with the package:\n"
    package = Path(monai_deepgmm.__file__).parent
    for path in sorted([*package.glob("protocols/*.yaml"), *package.glob("patients/layouts/*.yaml")]):
        yield f"### {path.parent.name}/{path.name}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n"


def keys(rule: Rule, root: Rule, way: str) -> Iterator[str]:
    """A line for each key below a rule.

    Raises:
        ValueError: a key has no description.
    """
    for name, found in rule.get("properties", {}).items():
        full, inner = f"{way}{name}", followed(found, root)
        if "description" not in found:
            raise ValueError(f"{root['title']}: {full} has no description")
        needed = "yes" if name in rule.get("required", ()) else ""
        yield row(f"`{full}`", needed, words(inner, root), found["description"])
        yield from inside(inner, root, full)


def inside(rule: Rule, root: Rule, way: str) -> Iterator[str]:
    """The lines of what a value holds: keys, entries of a list, or names of one's own."""
    rule = followed(rule, root)
    yield from keys(rule, root, f"{way}.")
    if "items" in rule:
        yield from inside(rule["items"], root, f"{way}[]")
    if isinstance(others := rule.get("additionalProperties"), dict):
        yield from inside(others, root, f"{way}.NAME")


def words(rule: Rule, root: Rule) -> str:
    """What a value may be."""
    if "anyOf" in rule:
        parts = [words(followed(each, root), root) for each in rule["anyOf"] if each.get("type") != "null"]
        return " or ".join(parts)
    said = schema.expected(rule).partition(" (")[0].replace(" from -1e+06 to 1e+06", "")
    if "items" in rule:
        inner = words(followed(rule["items"], root), root)
        said += f": {inner}" if inner != "keys with values" else ""
    elif isinstance(others := rule.get("additionalProperties"), dict) and "properties" not in rule:
        said = f"NAME: {words(followed(others, root), root)}"
    return said


def followed(rule: Rule, root: Rule) -> Rule:
    """The rule that a reference means."""
    while "$ref" in rule:
        rule = root["$defs"][rule["$ref"].rpartition("/")[2]]
    return rule


# Python ------------------------------------------------------------------------------------------------------------


def api() -> Iterator[str]:
    """What ``import monai_deepgmm`` gives."""
    yield "# The Python API\n"
    yield "What `monai_deepgmm` exports; each is imported when it is first used. Shapes: B images, K components, M"
    yield "sequences, `*S` any spatial shape. [A tutorial](python.md).\n"
    for name in monai_deepgmm._EXPORTS:  # in the order of a script
        thing = getattr(monai_deepgmm, name)
        yield f"## {name}\n"
        yield signature(name, thing)
        yield from documented(thing)
        if inspect.isclass(thing):
            for method, function in sorted(vars(thing).items()):
                prop = isinstance(function, property)
                function = getattr(function, "__func__", getattr(function, "fget", function))
                if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                    yield f"### {name}.{method}\n"
                    yield "" if prop else signature(method, function)
                    yield from documented(function)


def signature(name: str, thing: Any) -> str:
    """How it is called."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return ""
    parts, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        annotation = parameter.annotation
        typed = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        typed = re.sub(r"ForwardRef\('(.*?)'\)", r"\1", typed)
        said = parameter.name if annotation is parameter.empty else f"{parameter.name}: {typed}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            said, starred = f"*{said}", True
        parts.append(said if parameter.default is parameter.empty else f"{said} = {default(parameter.default)}")
    one = f"{name}({', '.join(parts)})"
    inside = ",\n    ".join(parts)
    return f"```text\n{one}\n```\n" if len(one) < 100 else f"```text\n{name}(\n    {inside}\n)\n```\n"


def default(value: Any) -> str:
    """A default without what differs between runs and machines."""
    return "…" if re.search(r" at 0x|<factory>|^<", repr(value)) else repr(value)


def documented(thing: Any) -> Iterator[str]:
    """A docstring in Google's style as Markdown."""
    heads = {"Args:", "Returns:", "Raises:", "Attributes:"}
    for block in re.split(r"\n(?=(?:Args|Returns|Raises|Attributes):\n)", inspect.cleandoc(thing.__doc__ or "")):
        head, _, rest = block.partition("\n")
        if head not in heads:
            yield block.replace("``", "`") + "\n"
            continue
        yield f"**{head[:-1]}**\n"
        for entry in re.split(r"\n(?=    \S)", rest.rstrip()):
            text = " ".join(entry.split()).replace("``", "`")
            yield "- " + (text if head == "Returns:" else re.sub(r"^(\w+(?:, \w+)*): ", r"`\1`: ", text))
        yield ""


# The notebook ------------------------------------------------------------------------------------------------------


def notebook() -> Iterator[str]:
    """The notebook's cells, without output."""
    yield "# A notebook\n\n[notebook.ipynb](notebook.ipynb), as text. A test runs it on a phantom.\n"
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            yield re.sub(r"^#", "##", text, flags=re.MULTILINE) + "\n"
        else:
            yield f"<!-- run by: tests/test_docs.py, as the notebook -->\n```python\n{text}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
