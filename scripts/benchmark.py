#!/usr/bin/env python
"""How fast this software is, beside its peers and the paper's algorithms as plain loops, on phantoms.

    python scripts/benchmark.py OUT                      # everything, some minutes
    python scripts/benchmark.py OUT --only em-diag       # one case
    python scripts/benchmark.py OUT --only svgmm --against REV    # beside the EM of an earlier revision
    python scripts/benchmark.py OUT --write              # and bundle/docs/speed.md from what OUT holds

Each case is a process of its own on one thread, in which its sides take turns, so that what else the machine does hits
all of them alike. What is counted is CPU time; what is printed is the median of the repeats. A case that OUT holds is
not measured again. The exit code is 1 if something could not be measured, 2 if nothing could.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import benchmark_peers as peers
import runner
from benchmark_cases import CASES, FULL, TINY
from benchmark_earlier import Earlier
from runner import Facts

from monai_deepgmm.errors import UsageError

#: A side is run so often in one repeat that it takes about so many seconds, and never more often than that.
ABOUT_SECONDS, MOST = 0.1, 50
#: Cases of which each side is also run in a process of its own, for its peak of memory.
PEAKS = ("volume", "pvgmm")
PAGE = Path(__file__).parents[1] / "bundle" / "docs" / "speed.md"
TEXT = """# Speed and memory

Measured on phantoms (no patient's data is needed) and written by

<!-- run by: tests/scripts/test_benchmark.py -->
```
python scripts/benchmark.py OUT --write
```

{machine}.

Each case is one process on one thread in which the sides take turns; seconds are **CPU time**, the median of {repeats}
repeats (of one where a side takes long). Other programs shared the cores meanwhile (load {load}), which makes CPU
seconds longer than on a quiet machine, for all sides alike: compare the sides of a row, not rows of different days.
*x faster* is the other side's seconds over those of the first one, from the same start to the same tolerance; *came of
it* shows whether they agree. The paper's loops are its algorithms written plainly, image after image and component
after component (`scripts/benchmark_peers.py`). Not installed, so not measured: {absent}. Research use only, not a
medical device.

{table}

{limits}
"""


# One case ------------------------------------------------------------------------------------------------------------


def measure(name: str, arguments: argparse.Namespace) -> Facts:
    """A case in this process: each side's seconds and what came of it."""
    sides = prepared(name, arguments)
    runs: dict[str, Facts] = {}
    counts: dict[str, int] = {}
    for side, work in sides.works.items():  # the first time, imports and caches are warmed
        one_thread()
        facts, spent = runner.timed(work)
        seconds = facts.pop("spent", spent["cpu_seconds"])
        counts[side] = min(max(round(ABOUT_SECONDS / max(seconds, 1e-6)), 1), MOST)
        runs[side] = {**facts, "seconds": [seconds] if side in sides.once else []}
    for _ in range(arguments.repeats):
        for side, work in sides.works.items():
            if side not in sides.once:
                runs[side]["seconds"].append(repeated(work, counts[side]))
    return {"shape": sides.shape, "sides": runs}


def prepared(name: str, arguments: argparse.Namespace) -> Any:
    """A case's sides."""
    if "pomegranate" not in peers.absent() and name.startswith("em-"):
        importlib.import_module("pomegranate.gmm")  # before anything is timed, as it starts threads
    one_thread()
    sides = CASES[name][1](TINY if arguments.tiny else FULL)
    if arguments.against and sides.asked is not None:
        side = f"as it was ({arguments.against})"
        works = {**sides.works, side: Earlier(arguments.against, sides.asked)}
        return sides._replace(works=works, once=(*sides.once, side))
    return sides


def one_thread() -> None:
    """Torch works on one thread, whatever a peer's import has set."""
    import torch

    torch.set_num_threads(1)


def repeated(work: Any, count: int) -> float:
    """The CPU seconds of one of so many runs."""
    one_thread()
    spent: list[float] = []

    def some() -> None:
        spent.extend(work().get("spent", math.nan) for _ in range(count))

    _, seconds = runner.timed(some)
    return seconds["cpu_seconds"] / count if math.isnan(spent[0]) else sum(spent) / count


def peak(name: str, side: str, arguments: argparse.Namespace) -> Facts:
    """The most memory that one side takes, and what this process held before it began."""
    work = prepared(name, arguments).works[side]
    before = runner.peak_mb()
    work()
    return {"peak_mb": round(runner.peak_mb()), "before_mb": round(before)}


def measured(name: str, arguments: argparse.Namespace) -> Facts:
    """A case, from OUT or anew.

    Raises:
        StageError: it could not be measured.
    """
    asked = {"case": name, "tiny": arguments.tiny, "repeats": arguments.repeats}
    asked |= {"against": arguments.against} if arguments.against else {}
    return runner.kept(arguments.OUT / f"{name}.json", asked, lambda: anew(name, arguments))


def anew(name: str, arguments: argparse.Namespace) -> Facts:
    """A case now, and when and where it was measured."""
    words = [arguments.OUT, "--repeats", arguments.repeats, *(["--tiny"] if arguments.tiny else [])]
    words += ["--against", arguments.against] if arguments.against else []
    load = os.getloadavg()[0]
    found = runner.apart(__file__, *words, "--here", name)
    if name in PEAKS:
        for side, facts in found["sides"].items():
            facts |= runner.apart(__file__, *words, "--here", name, side)
    where = runner.machine_line(runner.machine(), "1 thread")
    when = datetime.now(UTC).isoformat(timespec="minutes")
    return {**found, "machine": where, "load": round(max(load, os.getloadavg()[0]), 1), "when": when}


# What is printed -----------------------------------------------------------------------------------------------------


def seconds(facts: Mapping[str, Any]) -> float:
    """Of one run, of one patient where there are several."""
    return median(facts["seconds"]) / facts.get("patients", 1)


def lines(found: Mapping[str, Facts]) -> Iterator[Sequence[str]]:
    """The table: one line for each side of each case."""
    yield ("case", "side", "on", "CPU s", "x faster", "peak MB", "came of it")
    for name, case in found.items():
        ours = next(iter(case["sides"].values()))
        for number, (side, facts) in enumerate(case["sides"].items()):
            ratio = "" if number == 0 or name in ("machine", "hearts", "command") else faster(facts, ours)
            memory = f"{facts['peak_mb']} ({facts['before_mb']} before)" if "peak_mb" in facts else ""
            about, shape = (CASES[name][0], case["shape"]) if number == 0 else ("", "")
            yield (about, side, shape, f"{seconds(facts):.3g}", ratio, memory, facts["came"])


def faster(facts: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """How many times as long a side takes, and how far it ends from the same objective."""
    told = f"{seconds(facts) / max(seconds(ours), 1e-9):.1f}"
    if "objective" in facts and "objective" in ours:
        apart = ours["objective"] - facts["objective"]
        told += f" (ours {'lower' if apart < 0 else 'higher'} by {abs(apart):.1g})"
    return told


def limits(found: Mapping[str, Facts]) -> str:
    """What the machine can do, which share of it kernels reach, how seconds grow, and what a run costs besides."""
    told = []
    sides = found.get("machine", {}).get("sides", {})
    if sides:
        flops = sides["product"]["flop"] / seconds(sides["product"]) / 1e9
        copied = sides["copy"]["bytes"] / seconds(sides["copy"]) / 1e9
        told.append(f"- The machine multiplies matrices at {flops:.0f} GFLOP/s and copies {copied:.1f} GB/s.")
        for name, case in found.items():
            ours = next(iter(case["sides"].values()))
            if name != "machine" and "flop" in ours:
                share = ours["flop"] / seconds(ours) / 1e9 / flops
                told.append(
                    f"- {CASES[name][0]}: its two products run at {100 * share:.0f} % of that, all else included."
                )
    if "scaling" in found:
        each = found["scaling"]["sides"]
        base = seconds(each["as it is"])
        slopes = [f"{k.split()[0]} {math.log(seconds(v) / base, 4):.2f}" for k, v in each.items() if k != "as it is"]
        told.append(f"- A GMM's seconds grow as a power of: {', '.join(slopes)}.")
    if "command" in found:
        few, many = [f for f in found["command"]["sides"].values() if "hearts" in f][-2:]
        slope = (seconds(many) - seconds(few)) / max(many["hearts"] - few["hearts"], 1)
        begun = max(seconds(few) - slope * few["hearts"], 0.0)
        share = begun / (begun + 100 * slope)
        told.append(
            f"- `segment` with two processes: {begun:.1f} CPU s to start, {slope:.2f} for each heart; of 100 hearts "
            f"{100 * share:.0f} % is not reading, solving or writing."
        )
    return "\n".join(told)


def page(found: Mapping[str, Facts]) -> str:
    """The document."""
    loads = [case["load"] for case in found.values()]
    first = next(iter(found.values()))
    days = sorted({case["when"][:10] for case in found.values()})
    return TEXT.format(
        machine=f"{'; '.join(dict.fromkeys(case['machine'] for case in found.values()))}; {', '.join(days)}",
        repeats=first["asked"]["repeats"],
        load=f"{min(loads)} to {max(loads)}",
        absent=", ".join(peers.absent()) or "nothing",
        table=runner.table(lines(found), text=3),
        limits=limits(found),
    )


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    known = runner.parser(__doc__)
    known.add_argument("OUT", type=Path, nargs="?", default=Path("benchmark"), help="the folder for the measurements")
    known.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, default=list(CASES), help=", ".join(CASES))
    known.add_argument("--repeats", type=int, default=3, help="runs of each side")
    known.add_argument("--against", metavar="REV", help="a revision of git: its EM is measured beside ours")
    known.add_argument("--write", action="store_true", help="write speed.md from all that OUT holds")
    known.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    known.add_argument("--here", nargs="+", help=argparse.SUPPRESS)  # how the script calls itself
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet, prints the table and returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.here:
        work = measure if len(arguments.here) == 1 else peak
        print(json.dumps(work(*arguments.here, arguments)))
        return 0
    return runner.ended("benchmark", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """All cases that can be measured; of the others, why not."""
    if arguments.repeats < 1:
        raise UsageError(f"--repeats: got {arguments.repeats}, expected at least 1")
    arguments.OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, Facts] = {}
    for name in arguments.only:
        try:
            found[name] = measured(name, arguments)
        except runner.StageError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    if not found:
        raise UsageError("nothing could be measured")
    if arguments.write:
        every = {name: runner.read_json(arguments.OUT / f"{name}.json") for name in CASES}
        PAGE.write_text(page({name: case for name, case in every.items() if case}), encoding="utf-8")
    print(f"{runner.table(lines(found), text=3)}\n\n{limits(found)}")
    return int(len(found) < len(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
