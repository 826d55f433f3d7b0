"""A parser of commands whose refusals say what may have been meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from monai_deepgmm import schema, terminal


class Parser(argparse.ArgumentParser):
    """A parser that knows what was typed, and so what may have been meant."""

    typed: Sequence[str] = ()
    commands: Any = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, of which each command's parser is asked likewise."""
        self.typed = list(args or ())
        return super().parse_known_args(args, namespace)

    def read(self, typed: list[str]) -> argparse.Namespace:
        """The options that were typed; ends the program where there is no such option, with the nearest."""
        found, unknown = self.parse_known_args(typed)
        if unknown:
            made = self.made_of(found)
            meant = self._meant(unknown[0].partition("=")[0], made)
            made.error(f"unrecognized arguments: {' '.join(map(terminal.shown, unknown))}{meant}")
        return cast(argparse.Namespace, found)

    def _meant(self, word: str, made: argparse.ArgumentParser) -> str:
        """What a word that the command does not take may have meant."""
        if not word.startswith("--"):
            return "" if word.startswith("-") else "; a name with blanks needs quotes"
        others = [name for name, other in self.commands.choices.items() if word in other._option_string_actions]
        if others:
            return f"; that is an option of deepgmm {', '.join(others)}"
        return schema.nearest(word, [option for option in made._option_string_actions if option.startswith("--")])

    def made_of(self, found: argparse.Namespace) -> argparse.ArgumentParser:
        """The parser of the command that was typed."""
        made: argparse.ArgumentParser = self.commands.choices[found.command.__name__.replace("_", "-")]
        return made

    def error(self, message: str) -> NoReturn:
        """Ends the program with what may have been meant.

        Raises:
            SystemExit: always.
        """
        message = message.replace("invalid int value", "no whole number").replace("invalid float value", "no number")
        wrong = re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message)
        near = schema.nearest(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else ""
        if wrong and self.commands is not None and self.typed[:1] and self.typed[0].startswith("-"):
            near = "; options stand behind the command: deepgmm segment DIR OUT --method gmm"
        elif wrong and not near and message.startswith("argument --mask:"):
            near = "; a mask's own file is named in the column mask of a table (--manifest), or as the layout has it"
        greedy = [o for a in self._actions if a.nargs == "+" for o in a.option_strings if o in self.typed]
        if greedy and "are required: " in message:
            missing = message.partition("are required: ")[2].replace(",", "")
            near = f"; {greedy[0]} takes every word after it: put {missing} first, and {greedy[0]} at the end"
        super().error(f"{message}{near}")
