"""Which patients' manual labels a training may use: all, some by name, or a share that the seed draws."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.study import Study

#: Everyone who has reference labels.
ALL = "all"
HINT = f"give {ALL}, patients, a text file of patients, or a share such as 1/4"


def asked(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """What a user typed after ``--labels``, with a file's content in place of its name.

    Args:
        given: "all", a share such as "1/4", a text file with one patient on each line, or patients; None: nobody.

    Returns:
        ``("all",)``, a share, or patients; empty for nobody.

    Raises:
        UsageError: the file cannot be read or is empty, or the share is none.
    """
    words = (given,) if isinstance(given, str) else tuple(str(word) for word in given or ())
    if len(words) == 1 and (path := Path(words[0])).is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--labels {path}: cannot be read ({getattr(error, 'strerror', error)}); {HINT}"
            ) from error
        words = tuple(line.strip() for line in lines if line.strip())
        if not words:
            raise UsageError(f"--labels {path}: names nobody; write one patient on each line")
    if len(words) == 1:
        _share(words[0])
    return words


def of(studies: Sequence[Study], words: Sequence[str], *, seed: int) -> frozenset[str]:
    """The patients whose labels may be used.

    Shares are nested: with one seed, whoever is in the first quarter is in the first half.

    Args:
        studies: the cohort.
        words: from ``asked``.
        seed: of the draw.

    Raises:
        UsageError: a patient is unknown or has no reference labels, or nobody has any.
    """
    able = sorted(s.patient for s in studies if s.truth is not None and not s.problems and not s.label_problems)
    share = Fraction(1) if tuple(words) == (ALL,) else _share(words[0]) if len(words) == 1 else None
    if words and not able:
        raise UsageError("--labels: no patient has a file of reference labels; train without labels, or add some")
    if share is not None:
        order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed)).tolist()
        return frozenset(able[i] for i in order[: max(1, math.floor(share * len(able) + Fraction(1, 2)))])
    known = {s.patient for s in studies}
    for word in words:
        if word not in known:
            raise UsageError(f"--labels {word}: there is no such patient; {HINT}")
        if word not in able:
            raise UsageError(f"--labels {word}: no reference labels of this patient can be used; {HINT}")
    return frozenset(words)


def _share(word: str) -> Fraction | None:
    """``I/N`` as a number; None for anything else.

    Raises:
        UsageError: it is not above 0 and at most 1.
    """
    if not re.fullmatch(r"[0-9]+/[0-9]+", word):
        return None
    above, below = map(int, word.split("/"))
    if not 0 < above <= below:
        raise UsageError(f"--labels {word}: expected a share above 0 and at most 1; {HINT}")
    return Fraction(above, below)
