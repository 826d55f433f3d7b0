"""The options of ``python -m monai.bundle run``, held against the configurations that they are meant for.

MONAI takes every option for a key, also one that no configuration looks at: ``--methd gmm`` would change nothing, and
nobody would hear of it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError

#: How the command's own file ends.
_COMMAND = ("monai", "bundle", "__main__.py")


def refuse_unknown(typed: Sequence[str] | None = None) -> None:
    """Refuses an option that no configuration has; does nothing where no command was typed, as in Python.

    A key that another option's value refers to (``@key``) is known, and so are those of MONAI's tracking.

    Args:
        typed: the program and its words; None: those of this process.

    Raises:
        UsageError: there is no such key; names the nearest.
    """
    command, *words = sys.argv if typed is None else typed
    if PurePath(command).parts[-3:] != _COMMAND or words[:1] != ["run"]:
        return
    given = _options(words[1:])
    if not given.get("config_file"):
        return
    known = {*_keys(given["config_file"]), *_of_monai()}
    known |= set(re.findall(r"@(\w+)", " ".join(given.values())))
    for key in given:
        if key not in known:
            raise UsageError(f"--{key}: no configuration has such a key{schema.nearest(key, known, least=0.75)}")


def _options(words: Sequence[str]) -> dict[str, str]:
    """Each option's outermost key, as Fire reads it, and what follows it."""
    found: dict[str, str] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            key = re.split("#|::", name)[0].replace("-", "_")
            found[key] = value
        elif key:
            found[key] = f"{found[key]} {word}".strip()
    return found


def _keys(files: str) -> set[str]:
    """The outermost keys of one configuration, or of a list of them."""
    from monai.bundle import ConfigParser

    chosen: Any = files
    with contextlib.suppress(ValueError, SyntaxError):
        chosen = ast.literal_eval(files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of these files was said when they were read to be run
        return set(map(str, ConfigParser.load_config_files(chosen)))


def _of_monai() -> set[str]:
    """What MONAI's command and its tracking take."""
    from monai.bundle import run
    from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

    return {*inspect.signature(run).parameters, *DEFAULT_MLFLOW_SETTINGS["configs"]}
