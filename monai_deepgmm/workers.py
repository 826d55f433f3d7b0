"""Where patients are worked on: in this process, in several, or on a Dask cluster.

Workers are sent a study's paths and what to do with them, never arrays.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results.outputs import Row

logger = logging.getLogger(__name__)
Rows = Generator[Row, None, None]
#: From a patient to its row; what is sent to a worker can be pickled.
Step = Callable[[Study], Row]


def rows(studies: Sequence[Study], process: Step, *, crashed: Step, jobs: int = 1, dask: str | None = None) -> Rows:
    """Each patient's row, in the order in which they are done.

    Args:
        studies: the patients.
        process: what is done to one of them.
        crashed: the row, made in this process, of one whose worker died each time.
        jobs: processes that work at the same time; 1: this one.
        dask: the address of a Dask scheduler that does the work instead.

    Raises:
        UsageError: Dask is not installed, or no scheduler answers; before the first row is asked for.
    """
    if dask is not None:
        return _on_dask(studies, process, crashed, _dask_client(dask))
    if jobs > 1:
        return _in_processes(studies, process, crashed, jobs)
    return (process(study) for study in studies)


# Processes ---------------------------------------------------------------------------------------------------------


def _in_processes(studies: Sequence[Study], process: Step, crashed: Step, jobs: int) -> Rows:
    """In processes. If one dies, whoever has no row yet is tried again together, and at last each alone."""
    left = {study.patient: study for study in studies}
    for _ in range(2):
        with closing(_pooled(list(left.values()), process, jobs)) as found:
            for row in found:
                del left[row["patient"]]
                yield row
    for study in left.values():
        yield from list(_pooled([study], process, jobs)) or [crashed(study)]


def _pooled(studies: Sequence[Study], process: Step, jobs: int) -> Rows:
    """Rows as they come, until all are there or a process has died."""
    if not studies:
        return
    # Forking a process that runs torch's threads can hang; a fresh interpreter cannot.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(studies)), mp_context=context, initializer=_quiet_worker)
    try:
        for future in as_completed([pool.submit(process, study) for study in studies]):
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


# Dask --------------------------------------------------------------------------------------------------------------


def _dask_client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--dask needs Dask: pip install distributed") from None
    try:
        return Client(address, timeout="30s")
    except (OSError, ValueError) as error:
        raise UsageError(f"--dask {address}: no scheduler answers there ({error})") from error


def _on_dask(studies: Sequence[Study], process: Step, crashed: Step, client: Any) -> Rows:
    from distributed import as_completed as dask_as_completed

    with client:
        futures = {client.submit(process, study, pure=False, retries=1): study for study in studies}
        for future in dask_as_completed(list(futures)):
            yield crashed(futures[future]) if future.status != "finished" else future.result()
