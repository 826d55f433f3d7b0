"""Commands in forks of a process that has imported everything: with limits, watched, and counted."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import runner

from monai_deepgmm import cli

DOCUMENTED = (cli.OK, cli.SOME_FAILED, cli.USAGE, cli.ALL_FAILED)
LIMIT_S = 60.0
#: Words that tell of a mistake, whatever the exit code.
SIGNS = ("Traceback", "E_INTERNAL", "E_CRASH", "differs: ")
#: What a case says where its namespace could not be made.
NO_NAMESPACES = "no namespaces here"
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000


class Outcome(NamedTuple):
    """What came of a command.

    Attributes:
        code: its exit code; None: it took too long or was killed.
        said: what it printed.
        above_mb: the most memory that it held, above what it began with.
    """

    code: int | None
    said: str
    above_mb: float

    def wrong(self, allowed: Sequence[int] = DOCUMENTED) -> str:
        """What is wrong with it; empty: nothing."""
        if self.code is None:
            return "took too long"
        lines = self.said.strip().splitlines() or [""]
        for sign in SIGNS:
            if hits := [line for line in lines if sign in line]:
                return f"{sign}: {lines[-1] if sign == 'Traceback' else hits[0]}"[:300]
        return "" if self.code in allowed else f"exit code {self.code}: {lines[-1]}"[:300]


def attempt(
    *words: object,
    limit_s: float = LIMIT_S,
    before: Callable[[], object] | None = None,
    kill: Callable[[int, float], bool] | None = None,
    again: Callable[[int], list[object] | None] | None = None,
) -> Outcome:
    """Runs a command in a fork of this process.

    Args:
        words: after ``deepgmm``.
        limit_s: after which it is killed.
        before: what the fork does first.
        kill: given the process id and the seconds so far, whether to kill it and its children now.
        again: what the fork does after the command, given its exit code; its exit code is that of what it runs then.
    """
    with tempfile.NamedTemporaryFile() as log:
        sys.stdout.flush()
        held = most = anonymous_mb(os.getpid())
        if not (pid := os.fork()):
            _fork(log.name, list(map(str, words)), before, again)
        began, done, status = time.monotonic(), 0, 0
        while not done:
            most, spent = max(most, anonymous_mb(pid)), time.monotonic() - began
            if spent > limit_s or (kill is not None and kill(pid, spent)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0)
            else:
                time.sleep(0.002)
                done, status = os.waitpid(pid, os.WNOHANG)
        said = Path(log.name).read_bytes().decode(errors="replace")
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return Outcome(code, said, most - held)


def _fork(log: str, words: list[str], before: Callable[[], object] | None, again: Any) -> None:
    code = 99
    try:
        os.setsid()
        target = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115 (as long as the process)
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        if before is not None:
            before()
        code = main_code(words)
        if again is not None and (more := again(code)) is not None:
            code = main_code(list(map(str, more)))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main_code(words: list[str]) -> int:
    """The exit code of a command in this process."""
    try:
        return cli.main(words)
    except SystemExit as stopped:  # argparse's own
        return stopped.code if isinstance(stopped.code, int) else 1


def anonymous_mb(pid: int) -> float:
    """The memory that a process holds for itself: not files, such as libraries, which a fork maps again as it goes."""
    with contextlib.suppress(OSError, TypeError):  # it has ended
        found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 / 1e6
    return 0.0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def namespace(kind: int) -> bool:
    """Gives this process a namespace of its own, as root or where users may; whether that could be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(kind) == 0 or libc.unshare(kind | CLONE_NEWUSER) == 0


def counted(found: Iterator[tuple[int, Outcome, Sequence[int]]], seconds: float) -> runner.Facts:
    """How commands ended, of as many as that time allows: (cases, outcome, exit codes that may be) of each."""
    began = time.monotonic()
    codes, wrong, number, most, bare = Counter[str](), [], 0, 0.0, False
    for count, outcome, allowed in found:
        number += count
        most, bare = max(most, outcome.above_mb), bare or NO_NAMESPACES in outcome.said
        codes[str(outcome.code)] += 1
        if said := outcome.wrong(allowed):
            wrong.append(f"case {number}: {said}")
        if time.monotonic() - began > seconds:
            break
    told = NO_NAMESPACES if bare else ""
    return {
        "cases": number,
        "codes": dict(sorted(codes.items())),
        "wrong": wrong,
        "above_mb": round(most),
        "told": told,
    }


def results(out: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run but its log, seconds left out."""
    found = {}
    for path in (p for p in out.rglob("*") if p.is_file() and p.name != "deepgmm.log" and not p.name.startswith(".")):
        content = re.sub(rb'"seconds": [0-9.]+|[0-9.]+ s(?=[ <.;)])', b"", path.read_bytes())
        if path.name == "summary.tsv":
            head, *rows = [line.split(b"\t") for line in content.splitlines()]
            kept = [n for n, name in enumerate(head) if name != b"seconds"]
            content = b"".join(b"\t".join(row[n] for n in kept) for row in rows)
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found
