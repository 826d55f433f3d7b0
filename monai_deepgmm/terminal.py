"""What people see: tables, progress, the log's lines."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from monai_deepgmm.errors import ALL_FAILED, DISK_FULL, OK, SOME_FAILED, exit_code_of, users_own
from monai_deepgmm.patients.stack import Stack
from monai_deepgmm.patients.study import Cohort, Problem, Study
from monai_deepgmm.wording import counted, listed


def print_cohort(found: Cohort) -> None:
    """A table of the patients: which files are whose, and what is wrong."""
    sequences = sorted({s for study in found.studies for s in study.images})
    header = ["patient", *sequences, "mask", "truth", "problems"]
    lines = [header]
    for study in found.studies:
        about = [("", p) for p in study.problems] + [("labels: ", p) for p in study.label_problems]
        problems = "; ".join(f"{what}{p.code}: {p.message}. {p.remedy}".rstrip(". ") for what, p in about) or "-"
        files = [study.images[s].name if s in study.images else "-" for s in sequences]
        lines.append([*map(shown, (study.patient, *files, _mask(study), _truth(study), problems))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[-1]]))
    for study in found.studies:
        _print_series(study)
    for study in found.studies:
        if study.unused:
            said = [text for what, text in study.overlooked.items() if what != "mask" or study.mask is None]
            print(f"{shown(study.patient)}: not used: {'; '.join([listed(study.unused), *map(shown, said)])}")
    failing = sum(bool(s.problems) for s in found.studies)
    labels = sum(bool(s.label_problems) for s in found.studies)
    more = f", {labels} whose reference labels cannot be used" if labels else ""
    print(f"\nlayout {found.layout}: {counted(len(found.studies), 'patient')}, {failing} with problems{more}")
    for note in found.notes:
        print(f"note: {shown(note)}")


def _print_series(study: Study) -> None:
    """What was made of each series of a DICOM study. Descriptions may hold anything: they go to no file."""
    rows = []
    for one in study.series:
        size = f"{one.slices} slices" + (f" × {one.times}" if one.times > 1 else "")
        rows.append(
            (one.name, size, f"{one.sequence} ({one.why})" if one.sequence else f"left out: {one.why}", one.text)
        )
    if rows:
        print(f"\n{shown(study.patient)}:")
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            cells = [shown(cell).ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
            print("  series " + "  ".join([*cells, shown(row[3])]).rstrip())


def _mask(study: Study) -> str:
    if study.mask_rule in ("auto", "nonzero"):
        return f"({study.mask_rule})"
    if study.mask_model is not None:
        return f"({study.mask_model.folder.name})"
    if study.mask is None:
        return "-"
    values = " ".join(f"{value:g}" for value in study.mask_labels)
    return f"{study.mask.name} ({values})" if values else study.mask.name


def _truth(study: Study) -> str:
    if study.truth is None:
        return "-"
    said = study.truth_names
    if said is None or said.problem:
        return study.truth.name
    values = " ".join(f"{value}→{index}" for value, index in sorted(said.tissues.items()))
    return f"{study.truth.name} ({said.source}: {values})"


def cohort_json(found: Cohort) -> dict[str, Any]:
    """The same, ready for JSON."""
    return {
        "layout": found.layout,
        "notes": list(found.notes),
        "patients": [
            {
                "patient": study.patient,
                "images": {s: one.name if isinstance(one, Stack) else str(one) for s, one in study.images.items()},
                "mask": str(study.mask) if study.mask else None,
                "mask_rule": study.mask_rule,
                "mask_labels": list(study.mask_labels),
                "truth": str(study.truth) if study.truth else None,
                "truth_labels": _meaning(study),
                "series": [one._asdict() for one in study.series],
                "problems": [_problem(p) for p in study.problems],
                "label_problems": [_problem(p) for p in study.label_problems],
                "unused": list(study.unused),
                "overlooked": dict(study.overlooked),
            }
            for study in found.studies
        ],
    }


def _problem(problem: Problem) -> dict[str, str]:
    return {"code": problem.code, "message": problem.message, "remedy": problem.remedy}


def _meaning(study: Study) -> dict[str, Any] | None:
    """What the values of the reference labels mean, and who says so; None: they are the protocol's indices."""
    if study.truth is None or not study.truth_labels:
        return None
    source = study.truth_names.source if study.truth_names else "layout"
    return {"source": source, "index_of_value": {str(v): i for v, i in study.truth_labels.items()}}


def shown(text: str) -> str:
    """Names from the disk, fit for a terminal: no control characters, no bytes that are no text."""
    return "".join(
        c if c.isprintable() else "�" for c in text.encode(errors="surrogateescape").decode(errors="replace")
    )


def closing_line(out: Path, code: int) -> str:
    """How a run ended, and where to look."""
    meaning = {
        OK: "every patient is done",
        SOME_FAILED: "some patients failed, the rest are complete",
        ALL_FAILED: "every patient failed",
        DISK_FULL: "stopped because the disk is full; free some space and run the same command again",
    }
    return f"{meaning[code]}: see {out / 'index.html'} and {out / 'summary.tsv'}"


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """A progress bar on a terminal; nothing in a log, where the lines per patient say as much."""
    from tqdm import tqdm

    with tqdm(total=total, unit="patient", disable=None) as bar:
        yield bar


class _Terminal(logging.StreamHandler[Any]):
    """Prints above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def encode_anything() -> None:
    """What a terminal's encoding lacks is written with escapes, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_traceback(error: BaseException, out: Path | None) -> str:
    """Puts a traceback into the log of the output folder, where there is one, and shows it with -v.

    Returns:
        What to say of where it stands.
    """
    text = "".join(traceback.format_exception(error))
    logging.getLogger("monai_deepgmm").debug("%s", text)
    if out is not None and (log := out / "deepgmm.log").is_file():
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            return f"{log}"
    return "what the same command says with -v"


def show_log(verbose: int, quiet: int) -> None:
    """The package's log goes to standard error.

    Args:
        verbose: above 0, everything is shown.
        quiet: 1: warnings, 2: errors only.
    """
    logger = logging.getLogger("monai_deepgmm")
    level = logging.WARNING if quiet else logging.INFO
    level = logging.ERROR if quiet > 1 else logging.DEBUG if verbose > 0 else level
    handler = _Terminal()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(level)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    # What MONAI's and ignite's own loggers would tell, our log tells. (MONAI's sets its level when it is imported.)
    logging.getLogger("monai.bundle.workflows").addFilter(_errors_alone)
    logging.getLogger("ignite.engine.engine").setLevel(logging.CRITICAL)


def _errors_alone(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def end_with_one_line() -> None:
    """For bundles: a program that nobody's ``except`` saves ends with what the user can mend, not with a traceback.

    Anything else ends as before. The exit code is that of the command: 2, or 4 for a full disk.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        cause = users_own(error)
        if cause is None:
            before(kind, error, where)
        else:
            print(f"monai-deepgmm: {cause}", file=sys.stderr)
            sys.exit(exit_code_of(cause))

    sys.excepthook = hook
