"""Where patients are worked on: in this process, in several, or on a Dask cluster.

Workers are sent a study's paths and what to do with them, never arrays.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import torch

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results.row_files import Row

logger = logging.getLogger(__name__)
Rows = Generator[Row, None, None]
#: From a patient to its row; what is sent to a worker can be pickled.
Step = Callable[[Study], Row]
#: From a patient who has no row, and the reason, to one.
Crash = Callable[[Study, str], Row]
#: Dask's setting of how long a first worker is waited for (unless set: as long as a queue needs).
WORKER_WAIT = "distributed.scheduler.no-workers-timeout"
#: How often it is said that none has come yet.
TOLD_SECONDS = 60
#: glibc's option, and what is large.
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 8 << 20
_counting, _patients, _threads = threading.Lock(), 0, 1
DIED = "the process died each time it handled this patient"


def rows(studies: Sequence[Study], process: Step, *, crashed: Crash, jobs: int = 1, dask: str | None = None) -> Rows:
    """Each patient's row, in the order in which they are done.

    Args:
        studies: the patients.
        process: what is done to one of them.
        crashed: the row, made in this process, of one whose worker died each time or cannot be asked any more.
        jobs: processes that work at the same time; 1: this one.
        dask: the address of a Dask scheduler that does the work instead.

    Raises:
        UsageError: Dask is not installed, no scheduler or worker answers, or a worker lacks this package; before the
            first row is asked for.
    """
    if dask is not None:
        return _on_dask(studies, process, crashed, _dask_client(dask))
    if jobs > 1:
        return _in_processes(studies, process, crashed, jobs)
    return (process(study) for study in studies)


# Each patient -----------------------------------------------------------------------------------------------------


@functools.cache
def give_memory_back() -> None:
    """Lets what a head's arrays took go back to the system at once; glibc would keep it between smaller ones."""
    with suppress(AttributeError, OSError):  # another system's allocator has its own way
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


@contextmanager
def one_thread() -> Iterator[None]:
    """One core per patient: the last digits do not depend on the machine, and small tensors are faster that way.

    A worker of Dask's may have several threads: the first to come sets the number, the last to leave sets it back.
    """
    global _patients, _threads
    with _counting:
        if _patients == 0:
            _threads = torch.get_num_threads()
        _patients += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _counting:
            _patients -= 1
            if _patients == 0:
                torch.set_num_threads(_threads)


# Processes ---------------------------------------------------------------------------------------------------------


def _in_processes(studies: Sequence[Study], process: Step, crashed: Crash, jobs: int) -> Rows:
    """In processes. If one dies, whoever has no row yet is tried again together, and at last each alone."""
    left = {study.patient: study for study in studies}
    for _ in range(2):
        with closing(_pooled(list(left.values()), process, jobs)) as found:
            for row in found:
                del left[row["patient"]]
                yield row
    for study in left.values():
        yield from list(_pooled([study], process, jobs)) or [crashed(study, DIED)]


def _pooled(studies: Sequence[Study], process: Step, jobs: int) -> Rows:
    """Rows as they come, until all are there or a process has died."""
    if not studies:
        return
    pool = ProcessPoolExecutor(min(jobs, len(studies)), mp_context=_context(), initializer=_quiet_worker)
    try:
        for future in as_completed([pool.submit(process, study) for study in studies]):
            yield future.result()
    except BrokenProcessPool:
        logger.warning("a worker process died (out of memory, or killed); patients without a result are tried again")
    finally:
        _stop(pool)


def _context() -> BaseContext:
    """Workers are forked from one process that has imported everything and run nothing; where there is none, spawned.

    Forking a process that runs torch's threads can hang.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        forkserver.set_forkserver_preload(["monai_deepgmm.quick_start"])
        with suppress(OSError):  # no place for its socket: a system's paths may be too long, or its disk know none
            forkserver.ensure_running()
            return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


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
    """A client of a scheduler that has workers, all of them with this package.

    Raises:
        UsageError: one of these is not so, after the time that Dask's settings give a scheduler and a first worker.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--dask needs Dask: pip install distributed") from None
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise UsageError(f"--dask {address}: no scheduler answers there ({error})") from error
    try:
        _await_worker(client, address)
        found = client.run(importlib.util.find_spec, "monai_deepgmm", on_error="return")
    except UsageError:
        _leave(client)
        raise
    except OSError as error:
        _leave(client)
        raise UsageError(f"--dask {address}: the workers do not answer ({error})") from error
    without = [worker for worker, spec in found.items() if spec is None or isinstance(spec, BaseException)]
    if without:
        _leave(client)
        hint = "install it there, in this version"
        raise UsageError(f"--dask {address}: the worker {without[0]} lacks monai-deepgmm; {hint}")
    return client


def _await_worker(client: Any, address: str) -> None:
    """Waits for a first worker, which a cluster's queue may let wait for hours, and says so."""
    import dask
    from dask.utils import parse_timedelta

    limit = parse_timedelta(dask.config.get(WORKER_WAIT, None))
    waited = 0.0
    while not client.nthreads():
        logger.info("--dask %s: no worker yet, after %.0f seconds; one starts with dask worker", address, waited)
        step = TOLD_SECONDS if limit is None else min(TOLD_SECONDS, limit - waited)
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=step)
            return
        waited += step
        if waited == limit:
            hint = f"start some with dask worker, or have them waited for longer ({WORKER_WAIT})"
            raise UsageError(f"--dask {address}: no worker came within {limit:.0f} seconds; {hint}")


def _leave(client: Any) -> None:
    with suppress(OSError, TimeoutError):
        client.close(timeout=5)


def _on_dask(studies: Sequence[Study], process: Step, crashed: Crash, client: Any) -> Rows:
    from distributed import as_completed as dask_as_completed

    try:
        futures = {client.submit(process, study, pure=False, retries=1): study for study in studies}
        for future in dask_as_completed(list(futures)):
            if future.status == "finished":
                yield future.result()
            else:
                yield crashed(futures[future], _what_happened(future))
    finally:
        _leave(client)


def _what_happened(future: Any) -> str:
    from distributed import KilledWorker

    if future.status != "error":
        return "the connection to the Dask scheduler was lost before this patient was done"
    error = future.exception()
    if isinstance(error, KilledWorker):
        return DIED
    return f"a Dask worker could not take this patient on ({type(error).__name__}: {error})"
