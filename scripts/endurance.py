"""What the software endures: wrong files by the thousand, kill -9, full disks, deaths of workers, many patients.

    python scripts/endurance.py OUT                        # everything, hours
    python scripts/endurance.py OUT --share 0.05           # a twentieth of every count
    python scripts/endurance.py OUT --only headers kills   # some parts; the others' rows are kept from earlier runs
    python scripts/endurance.py OUT --short                # seconds; what the tests run

Every command runs in a process of its own, forked from one that has imported everything: with a limit of time, watched
for tracebacks, exit codes that the documentation does not list, and memory above the imports. Cases follow from --seed.
Linux only. Full disks are small file systems in memory, in a namespace of mounts; commands without a network run in a
namespace without one. Both need root or a system where users may make namespaces; elsewhere the row says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import endurance_cases as cases
import runner
from endurance_run import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    DOCUMENTED,
    NO_NAMESPACES,
    Outcome,
    anonymous_mb,
    attempt,
    children,
    counted,
    main_code,
    namespace,
    results,
)

from monai_deepgmm import cli, protocol

#: Part → how many cases the issue asks for, how many the short version has, and what one is.
PARTS = {
    "headers": (10_000, 25, "NIfTI files with wrong headers, `segment --dry-run`"),
    "protocols": (1_000, 6, "wrong protocols, `segment --dry-run`; every tenth that is taken is also used"),
    "layouts": (1_000, 6, "wrong layouts, `scan`"),
    "manifests": (1_000, 6, "wrong manifests, `scan`"),
    "settings": (500, 6, "`--set` with names and values that may be wrong, `segment --dry-run`"),
    "kills": (50, 1, "kill -9 at a random moment, then the same command to its end"),
    "disks": (20, 1, "full disks, then the same command with space"),
    "deaths": (20, 0, "a worker or the Dask scheduler killed, then the same command to its end"),
    "patients": (500, 0, "patients in one run: growth of memory from the first fifth on"),
    "bombs": (5, 0, "cohorts with files under 1 MB: memory above the imports"),
    "network": (12, 3, "commands without a network, watched for attempts to reach one"),
}
BOMB_MB, GROWTH_MB = 1000.0, 0.05
#: Patients in one command: of headers, and of runs that are interrupted.
TOGETHER, COHORT = 25, 2
NO_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "webbrowser.open", "urllib.Request")


# Parts ---------------------------------------------------------------------------------------------------------------


def headers(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    good = {k: p.read_bytes() for k, p in cases.patient(work / "good", "p", slices=1, compressed=False).items()}
    for start in range(0, count, TOGETHER):
        together = min(TOGETHER, count - start)
        shutil.rmtree(work / "in", ignore_errors=True)
        (work / "in").mkdir()
        for number in range(start, start + together):
            rng = random.Random(f"header {seed} {number}")
            broken = rng.choice(list(good))
            for kind, raw in good.items():
                content = cases.header(raw, rng) if kind == broken else raw
                ending = ".nii.gz" if content[:2] == b"\x1f\x8b" or rng.random() < 0.05 else ".nii"
                (work / "in" / f"p{number}_{kind}{ending}").write_bytes(content)
        yield together, attempt("segment", work / "in", work / "out", "--dry-run", "-q"), DOCUMENTED


def protocols(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    cases.patient(work / "in", "pat1")
    whole = [protocol.as_yaml(protocol.load(name)) for name in protocol.names()]
    taken = 0
    for number in range(count):
        rng = random.Random(f"protocol {seed} {number}")
        (work / "own.yaml").write_bytes(cases.text(whole[(rng.random() < 0.3 and 0) or 1], rng))
        words = ("segment", work / "in", work / "out", "--protocol", work / "own.yaml", "-q")
        outcome = attempt(*words, "--dry-run")
        taken += outcome.code == cli.OK
        if outcome.code == cli.OK and taken % 10 == 1 and not outcome.wrong():
            shutil.rmtree(work / "out", ignore_errors=True)
            outcome = attempt(*words)
        yield 1, outcome, DOCUMENTED


def layouts(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    cases.patient(work / "in" / "pat1", "pat1")
    (work / "in" / f"{'a_' * 110}.nii").write_bytes(b"")
    folder = Path(protocol.__file__).parent / "patients" / "layouts"
    whole = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))]
    for number in range(count):
        rng = random.Random(f"layout {seed} {number}")
        (work / "own.yaml").write_bytes(cases.text(rng.choice(whole), rng))
        yield 1, attempt("scan", work / "in", "--layout", work / "own.yaml", limit_s=20), DOCUMENTED


def manifests(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    files = [cases.patient(work / "in", f"pat{i}") for i in (1, 2)]
    rows = [["patient", "LGE", "T2", "bSSFP", "mask", "truth"]]
    rows += [[f"pat{i}", *(str(f[k]) for k in ("LGE", "T2", "C0", "gd", "gd"))] for i, f in enumerate(files, 1)]
    for number in range(count):
        (work / "own.csv").write_bytes(cases.manifest(rows, random.Random(f"manifest {seed} {number}")))
        words = ("scan", work / "in", "--manifest", work / "own.csv")
        yield 1, attempt(*words, "--mask-labels", "500", "200", limit_s=20), DOCUMENTED


def settings(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    from monai_deepgmm.methods import METHODS, registry
    from monai_deepgmm.methods import settings as known

    cases.patient(work / "in", "pat1")
    usable = [name for name in METHODS if name not in ("network", "cohort")]
    keys = {name: sorted(known.keys(registry.method_class(name))) for name in usable}
    for number in range(count):
        rng = random.Random(f"setting {seed} {number}")
        name = rng.choice(usable)
        words = ("segment", work / "in", work / "out", "--method", name, "--dry-run", "-q")
        given = [cases.setting(keys[name], rng) for _ in range(rng.choice((1, 1, 2)))]
        yield 1, attempt(*words, "--set", *given, "--protocol", "brain" if name == "pvgmm" else "infarct"), DOCUMENTED


def undisturbed(work: Path) -> dict[str, str]:
    """What two runs that nothing disturbs share, byte for byte; a run that was disturbed must come to the same."""
    for number in range(COHORT):
        cases.patient(work / "in", f"pat{number}", number)
    both = []
    for name in ("first", "second"):
        attempt("segment", work / "in", work / name, "-q", limit_s=600)
        both.append(results(work / name))
    return {name: value for name, value in both[0].items() if both[1].get(name) == value}


def differing(out: Path, expected: dict[str, str]) -> str:
    """Files of a finished run that are missing, more or other than expected; empty: none."""
    found = results(out)
    wrong = [name for name, value in expected.items() if found.get(name) != value]
    wrong += [name for name in found if name.startswith("pat") and not (out.parent / "first" / name).is_file()]
    return f"differs: {', '.join(sorted(wrong)[:3])}" if wrong else ""


def ways(address: str | None = None) -> dict[str, list[str]]:
    """How patients are worked through."""
    return {"serial": [], "two jobs": ["--jobs", "2"], **({"Dask": ["--dask", address]} if address else {})}


def kills(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    expected = undisturbed(work)
    with dask() as address:
        for number in range(count):
            rng = random.Random(f"kill {seed} {number}")
            how = list(ways(address).values())[number % len(ways(address))]
            words = ("segment", work / "in", work / "out", "-q", *how)
            when = rng.uniform(0, 1.5 if not how else 12)
            attempt(*words, kill=lambda pid, spent, when=when: spent > when, limit_s=600)
            if number % 3 and number + 1 < count:  # some runs are killed again before they may end
                yield 1, Outcome(cli.OK, "", 0.0), (cli.OK,)
                continue
            outcome = attempt(*words, limit_s=600)
            yield 1, outcome._replace(said=outcome.said + differing(work / "out", expected)), (cli.OK,)
            shutil.rmtree(work / "out")


def disks(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    expected, libc = undisturbed(work), ctypes.CDLL(None)
    whole = sum(p.stat().st_size for p in (work / "first").rglob("*") if p.is_file()) // 1024

    def sized(kilobytes: int, *, first: bool) -> bool:
        options = f"size={kilobytes}k".encode()
        return libc.mount(b"tmpfs", str(work / "out").encode(), b"tmpfs", 0 if first else 32, options) == 0

    for number in range(count):
        rng = random.Random(f"disk {seed} {number}")
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out").mkdir()
        words = ["segment", work / "in", work / "out", "-q", *list(ways().values())[number % 2]]

        def small(size: int = rng.randrange(4, whole)) -> None:
            if not (
                namespace(CLONE_NEWNS) and libc.mount(None, b"/", None, 0x44000, None) == 0 and sized(size, first=True)
            ):
                print(NO_NAMESPACES)
                os._exit(cli.OK)

        def larger(code: int, words: list[object] = words) -> list[object] | None:
            print(f"first exit code {code}")
            sized(1 << 20, first=False)
            second = main_code(list(map(str, words)))
            print(differing(work / "out", expected))
            return None if second == cli.OK and code in (cli.OK, cli.DISK_FULL) else ["--no-such"]

        outcome = attempt(*words, before=small, again=larger, limit_s=600)
        yield 1, outcome, (cli.OK, cli.DISK_FULL)


@contextlib.contextmanager
def dask(workers: int = 2) -> Iterator[str | None]:
    """A Dask scheduler on this machine with workers of one thread; None where Dask is not installed."""
    if importlib.util.find_spec("distributed") is None:
        yield None
        return
    port = 20000 + os.getpid() % 20000
    address = f"tcp://127.0.0.1:{port}"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", str(port), "--no-dashboard"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(c, **quiet) for c in (command, *[worker] * workers)]
    try:
        ready = f"from distributed import Client; Client({address!r}, timeout=100).wait_for_workers({workers}, 100)"
        subprocess.run([sys.executable, "-c", ready], check=True, **quiet)
        yield address
    finally:
        for process in started:
            process.kill()
            process.wait()


def strike(rng: random.Random, when: float, struck: list[int], own: bool, pid: int, spent: float) -> bool:
    """Kills one of the command's workers, or else of this process's (the scheduler and workers of Dask), once."""
    mine = children(pid) if own else [p for p in children(os.getpid()) if p != pid]
    if spent > when and mine and not struck:
        struck.append(rng.choice(mine))
        os.kill(struck[0], signal.SIGKILL)
    return False


def deaths(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    expected = undisturbed(work)
    for number in range(count):
        rng = random.Random(f"death {seed} {number}")
        shutil.rmtree(work / "out", ignore_errors=True)
        serial, when = ("segment", work / "in", work / "out", "-q"), rng.uniform(1, 12)
        with dask() if number % 2 else contextlib.nullcontext() as address:
            how = ["--dask", address] if address else ["--jobs", "2"]
            first = attempt(*serial, *how, kill=functools.partial(strike, rng, when, [], not address), limit_s=120)
        told = "" if first.code in DOCUMENTED else f"differs: exit code {first.code}"
        outcome = attempt(*serial, limit_s=600)
        yield 1, outcome._replace(said=outcome.said + told + differing(work / "out", expected)), (cli.OK,)


def patients(work: Path, count: int, seed: int) -> runner.Facts:
    """One run of many patients: memory in MB for each patient, from the first fifth on, by least squares."""
    import numpy as np

    for number in range(count):
        cases.patient(work / "in", f"pat{number:04d}", seed + number)
    seen: dict[int, float] = {}

    def look(pid: int, spent: float) -> bool:
        done = sum(1 for _ in (work / "out").glob("pat*/*_dseg.nii.gz")) if int(spent * 500) % 50 == 0 else 0
        if done:
            seen[done] = anonymous_mb(pid)
        return False

    outcome = attempt("segment", work / "in", work / "out", "-q", kill=look, limit_s=36_000)
    late = [(n, mb) for n, mb in seen.items() if n > count / 5]
    growth = float(np.polyfit(*zip(*late, strict=True), 1)[0]) if len(late) > 2 else float("nan")
    wrong = [said] if (said := outcome.wrong((cli.OK,))) else []
    wrong += [] if growth < GROWTH_MB else [f"memory grows by {growth:.3f} MB for each patient"]
    facts = {"cases": count, "codes": {str(outcome.code): 1}, "wrong": wrong, "above_mb": round(outcome.above_mb)}
    return {**facts, "told": f"{growth:+.4f} MB for each patient"}


def bombs(work: Path, count: int, seed: int) -> runner.Facts:
    """Small files that stand for much."""
    import resource

    wrong, codes, most, told = [], Counter[str](), 0.0, []
    most_bytes = int(3 * BOMB_MB * 1e6)
    for name, make in list(cases.bombs(work).items())[:count]:
        shutil.rmtree(work, ignore_errors=True)
        words = make()
        held = resource.getrlimit(resource.RLIMIT_DATA)
        limit = int(anonymous_mb(os.getpid()) * 1e6) + most_bytes
        cap = lambda limit=limit, held=held: resource.setrlimit(resource.RLIMIT_DATA, (limit, held[1]))  # noqa: E731
        outcome = attempt("segment", work / "in", work / "out", "-q", *words, before=cap)
        codes[str(outcome.code)] += 1
        told.append(f"{name} {outcome.above_mb:.0f} MB")
        print(f"{told[-1]}, exit code {outcome.code}", file=sys.stderr, flush=True)
        most = max(most, outcome.above_mb)
        problem = outcome.wrong() or (
            "" if outcome.above_mb < BOMB_MB else f"{outcome.above_mb:.0f} MB above the imports"
        )
        wrong += [f"{name}: {problem}"] if problem else []
    return {"cases": count, "codes": dict(codes), "wrong": wrong, "above_mb": round(most), "told": "; ".join(told)}


def network(work: Path, count: int, seed: int) -> Iterator[tuple[int, Outcome, Sequence[int]]]:
    hearts, out, model = work / "in", work / "out", work / "model"
    for number in (1, 2):
        cases.patient(hearts, f"pat{number}", number)
    stranger = work / "net.json"
    stranger.parent.mkdir(exist_ok=True, parents=True)
    stranger.write_text(json.dumps({"_target_": "monai.networks.nets.AHNet", "pretrained": True}))
    train = ["train", hearts, model, "--epochs", "1", "--network", "{_target_: unet, filters: [4, 8]}", "-q"]
    commands: list[tuple[list[object], int]] = [
        (["segment", hearts, out, "-q"], cli.OK),
        (["scan", hearts], cli.OK),
        (["segment", hearts, work / "x", "--method", "deepg", "--network", stranger], cli.USAGE),
        (["segment", hearts, work / "two", "--jobs", "2", "-q"], cli.OK),
        (["means", hearts, "-o", work / "means.json"], cli.OK),
        (["segment", hearts, work / "means", "--means", work / "means.json", "-q"], cli.OK),
        (["evaluate", out, hearts], cli.OK),
        (["report", out], cli.OK),
        (["phantom", work / "phantoms", "-n", "1"], cli.OK),
        (train, cli.OK),
        (["segment", hearts, work / "trained", "--model", model, "-q"], cli.OK),
        (["segment", hearts, work / "gmm", "--method", "svgmm", "-q"], cli.OK),
    ]

    def alone() -> None:
        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event in NO_NETWORK and not (event == "socket.connect" and isinstance(arguments[1], str | bytes)):
                print(f"Traceback: {event} {arguments[1:]}")

        sys.addaudithook(heard)
        if not namespace(CLONE_NEWNET):
            print(NO_NAMESPACES)

    for words, code in commands[:count]:
        yield 1, attempt(*words, before=alone, limit_s=300), (code,)


# The table -----------------------------------------------------------------------------------------------------------


def measured(name: str, count: int, seed: int, seconds: float) -> runner.Facts:
    """One part, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as work:
        began, make = time.monotonic(), globals()[name]
        (place := Path(work) / "work").mkdir()
        found = make(place, count, seed)
        facts: runner.Facts = found if isinstance(found, dict) else counted(found, seconds)
        return {**facts, "seconds": round(time.monotonic() - began, 1), "machine": runner.machine()}


def warm() -> None:
    """Imports what segmenting needs, so that every fork has it."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(open(os.devnull, "w")):
        cases.patient(Path(work) / "in", "pat1")
        cli.main(["segment", f"{work}/in", f"{work}/out", "-q"])
        cli.main(["segment", f"{work}/in", f"{work}/svgmm", "-q", "--method", "svgmm"])


def main(argv: Sequence[str] | None = None) -> int:
    """Does the parts that are asked for, and prints the table of all that are done."""
    parser = runner.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="where rows are kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the counts that the full version has")
    parser.add_argument("--short", action="store_true", help="a few cases of most parts")
    parser.add_argument("--seconds", type=float, default=86_400, help="after which a part takes no further case")
    parser.add_argument("--seed", type=int, default=0, help="from which the cases follow")
    options = parser.parse_args(argv)
    return runner.ended("endurance", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """The parts, the table, and whether anything was wrong."""
    warm()
    for name in options.only:
        full, few, _ = PARTS[name]
        count = few if options.short else max(1, round(full * options.share))
        if count:
            facts = measured(name, count, options.seed, options.seconds)
            runner.write(options.out / f"{name}.json", facts)
            print(f"{name}: {facts['cases']} cases, {len(facts['wrong'])} wrong, {facts['seconds']} s", file=sys.stderr)
    done = {name: facts for name in PARTS if (facts := runner.read_json(options.out / f"{name}.json"))}
    rows = [["part", "what", "cases", "of", "exit codes", "wrong", "MB above imports", "seconds"]]
    for name, facts in done.items():
        codes = ", ".join(f"{code}: {n}" for code, n in facts["codes"].items())
        what = PARTS[name][2] + (f" ({facts['told']})" if facts.get("told") else "")
        numbers = [str(facts["cases"]), str(PARTS[name][0]), codes, str(len(facts["wrong"])), str(facts["above_mb"])]
        rows.append([name, what, *numbers, f"{facts['seconds']:g}"])
    print(runner.table(rows, text=2))
    for name, facts in done.items():
        print(*(f"\n{name}: {said}" for said in facts["wrong"][:10]), sep="", end="")
    print(f"\n\n{runner.machine_line(next(iter(done.values()))['machine'])}")
    return cli.SOME_FAILED if any(facts["wrong"] for facts in done.values()) else cli.OK


if __name__ == "__main__":
    sys.exit(main())
