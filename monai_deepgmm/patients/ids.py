"""Patients' ids: each can be the name of a folder, no two are alike, and some of them may be asked for."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.study import Problem, Study
from monai_deepgmm.wording import shown

#: The longest id, in bytes: 255 less what is appended to it in the names of results.
MAX_ID_BYTES = 200
#: What lies beside the patients' folders in a run's results.
RESERVED = {
    *("summary.tsv", "measurements.tsv", "dseg.tsv", "dataset_description.json", "index.html", "deepgmm.log"),
    *("itksnap_labels.txt", "readme.md", ".bidsignore", "measurements_slices.tsv", "masks.tsv"),
    *("agreement.html", "review.tsv"),
    *("evaluation.tsv", "evaluation.json", ".locks", ".refused", "model", ".cohort"),
}
#: Where names of files must be such as Windows takes, and what it takes for a device, whatever follows a dot.
WINDOWS = os.name == "nt"
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


def usable(study: Study) -> Study:
    """The study, with a problem if its id cannot be the name of a folder and of files."""
    name = study.patient
    problem = None
    odd = any(c in "/\\" or unicodedata.category(c) == "Cc" for c in name)
    if odd or not name.strip() or name == "." or ".." in name:
        remedy = "Use an id without separators, '..' or control characters: it becomes a folder's name"
        problem = Problem("E_ID", f"the id {name!r} cannot be a folder's name", remedy)
    elif name.casefold() in RESERVED:
        problem = Problem("E_ID", f"the id {name!r} is the name of a file that every run writes", "Use another id")
    elif (size := len(os.fsencode(name))) > MAX_ID_BYTES:
        message = f"the id begins with {shown(name[:20])!r} and has {size} bytes; {MAX_ID_BYTES} are possible"
        problem = Problem("E_NAME", message, "Shorten it")
    elif WINDOWS and (name.partition(".")[0].strip().upper() in DEVICES or name[-1] in ". " or ":" in name):
        message = f"the id {name!r} cannot be a folder's name on Windows"
        problem = Problem("E_NAME", message, "Use an id that is no device, without a colon, a last dot or a last space")
    return replace(study, problems=(problem, *study.problems)) if problem else study


def unique(studies: Iterable[Study]) -> tuple[Study, ...]:
    """Sorted by id; those whose ids a file system may take for one another all fail."""

    def key(patient: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", patient).casefold())

    first: dict[str, Study] = {}
    times: Counter[str] = Counter()
    for study in studies:
        times[study.patient] += 1
        first.setdefault(study.patient, study)
    alike: dict[str, list[str]] = {}
    for patient in sorted(first):
        alike.setdefault(key(patient), []).append(patient)
    result = []
    for patient in sorted(first):
        study, group = first[patient], alike[key(patient)]
        problem = None
        if times[patient] > 1:
            problem = f"{times[patient]} patients have the id {shown(patient)}"
        elif len(group) > 1:
            problem = f"the ids {', '.join(shown(p) for p in group)} differ only by case or by how accents are encoded"
        if problem:
            duplicate = Problem("E_DUPLICATE", problem, "Rename all but one of them")
            study = replace(study, problems=(duplicate, *study.problems))
        result.append(study)
    return tuple(result)


def selected(studies: tuple[Study, ...], patients: Sequence[str]) -> tuple[Study, ...]:
    """The studies of these ids; all of them if none is given."""
    have = [study.patient for study in studies]
    for patient in patients:
        if patient not in have:
            near = difflib.get_close_matches(patient, have, n=3, cutoff=0.4) or have[:3]
            raise UsageError(
                f"--patients: there is no patient {shown(patient)} among {len(have)}; "
                f"near: {', '.join(map(shown, near))}"
            )
    return tuple(study for study in studies if not patients or study.patient in patients)
