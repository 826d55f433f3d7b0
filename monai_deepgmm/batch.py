"""Many patients: each on its own, and resumable. Whatever happens to one patient, the others go on."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_deepgmm import workers
from monai_deepgmm.errors import ALL_FAILED, DISK_FULL, OK, SOME_FAILED, StudyError, UsageError
from monai_deepgmm.images import atomic_files, loading
from monai_deepgmm.methods.config import Config
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.results import dicom_seg, outputs
from monai_deepgmm.results.log_file import log_file
from monai_deepgmm.results.row_files import Row
from monai_deepgmm.results.segment import Inferer, segment
from monai_deepgmm.results.steps import Steps
from monai_deepgmm.wording import shown
from monai_deepgmm.workers import Rows

if TYPE_CHECKING:
    from monai.data import Dataset

    from monai_deepgmm.engine import Handler

logger = logging.getLogger(__name__)
Progress = Callable[[Row], None]
#: How long a worker that nobody hears of is left to finish the patient that it is at.
STILL_WORKING_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class BatchOptions:
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


@dataclasses.dataclass(frozen=True)
class Job:
    """What is done to every patient, as workers are sent it.

    Attributes:
        out: the output folder.
        config: what to do.
        overwrite: also do again what is done.
        steps: what happens to a patient; None: what the configuration says.
    """

    out: Path
    config: Config
    overwrite: bool = False
    steps: Steps | None = None

    @functools.cached_property
    def customised(self) -> dict[str, Any] | None:
        """What is told of steps that are not the configuration's own."""
        return None if self.steps is None else self.steps.as_json()


def run(
    cohort: Cohort,
    out: Path,
    config: Config,
    options: BatchOptions,
    *,
    steps: Steps | None = None,
    progress: Progress = lambda row: None,
) -> int:
    """Segments every patient of a cohort into ``out``.

    Args:
        cohort: the patients.
        out: the output folder; made if need be.
        config: what to do.
        options: how to go about it.
        steps: what happens to a patient; None: what the configuration says.
        progress: called in this process with each patient's row as it comes.

    Returns:
        The exit code: 0 every patient ok, 1 some failed, 3 all failed, 4 stopped by a full disk.

    Raises:
        UsageError: the output folder is refused, or Dask is asked for and not installed; nothing was touched.
        StudyError: ``E_DISK`` or ``E_WRITE``, not even the folder's own files could be written.
        KeyboardInterrupt: the user stopped the run; what is done is complete, and the tables are up to date.
    """
    studies = select(cohort, options)
    outputs.check(out, cohort)
    _check_cohort(config, options, steps)
    if steps is not None and options.jobs > 1 and not steps.can_be_sent():
        raise UsageError("jobs: the bundle's own functions cannot be sent to other processes; leave jobs out")
    job = Job(out, config, options.overwrite, steps)
    work = _work(studies, job, options)
    if config.method.name == "cohort" and config.model is None:
        from monai_deepgmm.training import self_training  # MONAI takes seconds to import

        outputs.prepare(out, config.protocol)
        config = self_training.train_on_pseudo_labels(cohort, out, config)
        job = dataclasses.replace(job, config=config)
        work = _work(studies, job, options)
    outputs.prepare(out, config.protocol)
    with log_file(out):
        if not atomic_files.flushes():
            logger.warning("OUT's file system cannot flush files to its disk (fsync): keep its power on until the end")
        for note in cohort.notes:
            logger.warning("note: %s", shown(note))
        return _run(studies, work, job, options, progress)


def _check_cohort(config: Config, options: BatchOptions, steps: Steps | None = None) -> None:
    """Refuses to let parts of a cohort learn from each other, or from other images than are segmented.

    Raises:
        UsageError: the method is cohort, and only a part is to be done, or the preprocessing is not its own.
    """
    if config.method.name != "cohort":
        return
    if steps is not None and steps.preprocessing is not None:
        hint = "train with deepgmm train, and segment with its model"
        raise UsageError(f"preprocessing: --method cohort trains on images prepared as the configuration says; {hint}")
    if options.part != (1, 1):
        hint = "run it without --part; then others can use --model OUT/model"
        raise UsageError(f"--part: --method cohort learns from every patient; {hint}")


class Batch:
    """A run that a bundle's configuration can hold: what to do is given first, ``run`` does it.

    Each study of the data set goes through the data set's transforms and the inferer, each on its own: a patient that
    fails stops nobody.

    Args:
        dataset: MONAI's, of ``{"study": Study}``, with the preprocessing as its transform.
        inferer: fits the mixture to a patient's images.
        cohort: where the studies come from.
        output_dir: the output folder.
        config: what to do.
        options: how to go about it.
        val_handlers: MONAI's or ignite's handlers, which follow the run patient by patient.
    """

    def __init__(
        self,
        dataset: Dataset,
        inferer: Inferer,
        *,
        cohort: Cohort,
        output_dir: str | Path,
        config: Config,
        options: BatchOptions,
        val_handlers: Sequence[Handler] = (),
    ) -> None:
        from monai_deepgmm.engine import PatientEngine  # as above

        studies = tuple(item["study"] for item in dataset.data)
        self.cohort, self.output_dir = dataclasses.replace(cohort, studies=studies), Path(output_dir)
        self.config, self.options = config, options
        self.steps = Steps.unless_default(dataset.transform, inferer, config)
        self.engine = PatientEngine(val_handlers)
        self.exit_code = OK

    def run(self) -> int:
        """Segments every patient, and returns (and keeps) the exit code of ``run``."""
        self.engine.begin(len(select(self.cohort, self.options)))
        progress = self.engine.patient
        asked = (self.cohort, self.output_dir, self.config, self.options)
        self.exit_code = run(*asked, steps=self.steps, progress=progress)
        self.engine.end()
        return self.exit_code


def _run(studies: Sequence[Study], work: Rows, job: Job, options: BatchOptions, progress: Progress) -> int:
    finished: dict[str, Row] = {}
    disk_full = False
    try:
        with closing(work) as rows:
            for row in rows:
                finished[row["patient"]] = row
                _log(row)
                progress(row)
                disk_full = row["code"] == "E_DISK"
                if disk_full or (options.fail_fast and row["status"] == "failed"):
                    break
        if options.fail_fast:
            _skip([s for s in studies if s.patient not in finished], job)
    finally:
        for study in studies:
            if study.patient not in finished:
                outputs.tidy(job.out, study)
        outputs.sweep(job.out)
        trouble = _tables(job.out)
    if disk_full or trouble == "E_DISK":
        return DISK_FULL
    failed = sum(row["status"] == "failed" for row in finished.values())
    if failed and failed == len(studies):
        return ALL_FAILED
    return SOME_FAILED if failed or trouble else OK


def _work(studies: Sequence[Study], job: Job, options: BatchOptions) -> Rows:
    """Rows as they come. Only Dask's absence is found before the first is asked for."""
    if options.dask is not None:  # a worker that was started elsewhere has another working directory
        job = dataclasses.replace(job, out=job.out.resolve())
        studies = [study.with_whole_paths() for study in studies]
    return workers.rows(
        studies,
        functools.partial(process, job=job),
        crashed=functools.partial(_crashed, job=job),
        jobs=options.jobs,
        dask=options.dask,
    )


def select(cohort: Cohort, options: BatchOptions) -> tuple[Study, ...]:
    """The patients of this part."""
    index, parts = options.part
    return cohort.studies[index - 1 :: parts]


def dry_run(cohort: Cohort, out: Path, config: Config, options: BatchOptions) -> Iterator[Row]:
    """What a run would meet: each patient is loaded and checked, nothing is fitted, nothing is written.

    Yields:
        Rows with the status ``done``, ``ready`` or ``failed``.
    """
    outputs.check(out, cohort)
    _check_cohort(config, options)
    for study in select(cohort, options):
        row = _row(study, config)
        if not options.overwrite and outputs.done(out, study, config):
            yield {**row, "status": "done"}
            continue
        try:
            given = config.preprocessing
            dicom_seg.check_source(study, config)
            reading: dict[str, Any] = {"frame": given.frame, "max_voxels": given.max_voxels, "align": given.align}
            found = loading.load(study, config.protocol, **reading)
            yield {**row, "status": "ready", "warnings": list(found.warnings)}
        except StudyError as error:
            yield {**row, **_failure(error)}
        except Exception as error:  # as in process
            yield {**row, **_surprise(error)}


# One patient -------------------------------------------------------------------------------------------------------


def process(study: Study, job: Job) -> Row:
    """Segments one patient and writes its files, or its failure; runs in whichever process or machine.

    Returns:
        The patient's row. Its code is ``E_DISK`` when the run has to stop.
    """
    try:
        workers.give_memory_back()
        with workers.one_thread(), outputs.lock(job.out, study.patient):
            row = None if job.overwrite else outputs.done(job.out, study, job.config, job.customised)
            if row is None:
                return _anew(study, job)
            outputs.forget_refused(job.out, study)
            return {**row, "resumed": True}
    except StudyError as error:  # not even the failure could be written
        return _row(study, job.config) | _failure(error)


def _anew(study: Study, job: Job) -> Row:
    began, row = time.monotonic(), _row(study, job.config)
    steps = job.steps or Steps()
    try:
        dicom_seg.check_source(study, job.config)
        segmentation = segment(study, job.config, preprocessing=steps.preprocessing, inferer=steps.inferer)
        row |= {"seconds": round(time.monotonic() - began, 3)}
        return outputs.write(job.out, study, segmentation, row, job.config, job.customised)
    except StudyError as error:
        row |= _failure(error)
    except Exception as error:  # one patient's surprise must not stop the others
        row |= _surprise(error)
    row |= {"seconds": round(time.monotonic() - began, 3)}
    return _fail(job.out, study, row)


def _fail(out: Path, study: Study, row: Row) -> Row:
    """Writes the failure, apart from the patient's folder where that cannot be written."""
    written = {key: value for key, value in row.items() if key != "traceback"}  # it holds this machine's paths
    try:
        outputs.write_failure(out, study, written)
    except StudyError as error:
        outputs.clear(out, study)
        if error.code == "E_DISK":
            return {**row, **_failure(error)}
        with suppress(StudyError):
            outputs.write_refused(out, study, written)
    return row


def _crashed(study: Study, why: str, job: Job) -> Row:
    """The row of a patient whose worker is dead or out of reach; one that it has finished all the same stays done."""
    remedy = "Give the patient more memory (fewer --jobs), or leave it out with --patients"
    if why != workers.DIED:
        remedy = "Look to the Dask cluster, and run the command again: what is done stays done"
    row = _row(study, job.config) | _failure(StudyError("E_CRASH", why, remedy))
    with outputs.lock(job.out, study.patient, wait_s=STILL_WORKING_SECONDS) as ours:
        if not ours:  # the worker lives, and will write the row
            return row
        return outputs.done(job.out, study, job.config, job.customised) or _fail(job.out, study, row)


def _row(study: Study, config: Config) -> Row:
    return {
        "patient": study.patient,
        "status": "ok",
        "code": "",
        "message": "",
        "remedy": "",
        "seconds": 0.0,
        "method": config.method.name,
        "warnings": [],
    }


def failure(error: Exception) -> Row:
    """What a row says of a patient's error, foreseen or not: status, code, message, remedy."""
    return _failure(error) if isinstance(error, StudyError) else _surprise(error)


def _failure(error: StudyError) -> Row:
    return {"status": "failed", "code": error.code, "message": error.message, "remedy": error.remedy}


def _surprise(error: Exception) -> Row:
    """The failure for what nobody foresaw; its message may hold a file's name, but no folder of this machine."""
    text = (error.strerror or "") if isinstance(error, OSError) else re.sub(r"(?<![^\s'\"(])/\S*/", "", str(error))
    reason = f"{type(error).__name__}: {text}".splitlines()[0]
    failure = _failure(StudyError("E_INTERNAL", reason, "Please report this with deepgmm.log"))
    return failure | {"traceback": "".join(traceback.format_exception(error))}


def _skip(studies: Sequence[Study], job: Job) -> None:
    for study in studies:
        with outputs.lock(job.out, study.patient):
            if not outputs.done(job.out, study, job.config, job.customised):
                skipped = {"status": "skipped", "message": "left out after an earlier patient failed (--fail-fast)"}
                _fail(job.out, study, _row(study, job.config) | skipped)


def _tables(out: Path) -> str | None:
    """Writes the tables; the code of what prevented it."""
    try:
        outputs.rebuild_tables(out)
    except StudyError as error:
        logger.error("the tables could not be written: %s", error)
        return error.code
    return None


def _log(row: Row) -> None:
    state = "done before" if row.get("resumed") else row["status"]
    detail = f"{row['code']}: {row['message']}. {row['remedy']}" if row["code"] else f"{row['seconds']:.1f} s"
    patient = shown(row["patient"])
    level = logging.WARNING if row["status"] == "failed" else logging.INFO  # told also with --quiet
    logger.log(level, "%s: %s (%s)", patient, state, shown(detail))
    for warning in row["warnings"]:
        logger.info("%s: %s", patient, shown(warning))
    if "traceback" in row:
        logger.debug("%s", row["traceback"])
