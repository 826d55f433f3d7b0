"""Work that Dask does: the same labels, and a word about whatever keeps it from being done."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from outcomes import row
from test_batch import arguments

from monai_deepgmm import batch, cli, protocol, workers
from monai_deepgmm.cli import main
from monai_deepgmm.methods.config import build
from monai_deepgmm.patients import discovery

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")
DEEP = ("--method", "deepsvg", "--set", "steps=2", "start_steps=2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("source") / "cohort"
    for number in range(3):
        make_patient(folder, f"pat{number}", seed=number)
    return folder


def cluster(**options: object) -> object:
    quiet = {"dashboard_address": None, "silence_logs": 50, "host": "127.0.0.1", "protocol": "tcp"}
    return distributed.LocalCluster(**quiet, **options)


@pytest.fixture
def here() -> Iterator[object]:
    """A scheduler, and a worker with two threads in this process."""
    found = cluster(n_workers=1, threads_per_worker=2, processes=False)
    yield found
    with suppress(TimeoutError, asyncio.TimeoutError):  # one test has closed the scheduler
        found.close(timeout=1)


@pytest.mark.slow
def test_a_worker_elsewhere_with_two_threads_gives_the_labels_of_one_process(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    with cluster(n_workers=1, threads_per_worker=2) as found:
        with distributed.Client(found) as client:
            client.run(os.chdir, "/")
        dask = ["--dask", found.scheduler_address]
        assert main([*arguments(Path("cohort"), tmp_path / "dask", *DEEP), *dask]) == 0
    assert main(arguments(Path("cohort"), tmp_path / "serial", *DEEP)) == 0
    for path in (tmp_path / "serial").glob("pat*/*.nii.gz"):
        assert (tmp_path / "dask" / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_no_worker_or_one_without_the_package_is_said(source, tmp_path, monkeypatch, here, capsys):
    argv = arguments(source, tmp_path / "out", "--dask", here.scheduler_address)
    with monkeypatch.context() as patched:
        patched.setattr(workers.importlib.util, "find_spec", int)  # which has no answer for a name
        assert main(argv) == cli.USAGE
    assert "lacks monai-deepgmm" in capsys.readouterr().err
    with cluster(n_workers=0) as empty, dask.config.set({workers.WORKER_WAIT: "1s"}):
        assert main([*argv[:-1], empty.scheduler_address]) == cli.USAGE
    assert "no worker came within 1 seconds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_worker_is_waited_for_as_long_as_a_queue_needs(monkeypatch):
    class Queue:
        """A client whose first worker comes when it has been waited for three times."""

        waits = 0

        def nthreads(self) -> dict[str, int]:
            return {}

        def wait_for_workers(self, number: int, timeout: float) -> None:
            self.waits += 1
            if self.waits < 3:
                raise TimeoutError

    said: list[str] = []
    monkeypatch.setattr(workers.logger, "info", lambda text, *words: said.append(text % words))
    workers._await_worker(queue := Queue(), "tcp://there:8786")
    assert queue.waits == 3
    assert [re.search(r"after (\d+) seconds", one)[1] for one in said] == ["0", "60", "120"]


def test_when_the_scheduler_dies_rows_and_labels_agree(source, tmp_path, here):
    found, out = discovery.find(source, protocol.load("infarct")), tmp_path / "out"
    options = batch.BatchOptions(dask=here.scheduler_address)
    assert batch.run(found, out, build(), options, progress=lambda row: here.sync(here.scheduler.close)) in (0, 1)
    for study in found.studies:
        state, label = row(out, study.patient), out / study.patient / f"{study.patient}_dseg.nii.gz"
        assert label.exists() == (state["status"] == "ok")
        assert state["code"] in ("", "E_CRASH")
    assert main(arguments(source, out)) == 0
