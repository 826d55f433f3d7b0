"""Many patients: each on its own, resumable, in this process, in several, or on a Dask cluster.

Workers are sent paths and a configuration, never arrays. Whatever happens to one patient, the others go on.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.images import loading as scan
from monai_deepgmm.methods.config import Config
from monai_deepgmm.patients.study import Cohort, Problem, Study
from monai_deepgmm.results import outputs
from monai_deepgmm.results.outputs import Row
from monai_deepgmm.results.segment import segment
from monai_deepgmm.training import self_training as selftaught

OK, SOME_FAILED, USAGE, ALL_FAILED, DISK_FULL, INTERRUPTED = 0, 1, 2, 3, 4, 130

logger = logging.getLogger(__name__)
Progress = Callable[[Row], None]
Rows = Generator[Row, None, None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a batch is worked through; none of it changes a label.

    Attributes:
        jobs: processes that work at the same time.
        dask: the address of a Dask scheduler; its workers must see the same files.
        part: (i, n): only every n-th patient, from the i-th (counted from 1).
        overwrite: also do again what is done.
        fail_fast: leave out the remaining patients after the first failure.
    """

    jobs: int = 1
    dask: str | None = None
    part: tuple[int, int] = (1, 1)
    overwrite: bool = False
    fail_fast: bool = False


def run(cohort: Cohort, out: Path, config: Config, plan: Plan, *, progress: Progress = lambda row: None) -> int:
    """Segments every patient of a cohort into ``out``.

    Args:
        cohort: the patients.
        out: the output folder; made if need be.
        config: what to do.
        plan: how to go about it.
        progress: called in this process with each patient's row as it comes.

    Returns:
        The exit code: 0 every patient ok, 1 some failed, 3 all failed, 4 stopped by a full disk.

    Raises:
        UsageError: the output folder is refused, or Dask is asked for and not installed; nothing was touched.
        StudyError: ``E_DISK`` or ``E_WRITE``, not even the folder's own files could be written.
        KeyboardInterrupt: the user stopped the run; what is done is complete, and the tables are up to date.
    """
    studies = select(cohort, plan)
    outputs.check(out, cohort)
    _check_cohort(config, plan)
    work = _work(studies, out, config, plan)
    if config.method == "cohort" and config.model is None:
        outputs.prepare(out, config.protocol)
        config = selftaught.taught(cohort, out, config)
        work = _work(studies, out, config, plan)
    outputs.prepare(out, config.protocol)
    with _log_file(out):
        return _run(studies, work, out, config, plan, progress)


def _check_cohort(config: Config, plan: Plan) -> None:
    """Refuses to let parts of a cohort learn from each other.

    Raises:
        UsageError: the method is cohort, and only a part is to be done.
    """
    if config.method == "cohort" and plan.part != (1, 1):
        hint = f"run it without --part; then others can use --model OUT/{selftaught.MODEL}"
        raise UsageError(f"--part: --method cohort learns from every patient; {hint}")


class Batch:
    """A run that a bundle's configuration can hold: what to do is given first, ``run`` does it.

    Args:
        cohort: the patients.
        output_dir: the output folder.
        config: what to do.
        plan: how to go about it.
    """

    def __init__(self, cohort: Cohort, output_dir: str | Path, config: Config, plan: Plan) -> None:
        self.cohort, self.output_dir, self.config, self.plan = cohort, Path(output_dir), config, plan
        self.exit_code = OK

    def run(self) -> int:
        """Segments every patient, and returns (and keeps) the exit code of ``run``."""
        self.exit_code = run(self.cohort, self.output_dir, self.config, self.plan)
        return self.exit_code


def _run(studies: Sequence[Study], work: Rows, out: Path, config: Config, plan: Plan, progress: Progress) -> int:
    finished: dict[str, Row] = {}
    disk_full = False
    try:
        with closing(work) as rows:
            for row in rows:
                finished[row["patient"]] = row
                _log(row)
                progress(row)
                disk_full = row["code"] == "E_DISK"
                if disk_full or (plan.fail_fast and row["status"] == "failed"):
                    break
        if plan.fail_fast:
            _skip(out, [s for s in studies if s.patient not in finished], config)
    finally:
        outputs.sweep(out)
        trouble = _tables(out)
    if disk_full or trouble == "E_DISK":
        return DISK_FULL
    failed = sum(row["status"] == "failed" for row in finished.values())
    if failed and failed == len(studies):
        return ALL_FAILED
    return SOME_FAILED if failed or trouble else OK


def select(cohort: Cohort, plan: Plan) -> tuple[Study, ...]:
    """The patients of this part."""
    index, parts = plan.part
    return cohort.studies[index - 1 :: parts]


def dry_run(cohort: Cohort, out: Path, config: Config, plan: Plan) -> Iterator[Row]:
    """What a run would meet: each patient is loaded and checked, nothing is fitted, nothing is written.

    Yields:
        Rows with the status ``done``, ``ready`` or ``failed``.
    """
    outputs.check(out, cohort)
    _check_cohort(config, plan)
    for study in select(cohort, plan):
        row = _row(study, config)
        if not plan.overwrite and outputs.done(out, study, config):
            yield {**row, "status": "done"}
            continue
        try:
            found = scan.load(study, config.protocol, frame=config.frame, max_voxels=config.max_voxels)
            yield {**row, "status": "ready", "warnings": list(found.warnings)}
        except StudyError as error:
            yield {**row, **_failure(error)}
        except Exception as error:  # as in process
            yield {**row, **_surprise(error)}


# One patient -------------------------------------------------------------------------------------------------------


def process(study: Study, out: Path, config: Config, overwrite: bool) -> Row:
    """Segments one patient and writes its files, or its failure; runs in whichever process or machine.

    Returns:
        The patient's row. Its code is ``E_DISK`` when the run has to stop.
    """
    try:
        with _one_thread(), outputs.lock(out, study.patient):
            row = None if overwrite else outputs.done(out, study, config)
            return {**row, "resumed": True} if row else _anew(study, out, config)
    except StudyError as error:  # not even the failure could be written
        return _row(study, config) | _failure(error)


def _anew(study: Study, out: Path, config: Config) -> Row:
    began, row = time.monotonic(), _row(study, config)
    try:
        segmentation = segment(study, config)
        row |= {"seconds": round(time.monotonic() - began, 3)}
        return outputs.write(out, study, segmentation, row, config)
    except StudyError as error:
        row |= _failure(error)
    except Exception as error:  # one patient's surprise must not stop the others
        row |= _surprise(error)
    row |= {"seconds": round(time.monotonic() - began, 3)}
    return _fail(out, study, row)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One core per patient: the last digits do not depend on the machine, and small tensors are faster that way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fail(out: Path, study: Study, row: Row) -> Row:
    """Writes the failure. If even that is impossible, the row lives on in this run's answer only."""
    written = {key: value for key, value in row.items() if key != "traceback"}  # it holds this machine's paths
    try:
        outputs.write_failure(out, study, written)
    except StudyError as error:
        if error.code == "E_NAME":
            refused = dataclasses.replace(study, problems=(Problem(error.code, error.message, error.remedy),))
            outputs.write_failure(out, refused, written)
        else:
            outputs.clear(out, study)
            return {**row, **_failure(error)} if error.code == "E_DISK" else row
    return row


def _row(study: Study, config: Config) -> Row:
    return {
        "patient": study.patient,
        "status": "ok",
        "code": "",
        "message": "",
        "remedy": "",
        "seconds": 0.0,
        "method": config.method,
        "warnings": [],
    }


def _failure(error: StudyError) -> Row:
    return {"status": "failed", "code": error.code, "message": error.message, "remedy": error.remedy}


def _surprise(error: Exception) -> Row:
    """The failure for what nobody foresaw; its message may hold a file's name, but no folder of this machine."""
    text = (error.strerror or "") if isinstance(error, OSError) else re.sub(r"(?<![^\s'\"(])/\S*/", "", str(error))
    reason = f"{type(error).__name__}: {text}".splitlines()[0]
    failure = _failure(StudyError("E_INTERNAL", reason, "Please report this with deepgmm.log"))
    return failure | {"traceback": "".join(traceback.format_exception(error))}


def _skip(out: Path, studies: Sequence[Study], config: Config) -> None:
    for study in studies:
        with outputs.lock(out, study.patient):
            if not outputs.done(out, study, config):
                skipped = {"status": "skipped", "message": "left out after an earlier patient failed (--fail-fast)"}
                _fail(out, study, _row(study, config) | skipped)


def _tables(out: Path) -> str | None:
    """Writes the tables; the code of what prevented it."""
    try:
        outputs.rebuild_tables(out)
    except StudyError as error:
        logger.error("the tables could not be written: %s", error)
        return error.code
    return None


class _LogFile(logging.FileHandler):
    """A log that a full disk silences: the patients' own failures say what happened."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def _log_file(out: Path) -> Iterator[None]:
    """Everything said goes to ``deepgmm.log`` too."""
    path = out / "deepgmm.log"
    try:
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise files.unwritten(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("monai_deepgmm")
    if package.level == logging.NOTSET:  # a program that set the level itself knows why
        package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _log(row: Row) -> None:
    state = "done before" if row.get("resumed") else row["status"]
    detail = f"{row['code']}: {row['message']}. {row['remedy']}" if row["code"] else f"{row['seconds']:.1f} s"
    logger.info("%s: %s (%s)", row["patient"].encode(errors="replace").decode(), state, detail)
    for warning in row["warnings"]:
        logger.info("%s: %s", row["patient"].encode(errors="replace").decode(), warning)
    if "traceback" in row:
        logger.debug("%s", row["traceback"])


# Where the work is done --------------------------------------------------------------------------------------------


def _work(studies: Sequence[Study], out: Path, config: Config, plan: Plan) -> Rows:
    """Rows as they come. Only Dask's absence is found before the first is asked for."""
    if plan.dask is not None:
        return _on_dask(studies, out, config, plan, _dask_client(plan.dask))
    if plan.jobs > 1:
        return _in_processes(studies, out, config, plan)
    return (process(study, out, config, plan.overwrite) for study in studies)


def _in_processes(studies: Sequence[Study], out: Path, config: Config, plan: Plan) -> Rows:
    """In processes. If one dies, whoever has no row yet is tried again together, and at last each alone."""
    left = {study.patient: study for study in studies}
    for _ in range(2):
        with closing(_pooled(list(left.values()), out, config, plan)) as rows:
            for row in rows:
                del left[row["patient"]]
                yield row
    for study in left.values():
        yield from list(_pooled([study], out, config, plan)) or [_crashed(out, study, config)]


def _pooled(studies: Sequence[Study], out: Path, config: Config, plan: Plan) -> Rows:
    """Rows as they come, until all are there or a process has died."""
    if not studies:
        return
    # Forking a process that runs torch's threads can hang; a fresh interpreter cannot.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(plan.jobs, len(studies)), mp_context=context, initializer=_quiet_worker)
    try:
        for future in as_completed([pool.submit(process, s, out, config, plan.overwrite) for s in studies]):
            yield future.result()
    except BrokenProcessPool:
        logger.warning("a worker process died (out of memory, or killed); patients without a result are tried again")
    finally:
        _stop(pool)


def _stop(pool: ProcessPoolExecutor) -> None:
    """Ends a pool at once: nobody waits for patients whose rows are not wanted any more."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in processes:
        worker.terminate()
    for worker in processes:
        worker.join()


def _quiet_worker() -> None:
    """Ctrl-C is the parent's business, and a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Asking for the parent's id here would be too late: it may have been killed while this interpreter started.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _crashed(out: Path, study: Study, config: Config) -> Row:
    remedy = "Give the patient more memory (fewer --jobs), or leave it out with --patients"
    error = StudyError("E_CRASH", "the process died each time it handled this patient", remedy)
    return _fail(out, study, _row(study, config) | _failure(error))


def _dask_client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--dask needs Dask: pip install 'monai-deepgmm[dask]'") from None
    try:
        return Client(address, timeout="30s")
    except (OSError, ValueError) as error:
        raise UsageError(f"--dask {address}: no scheduler answers there ({error})") from error


def _on_dask(studies: Sequence[Study], out: Path, config: Config, plan: Plan, client: Any) -> Rows:
    from distributed import as_completed as dask_as_completed

    with client:
        arguments = (out.resolve(), config, plan.overwrite)
        futures = {client.submit(process, s, *arguments, pure=False, retries=1): s for s in studies}
        for future in dask_as_completed(list(futures)):
            crashed = future.status != "finished"
            yield _crashed(out, futures[future], config) if crashed else future.result()
