"""How far a volume's interval reaches, weighed from what the fit knows of its own errors.

``log((T + u) / (V + u)) = c + Σ β z ± r``: T the true volume, V the found one, u = ``cues.LEAST_ML``, z each cue in
standard deviations from its usual value, r wider where more hangs on single regions. The numbers were fitted to
phantoms (``scripts/calibrate_intervals.py``) and stand in ``interval_rules.yaml``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from monai_deepgmm.results.cues import LEAST_ML, Cues

#: A cue counts as at most so many standard deviations away from what is usual.
FARTHEST = 3.0


@dataclass(frozen=True)
class IntervalRule:
    """Of one tissue.

    Attributes:
        centre: c, of a patient whose cues are the usual ones.
        cues: name → slope β, usual value and standard deviation; one that is not known of a patient counts as usual.
        doubt: the tissue whose doubtful regions widen the interval; None: it is as wide for all.
        at: two shares of the found volume that doubtful regions may be.
        reach: r at and below the first share, and at and beyond the second; linear in between.
        absent_ml: where the interval ends if the tissue was not found at all; it begins at 0 where late enhancement
            shows no scar, since there is no edema either where nothing was infarcted. None: as for any other volume.
    """

    centre: float
    cues: Mapping[str, tuple[float, float, float]]
    doubt: str | None
    at: tuple[float, float]
    reach: tuple[float, float]
    absent_ml: float | None = None

    def expected(self, told: Mapping[str, float]) -> float:
        """C + Σ β z."""
        return self.centre + sum(b * standardised(told.get(k), mean, sd) for k, (b, mean, sd) in self.cues.items())

    def ends_ml(self, tissue: str, volume_ml: float, cues: Cues) -> tuple[float, float]:
        """Where the interval of a found volume begins and ends."""
        if volume_ml == 0 and self.absent_ml is not None:
            return 0.0, self.absent_ml
        share = 0.0 if self.doubt is None else doubtful_share(cues, self.doubt, volume_ml)
        reach, middle = between(share, self.at, self.reach), self.expected(cues.about(tissue))
        low, high = ((volume_ml + LEAST_ML) * math.exp(middle + sign * reach) - LEAST_ML for sign in (-1, 1))
        infarct = self.absent_ml is None or cues.of_patient.get("present", 1.0) > 0
        return low if infarct else 0.0, high


def standardised(value: float | None, mean: float, sd: float) -> float:
    """A cue in standard deviations from what is usual; 0 where it is not known."""
    return 0.0 if value is None else min(max((value - mean) / sd, -FARTHEST), FARTHEST)


def doubtful_share(cues: Cues, tissue: str, volume_ml: float) -> float:
    """What hangs on a tissue's doubtful regions, as a share of a volume (and of 1 ml)."""
    return cues.of_tissues.get(tissue, {}).get("doubt_ml", 0.0) / (volume_ml + 2 * LEAST_ML)


def between(share: float, at: tuple[float, float], values: tuple[float, float]) -> float:
    """The first value up to the first place, the second from the second on, linear in between."""
    return values[0] + (values[1] - values[0]) * min(max((share - at[0]) / (at[1] - at[0]), 0.0), 1.0)


def rules(protocol: str, method: str, sequences: Sequence[str]) -> dict[str, IntervalRule]:
    """Tissue → its rule, for a patient with these sequences; empty: there are none.

    A method may have those of another one.
    """
    methods = _table().get(protocol, {})
    entries = methods.get(method, [])
    if isinstance(entries, Mapping):  # the other's own volumes are asked for
        return {}
    for entry in methods[entries] if isinstance(entries, str) else entries:  # a name: that method's
        if set(entry["needs"]) <= set(sequences):
            return {name: _rule(fields) for name, fields in entry["tissues"].items()}
    return {}


def opinion(protocol: str, method: str, sequences: Sequence[str]) -> str | None:
    """The method that tells better than this one where the volumes of a patient with these sequences lie; or None."""
    entries = _table().get(protocol, {}).get(method)
    other: str | None = entries["opinion_of"] if isinstance(entries, Mapping) else None
    return other if other is not None and rules(protocol, other, sequences) else None


def _rule(fields: Mapping[str, Any]) -> IntervalRule:
    cues = {name: (float(b), float(mean), float(sd)) for name, (b, mean, sd) in fields["cues"].items()}
    at, reach = ((float(first), float(second)) for first, second in (fields["at"], fields["reach"]))
    return IntervalRule(float(fields["centre"]), cues, fields["doubt"], at, reach, fields["absent_ml"])


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = (resources.files("monai_deepgmm.results") / "interval_rules.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) or {}
