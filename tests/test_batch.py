"""Killed, interrupted, doubled, divided, crashed or out of disk: a run ends as if nothing had been."""

from __future__ import annotations

import dataclasses
import errno
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from outcomes import row

from monai_deepgmm import batch, cli, protocol, quick_start
from monai_deepgmm.cli import main
from monai_deepgmm.images import atomic_files
from monai_deepgmm.methods.config import build
from monai_deepgmm.patients import discovery
from monai_deepgmm.results import locks
from monai_deepgmm.results.row_files import Row

PATIENTS = [f"pat{number}" for number in range(1, 8)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    """Seven patients of whom one fails."""
    folder = tmp_path_factory.mktemp("source") / "cohort"
    for number, patient in enumerate(PATIENTS):
        made = make_patient(folder, patient, seed=number)
    made["gd"].unlink()
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What one undisturbed run leaves."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main(arguments(source, out)) == 1
    return left(out)


def arguments(source: Path, out: Path, *more: object) -> list[str]:
    return ["segment", str(source), str(out), "--mask", "file", "--probabilities", *map(str, more)]


def left(out: Path) -> dict[str, object]:
    """Every file under OUT and what it holds, but for seconds, times of day and the locks."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if name.startswith(locks.FOLDER) or name == "deepgmm.log":
            continue
        content: object = path.read_bytes()
        if name.endswith("_row.json"):
            content = {**json.loads(path.read_text()), "seconds": 0, "date": ""}
        elif name == "summary.tsv":
            rows = [line.split("\t") for line in path.read_text().splitlines()]
            content = [row[:4] + row[5:] for row in rows]
        elif name.endswith(".html"):
            content = "seconds vary"
        found[name] = content
    return found


def of_pat1(found: dict[str, object]) -> dict[str, object]:
    return {name: content for name, content in found.items() if name.startswith("pat1/")}


def whole(out: Path) -> bool:
    """Whether every image and every file of JSON can be read, and no temporary file is left."""
    for path in out.rglob("*.nii.gz"):
        assert nib.load(path).get_fdata().shape[:3] == (48, 48, 2)
    for path in out.rglob("*.json"):
        assert json.loads(path.read_text())
    return not list(out.rglob("*.part"))


def in_a_process(argv: list[str], *, lingers_at: str | None = None) -> multiprocessing.Process:
    """The command in a process that can be killed, started from one that has imported everything already.

    With a patient to linger at, it is still there when the signal comes, however quick the machine.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["monai_deepgmm.cli", "monai_deepgmm.quick_start"])
    process = context.Process(target=_exit_with, args=(argv, lingers_at))
    process.start()
    return process


def _exit_with(argv: list[str], lingers_at: str | None) -> None:
    original = batch.segment

    def lingering(study, *given, **named):
        if study.patient == lingers_at:
            time.sleep(60)
        return original(study, *given, **named)

    batch.segment = lingering
    # As on a terminal: what a shell starts in the background ignores an interrupt, and hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(argv))


def wait_for(path: Path, process: multiprocessing.Process | subprocess.Popen[bytes]) -> None:
    """Until a file is there, or its writer has ended."""
    ended = process.poll if isinstance(process, subprocess.Popen) else lambda: process.exitcode
    for _ in range(60_000):
        if path.exists() or ended() is not None:
            return
        time.sleep(0.001)
    raise AssertionError(f"{path.name} never came")


KILLED_AFTER = [
    *("dataset_description.json", ".locks", "pat1", "pat1/pat1_dseg.nii.gz", "pat2/pat2_probseg.nii.gz"),
    *("pat3/pat3_preview.png", "pat4/pat4_dseg.json", "pat5/pat5_row.json", "pat6/pat6_report.html"),
    *("pat7/pat7_row.json", "summary.tsv"),
]


def test_killed_again_and_again_it_ends_as_if_it_had_never_stopped(source, expected, tmp_path):
    out = tmp_path / "out"
    killed = 0
    for name in KILLED_AFTER:
        process = in_a_process(arguments(source, out))
        wait_for(out / name, process)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= len(KILLED_AFTER) // 2
    assert main(arguments(source, out)) == 1
    assert left(out) == expected
    assert whole(out)


def test_every_file_that_exists_is_whole_at_any_moment(source, tmp_path):
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for moment in rng.uniform(0, 0.5, 8):
        process = in_a_process(arguments(source, out, "--overwrite"))
        wait_for(out / "pat1" / "pat1_dseg.nii.gz", process)
        time.sleep(moment)
        process.kill()
        process.join()
        whole(out)
        for path in out.glob("pat*/*_row.json"):
            if json.loads(path.read_text())["status"] == "ok":
                assert (path.parent / f"{path.parent.name}_dseg.json").is_file()


def test_interrupted_it_says_so_and_can_go_on(source, expected, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        process = in_a_process(arguments(source, out), lingers_at="pat3")
        wait_for(out / "pat2" / "pat2_row.json", process)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == cli.INTERRUPTED
        assert whole(out)
        assert b"pat1\tok" in (out / "summary.tsv").read_bytes()
        assert b"pat7" not in (out / "summary.tsv").read_bytes()
        assert main(arguments(source, out)) == 1
        assert left(out) == expected


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did: workers are forked from one of them."""
    text = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in text.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its in pairs if its == parent]
    return found[1:]


def alive(pid: int) -> bool:
    """Whether a process still runs; one that ended and that nobody has asked about yet does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_where_no_socket_can_be_made_workers_are_spawned(tmp_path):
    (long := tmp_path / ("x" * 120)).mkdir()
    asked = "from monai_deepgmm import workers; print(workers._context().get_start_method())"
    for place, method in ((tmp_path.parent, "forkserver"), (long, "spawn")):
        how = {"env": os.environ | {"TMPDIR": str(place)}, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", asked], **how)
        assert done.stdout.strip() == method, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ps") is None, reason="ps lists the processes")
@pytest.mark.parametrize("early", [True, False], ids=["while the workers start", "while they work"])
def test_no_worker_outlives_a_run_that_was_killed(source, expected, tmp_path, early):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "monai_deepgmm", *arguments(source, out, "--jobs", 2)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        if early:
            while len(descendants(process.pid)) < 4 and process.poll() is None:
                time.sleep(0.02)
        else:
            wait_for(out / "pat3" / "pat3_row.json", process)
        workers = descendants(process.pid)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(workers) >= 4  # what they are forked from, what looks after its memory, and two
    for _ in range(600):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert [pid for pid in workers if alive(pid)] == []
    assert main(arguments(source, out)) == 1
    assert left(out) == expected


def test_several_jobs_give_the_same_bytes_as_one(source, expected, tmp_path):
    assert main(arguments(source, tmp_path / "out", "--jobs", 3)) == 1
    assert left(tmp_path / "out") == expected


def test_two_runs_on_one_folder_end_as_one(source, expected, tmp_path):
    out = tmp_path / "out"
    processes = [in_a_process(arguments(source, out)) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [1, 1, 1]
    assert left(out) == expected


def test_parts_are_together_the_whole(source, expected, tmp_path):
    codes = [main(arguments(source, tmp_path / "out", "--part", f"{i}/3")) for i in (3, 1, 2)]
    assert sorted(codes) == [0, 0, 1]
    assert left(tmp_path / "out") == expected


def test_a_share_without_fsync_or_locks_is_noted_once_and_changes_nothing(source, expected, tmp_path, monkeypatch):
    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(atomic_files, "_flushes", True)
    monkeypatch.setattr(atomic_files.os, "fsync", unsupported)
    monkeypatch.setattr(locks.FileLock, "acquire", unsupported)
    out = tmp_path / "out"
    assert main(arguments(source, out, "--patients", "pat1")) == 0
    assert of_pat1(left(out)) == of_pat1(expected)
    assert (out / "deepgmm.log").read_text().count("fsync") == 1


def test_a_device_without_double_precision_leaves_the_work_to_the_cpu(source, expected, tmp_path, monkeypatch):
    ones = torch.ones

    def single_only(*given, **named):
        if named.get("device") == "cpu:0" and named.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return ones(*given, **named)

    monkeypatch.setattr(torch, "ones", single_only)
    out = tmp_path / "out"
    assert main(arguments(source, out, "--device", "cpu:0", "--patients", "pat1")) == 0
    assert of_pat1(left(out)) == of_pat1(expected)
    assert build(device="cpu:0").device == "cpu"
    assert main(arguments(source, out, "--device", "meta")) == cli.USAGE


def run(source: Path, out: Path, *, change=lambda studies: studies, progress=lambda row: None) -> int:
    """In two processes, by way of the function."""
    found = discovery.find(source, protocol.load("infarct"), mask="file")
    found = dataclasses.replace(found, studies=change(found.studies))
    config, options = build(probabilities=True), batch.BatchOptions(jobs=2)
    return batch.run(found, out, config, options, progress=progress)


def test_a_worker_that_dies_takes_nobody_with_it(source, expected, tmp_path):
    out, killed = tmp_path / "out", []

    def kill_one(row: Row) -> None:
        if not killed:
            workers = multiprocessing.active_children()
            killed.append(workers[0].pid)
            workers[0].kill()

    assert run(source, out, progress=kill_one) == 1
    assert len(killed) == 1
    assert left(out) == expected


class Deadly:
    """Ends whichever worker is sent it, as running out of memory would."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


@pytest.mark.slow
def test_a_patient_who_kills_every_worker_fails(source, tmp_path):
    def one(studies):
        return (dataclasses.replace(studies[0], images={**studies[0].images, "LGE": Deadly()}),)

    out = tmp_path / "out"
    assert run(source, out, change=one) == cli.ALL_FAILED
    assert "\npat1\tfailed\tE_CRASH\t" in (out / "summary.tsv").read_text()
    assert sorted(p.name for p in (out / "pat1").iterdir()) == ["pat1_report.html", "pat1_row.json"]


def test_failing_fast_leaves_out_the_rest_but_nobody_who_is_done(source, tmp_path):
    broken = Path(shutil.copytree(source, tmp_path / "in"))
    (broken / "pat3_LGE.nii.gz").write_bytes(b"")
    out = tmp_path / "out"
    assert main(arguments(broken, out, "--patients", "pat5")) == 0
    before = (out / "pat5" / "pat5_row.json").stat().st_mtime_ns
    assert main(arguments(broken, out, "--fail-fast")) == 1
    status = {p: row(out, p)["status"] for p in PATIENTS}
    left_out = dict.fromkeys(("pat4", "pat6", "pat7"), "skipped")
    assert status == {"pat1": "ok", "pat2": "ok", "pat3": "failed", **left_out, "pat5": "ok"}
    assert (out / "pat5" / "pat5_row.json").stat().st_mtime_ns == before
    assert "--fail-fast" in row(out, "pat4")["message"]
    summary = (out / "summary.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in summary[1:]] == [status[p] for p in PATIENTS]
    assert main(arguments(broken, out)) == 1
    assert {p for p in PATIENTS if row(out, p)["status"] == "ok"} == {*PATIENTS} - {"pat3", "pat7"}


def test_a_surprise_is_one_patients_failure_without_a_path(source, tmp_path, monkeypatch):
    out, real = tmp_path / "out", batch.segment

    def surprise(study, *given, **named):
        if study.patient == "pat2":
            raise ZeroDivisionError(f"odd thing in '{source}/pat2_LGE.nii.gz' and {source}/x")
        return real(study, *given, **named)

    monkeypatch.setattr(batch, "segment", surprise)
    assert main(arguments(source, out)) == 1
    failed = row(out, "pat2")
    assert failed["code"] == "E_INTERNAL"
    assert failed["message"] == "ZeroDivisionError: odd thing in 'pat2_LGE.nii.gz' and x"
    assert "traceback" not in failed
    assert "Traceback" in (out / "deepgmm.log").read_text()
    assert row(out, "pat3")["status"] == "ok"


def full_when(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From the moment that this file is to be written, the disk is full."""
    real, full = atomic_files._write_beside, []

    def write(path: Path, data: bytes) -> None:
        full.extend([True] if path.name == name else [])
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(atomic_files, "_write_beside", write)


@pytest.mark.parametrize(
    "name",
    ["dataset_description.json", "pat2_dseg.nii.gz", "pat2_row.json", "pat2_report.html", "summary.tsv", "index.html"],
)
def test_a_full_disk_stops_the_run_cleanly_and_it_can_go_on(source, expected, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    full_when(monkeypatch, name)
    assert main(arguments(source, out)) == cli.DISK_FULL
    monkeypatch.undo()
    assert whole(out)
    assert not (out / name).exists()
    if name.startswith("pat2"):
        assert sorted(p.name for p in out.glob("pat*")) == ["pat1", "pat2"]
        assert not [p.name for p in (out / "pat2").iterdir() if p.name != "pat2_row.json"]
    assert main(arguments(source, out)) == 1
    assert left(out) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(source, expected, small_disk, capfd):
    out = small_disk / "out"
    assert main(arguments(source, out)) == cli.DISK_FULL
    told = capfd.readouterr().err
    assert "E_DISK" in told
    assert "Traceback" not in told
    assert whole(out)
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert main(arguments(source, out)) == 1
    assert left(out) == expected


def test_what_a_process_begins_with_is_imported_uncollected_once_and_collected_afterwards(monkeypatch):
    """Whether garbage is looked for while everything is imported, where it is there already, and afterwards."""
    imported = sys.modules["monai_deepgmm.batch"]
    seen = []
    monkeypatch.setattr(importlib, "import_module", lambda name: seen.append((name, gc.isenabled())) or imported)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    for there in (True, False):
        if not there:
            monkeypatch.delitem(sys.modules, "monai_deepgmm.batch")
        assert quick_start._imported() is imported
    assert seen == [("monai_deepgmm.batch", True), ("monai_deepgmm.batch", False)]
    assert gc.isenabled()
