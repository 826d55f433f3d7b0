#!/usr/bin/env python
"""How fast this software is and how much memory it takes, beside scikit-learn where that has the same, on phantoms.

    python scripts/benchmark.py OUT --only head em-diag

Every measurement has a process of its own on one thread, so that its peak of memory is its own; the imports and the
reading of arrays come before the clock, and the peak after the imports alone stands beside the peak of all. The sides
of a row are measured in turns, each several times, and a row is measured in one go or not at all: its JSON in OUT is
what a second run takes as it is. The table has medians, then the least and the most. The exit code is 1 if something
could not be measured, 2 if nothing could.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import runner
from benchmark_rows import FULL, PHANTOMS, ROWS, TINY, Side
from runner import Facts

from monai_deepgmm.errors import UsageError

# Nothing heavy here: on Linux a new process is charged with what its parent held, and each side imports only its own.


# One measurement -----------------------------------------------------------------------------------------------------


def measure(side: Side, folder: Path) -> Facts:
    """Measures one side in this process."""
    for module in side.modules:
        importlib.import_module(module)
    peaks = {"imports_mb": runner.peak_mb()}
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    work = side.load(folder)
    peaks["loaded_mb"] = runner.peak_mb()
    facts, seconds = runner.timed(work)
    peaks["peak_mb"] = runner.peak_mb()
    return facts | {k: round(v, 3) for k, v in seconds.items()} | {k: round(mb) for k, mb in peaks.items()}


def here(arguments: argparse.Namespace) -> None:
    """Makes a phantom, or measures a side of a row, and prints it; in a process of its own."""
    name, *side = arguments.here
    if not side:
        with tempfile.TemporaryDirectory(dir=arguments.OUT) as place:
            made = Path(place) / name
            made.mkdir()
            PHANTOMS[name](made, TINY if arguments.tiny else FULL)
            made.rename(data(arguments, name))  # a phantom that is there is whole
        return
    chosen = ROWS[name][side[0]]
    print(json.dumps(measure(chosen, data(arguments, chosen.data))))


def data(arguments: argparse.Namespace, name: str) -> Path:
    """Where a phantom lies."""
    return Path(arguments.OUT, f"{name}-tiny" if arguments.tiny else name)


# All of them ---------------------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, row: str) -> Facts:
    """A row, from OUT or anew.

    Raises:
        StageError: one of its sides could not be measured.
    """
    asked = {"row": row, "tiny": arguments.tiny, "repeats": arguments.repeats}
    return runner.kept(arguments.OUT / f"{row}.json", asked, lambda: runs_of(arguments, row))


def runs_of(arguments: argparse.Namespace, row: str) -> Facts:
    """The runs of each side, and when and where they were made."""
    sides, words = ROWS[row], [arguments.OUT, *(["--tiny"] if arguments.tiny else []), "--here"]
    for name in dict.fromkeys(side.data for side in sides.values()):
        if not data(arguments, name).is_dir():
            runner.apart(__file__, *words, name)
    before = load()
    runs: dict[str, list[Facts]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name in sides:  # in turns, so that what else the machine does hits all sides alike
            runs[name].append(runner.apart(__file__, *words, row, name))
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "machine": runner.machine_line(runner.machine(), "1 thread"),
        "load": [before, load()],
        "when": when,
        "runs": runs,
    }


def load() -> float:
    """How many processes wanted a core, on average over the last minute."""
    return round(os.getloadavg()[0], 1)


# What is printed -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """The median, then the least and the most."""
    least, most = (f"{one:.{digits}f}" for one in (min(values), max(values)))
    return f"{median(values):.{digits}f}" + (f" ({least}-{most})" if least != most else "")


def each(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One number of every run; seconds are those of one patient."""
    return [float(run[key]) / (run.get("patients", 1) if key.endswith("_seconds") else 1) for run in runs]


def ratio(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, other: str | None) -> str:
    """The CPU seconds of a side and of that beside it, and how they compare; per iteration too, where both count."""
    if other is None:
        return ""
    mine, theirs = (median(each(runs[side], "cpu_seconds")) for side in (name, other))
    said = f"{mine:.2f} / {theirs:.2f} = {mine / max(theirs, 1e-9):.2f} × {other}"
    steps = [runs[side][0].get("iterations", 0) for side in (name, other)]
    if all(steps):
        a, b = (1e3 * one / n for one, n in zip((mine, theirs), steps, strict=True))
        said += f"; divided by iterations {a:.2f} / {b:.2f} ms = {a / max(b, 1e-9):.2f}"
    return said


def table(rows: Sequence[Facts]) -> Iterator[Sequence[str]]:
    """One line for each side; seconds are those of one patient."""
    yield ("row", "what", "shape", "CPU s", "wall s", "peak MB", "after imports", "came of it", "CPU s, both sides")
    for found in rows:
        row, runs = found["asked"]["row"], found["runs"]
        for name, of_side in runs.items():
            seconds = [spread(each(of_side, key), 2) for key in ("cpu_seconds", "wall_seconds")]
            peaks = [spread(each(of_side, key), 0) for key in ("peak_mb", "imports_mb")]
            beside = ratio(runs, name, ROWS[row][name].beside)
            yield (row, name, of_side[0]["shape"], *seconds, *peaks, of_side[0]["came"], beside)


def about(rows: Sequence[Facts]) -> str:
    """The machines, and how busy they were."""
    machines = dict.fromkeys(found["machine"] for found in rows)
    loads = [one for found in rows for one in found["load"]]
    days = sorted({found["when"][:10] for found in rows})
    repeats = rows[0]["asked"]["repeats"]
    return "\n".join([*machines, f"load {min(loads)} to {max(loads)}; {repeats} run(s) of each; {', '.join(days)}"])


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    known = runner.parser(__doc__)
    known.add_argument("OUT", type=Path, nargs="?", default=Path("benchmark"), help="the folder for the measurements")
    known.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, default=list(ROWS), help=", ".join(ROWS))
    known.add_argument("--repeats", type=int, default=3, help="runs of each side")
    known.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    known.add_argument("--here", nargs="+", help=argparse.SUPPRESS)  # how the script calls itself
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet, prints the table and returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.here:
        here(arguments)
        return 0
    return runner.ended("benchmark", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """All rows that can be measured; of the others, why not."""
    if arguments.repeats < 1:
        raise UsageError(f"--repeats: got {arguments.repeats}, expected at least 1")
    arguments.OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in arguments.only:
        try:
            rows.append(measured(arguments, row))
        except runner.StageError as error:
            print(f"left out: {row}: {error}", file=sys.stderr)
    if not rows:
        raise UsageError("nothing could be measured")
    print(f"{about(rows)}\n\n{runner.table(table(rows), text=3)}")
    return int(len(rows) < len(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
