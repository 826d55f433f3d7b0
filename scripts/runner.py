"""What the scripts share: how they end, what they keep, what they run, what they read, and the tables they print.

Nothing heavy is imported here, as on Linux a new process is charged with the memory that its parent held.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from monai_deepgmm import cli
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Facts = dict[str, Any]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
PACKAGES = ("monai-deepgmm", "monai", "torch", "numpy", "scipy", "scikit-learn", "nibabel", "SimpleITK")
AGAIN, NOTHING = "run the same command again to go on", "–"


class StageError(Exception):
    """A step failed: what to tell the user, and the exit code."""

    def __init__(self, message: str, code: int = cli.SOME_FAILED) -> None:
        super().__init__(message)
        self.code = code


# Beginning and end ---------------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's own words as they stand, and each option's default."""


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that says what the script's docstring says."""
    return argparse.ArgumentParser(description=text, formatter_class=_Help)


def ended(name: str, work: Callable[[], int | None]) -> int:
    """Does a script's work and returns its exit code; what went wrong is told."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return work() or cli.OK
    except StageError as error:
        told, code = f"{error}; {AGAIN}", error.code
    except UsageError as error:
        told, code = str(error), cli.USAGE
    except StudyError as error:
        told, code = f"{error.code}: {error}", cli.SOME_FAILED
    except KeyboardInterrupt:
        told, code = f"interrupted; {AGAIN}", cli.INTERRUPTED
    print(f"{name}: {told}", file=sys.stderr)
    return code


def _interrupt(received: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


# What is kept --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Facts:
    """The object in a file; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: object) -> None:
    """Writes text as it is, all else as JSON; folders are made."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_whole(path, text.encode())


def kept(path: Path, asked: Facts, make: Callable[[], Facts], *, strict: bool = False) -> Facts:
    """What a file holds if it was made with what is asked for, or else what is made now, and kept.

    Raises:
        UsageError: strict, and the file was made with something else.
    """
    found, asked = read_json(path), json.loads(json.dumps(asked))
    if found.get("asked") == asked:
        return found
    if strict and found:
        raise UsageError(f"OUT: {path.parent.name} was made with other options; remove it, or name another OUT")
    content = {"asked": asked, **make()}
    write(path, content)
    return content


def digest(facts: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def stamps(paths: Iterable[Path | None]) -> str:
    """What tells that files are still the same: their names, sizes and times."""
    return digest([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p is not None])


# Commands and processes ----------------------------------------------------------------------------------------------


def deepgmm(*words: object, say: bool = True) -> int:
    """A command of the package in this process, what it prints on the error stream or nowhere; its exit code, 0 or 1.

    Raises:
        StageError: it gave no result.
        KeyboardInterrupt: the user stopped it.
    """
    command = list(map(str, words))
    if say:
        print(f"$ deepgmm {' '.join(command)}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr if say else io.StringIO()):
        code = cli.main(command)
    if code == cli.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (cli.OK, cli.SOME_FAILED):
        raise StageError(f"deepgmm {' '.join(command)} ended with exit code {code}", code)
    return code


def phantoms(folder: Path, *options: object) -> Path:
    """A cohort of synthetic patients, made if it is not there whole."""
    if not folder.is_dir():
        deepgmm("phantom", folder, *options)
    return folder


def apart(script: str, *words: object, threads: bool = False) -> Facts:
    """The JSON that a script prints last, in a process of its own; ``threads``: as many as the environment says, or 1.

    Raises:
        StageError: it failed; what it said last.
    """
    one = dict.fromkeys(THREADS, "1")
    how = {"env": one | os.environ if threads else os.environ | one, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, script, *map(str, words)], **how)
    if done.returncode:
        raise StageError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    found: Facts = json.loads(done.stdout.strip().rpartition("\n")[2] or "{}")
    return found


def cpu_seconds() -> float:
    """Of this process, its threads and the processes that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_mb() -> float:
    """The most memory that this process has held at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What some work gives, and the CPU and wall seconds that it took."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    found = work()
    return found, {"cpu_seconds": cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall}


@contextlib.contextmanager
def seconds_added(path: Path) -> Iterator[None]:
    """Adds the CPU seconds of what is done meanwhile to those in a file, also when it is interrupted."""
    before, began = float(path.read_text()) if path.is_file() else 0.0, cpu_seconds()
    try:
        yield
    finally:
        write(path, str(before + cpu_seconds() - began))


# Stages: commands that are done once ---------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One command of deepgmm.

    Attributes:
        name: of its record and log.
        command: its arguments.
        needs: files made by earlier stages that it depends on.
        makes: the file without which it is not done.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[Path, ...]
    makes: Path


@dataclass
class Ledger:
    """Which stages are done, and how long they took; on the disk, so that the next session knows.

    Attributes:
        out: the folder.
        data: what tells that the data is the same, from ``stamps``.
        began: when the time was last saved.
        earlier: seconds of work up to then, all sessions together.
        worked: whether this session had anything to do.
    """

    out: Path
    data: str
    began: float = field(default_factory=time.monotonic)
    earlier: float = 0.0
    worked: bool = False

    def __post_init__(self) -> None:
        """Reads how long earlier sessions worked."""
        self.earlier = float(read_json(self._path("session")).get("wall_seconds", 0.0))

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, all sessions together."""
        return self.earlier + (time.monotonic() - self.began) * self.worked

    def record(self, stage: Stage) -> Facts:
        """What is known of a stage with this very command, data and software; empty: nothing."""
        found = read_json(self._path(stage.name))
        return found if found.get("key") == self._key(stage) else {}

    def done(self, stage: Stage) -> bool:
        """Whether nothing is left to do."""
        return bool(self.record(stage).get("done")) and stage.makes.is_file()

    def note(self, stage: Stage, *, done: bool, wall_s: float, cpu_s: float = 0.0) -> None:
        """Adds the time that a stage took, finished or not."""
        self.worked, before = True, self.record(stage)
        content: Facts = {"key": self._key(stage), "command": ["deepgmm", *stage.command], "done": done}
        for name, spent in (("wall_seconds", wall_s), ("cpu_seconds", cpu_s)):
            content[name] = round(before.get(name, 0.0) + spent, 2)
        write(self._path(stage.name), content)
        self.save()

    def save(self) -> None:
        """Keeps the wall time for the next session; one that had nothing to do adds nothing."""
        self.earlier, self.began = round(self.elapsed, 1), time.monotonic()
        write(self._path("session"), {"wall_seconds": self.earlier})

    def say(self, text: str) -> None:
        """One plain line with the time."""
        print(f"[{clock(self.elapsed)}] {text}", flush=True)

    def _path(self, name: str) -> Path:
        return self.out / "stages" / f"{name}.json"

    def _key(self, stage: Stage) -> str:
        return digest(
            [stage.command, self.data, [atomic_files.sha256(p) for p in stage.needs if p.is_file()], versions()]
        )


#: Process id → its stage, when it began, and itself.
_Running = dict[int, tuple[Stage, float, "subprocess.Popen[bytes]"]]


def run(ledger: Ledger, stage: Stage, jobs: int) -> None:
    """Runs a stage in this process; nothing if it is done.

    Raises:
        StageError: the command failed as a whole; patients that fail alone are counted in the tables.
        KeyboardInterrupt: the user stopped it.
    """
    if ledger.done(stage):
        return
    ledger.worked, began, code = True, time.monotonic(), None
    try:
        # How many work at a time changes no figure, and is no part of the stage.
        code = deepgmm(*stage.command, *(["--jobs", jobs] if stage.command[0] == "segment" else []), "-q", say=False)
    finally:
        ledger.note(stage, done=code is not None, wall_s=time.monotonic() - began)
    ledger.say(f"{stage.name}: {time.monotonic() - began:.0f} s" + ("; some patients failed" if code else ""))


def run_apart(ledger: Ledger, stages: Iterable[Stage], jobs: int) -> None:
    """Runs stages as processes of one thread each, ``jobs`` at a time: several networks train faster so than one.

    The CPU seconds come from the kernel's account of each process, an interrupted one included; only what was killed
    together with this script goes uncounted.

    Raises:
        StageError: one of them failed; the others were finished first.
    """
    waiting = [stage for stage in stages if not ledger.done(stage)]
    running: _Running = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                ledger.worked, stage = True, waiting.pop(0)
                process = start(stage, ledger.out / "logs" / f"{stage.name}.log")
                running[process.pid] = (stage, time.monotonic(), process)
            for pid in list(running):
                if code := _collect(ledger, running, pid, os.WNOHANG):
                    failed.append(f"exit code {code}")
            time.sleep(0.2)
    finally:
        for _, _, process in running.values():
            process.terminate()
        for pid in list(running):
            _collect(ledger, running, pid, 0)
    if failed:
        raise StageError(f"{len(failed)} of the trainings failed ({', '.join(failed)}): see {ledger.out / 'logs'}")


def start(stage: Stage, log: Path) -> subprocess.Popen[bytes]:
    """Starts a command with one thread, its output in a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "monai_deepgmm", *stage.command],
            env=os.environ | dict.fromkeys(THREADS, "1"),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """Has the kernel end this process when the script is killed: two trainings must not share a folder."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _collect(ledger: Ledger, running: _Running, pid: int, options: int) -> int | None:
    """The exit code of a process that has ended, after its record was written; None: it is still at work."""
    ended, status, usage = os.wait4(pid, options)
    if not ended:
        return None
    stage, began, process = running.pop(pid)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    wall, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    ledger.note(stage, done=code == 0 and stage.makes.is_file(), wall_s=wall, cpu_s=cpu)
    ledger.say(f"{stage.name}: {wall:.0f} s, {cpu:.0f} CPU s" + (f"; exit code {code}" if code else ""))
    return code


# The machine ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def machine() -> Facts:
    """Where times were taken."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has it
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = told[1] if told else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


def machine_line(made: Mapping[str, Any], *more: str) -> str:
    """A machine in words, with what else is to be said of it."""
    facts = ", ".join([made["cpu"], f"{made['cores']} cores", *more, made["system"]])
    return f"{facts}; {', '.join(f'{name} {version}' for name, version in made['versions'].items())}"


# Label maps ----------------------------------------------------------------------------------------------------------


def labels_in(path: Path) -> npt.NDArray[np.int64]:
    """The whole numbers of a label map ``(X, Y, Z)``."""
    import numpy as np

    from monai_deepgmm.images import nifti

    return np.rint(nifti.read(path, dtype=np.float64).data).astype(np.int64)


def dice(
    found: npt.NDArray[Any], reference: npt.NDArray[Any], tissues: Mapping[str, int], *, needed: bool = True
) -> dict[str, float]:
    """Each tissue's Dice, NaN where the reference does not hold it; not ``needed``: only where neither does."""
    from monai_deepgmm.results import metrics

    overlap = metrics.overlap(metrics.confusion(found, reference, list(tissues.values())))
    both = zip(tissues, overlap.dice, overlap.voxels_true, strict=True)
    return {name: float(value) if there or not needed else float("nan") for name, value, there in both}


# Tables --------------------------------------------------------------------------------------------------------------


def table(rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Markdown; the first row is the head, and columns from number ``text`` on are aligned right."""
    head, *rest = rows
    ruler = ["---"] * text + ["---:"] * (len(head) - text)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *rest))


def known(values: Iterable[float | None]) -> list[float]:
    """The values that are neither None nor NaN."""
    return [value for value in values if value is not None and value == value]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that there are; None if there are none."""
    return fmean(there) if (there := known(values)) else None


def shown(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return NOTHING if value is None or value != value else f"{value:.{digits}f}"


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation of the values that there are."""
    there = known(values)
    sd = f" ± {stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{shown(mean(there), digits)}{sd}"


def clock(seconds: float) -> str:
    """As 2 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
