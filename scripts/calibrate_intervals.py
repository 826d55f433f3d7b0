"""How far a 90 % interval of a volume must reach: measured on phantoms of some seeds, each checked on the others'.

    python scripts/calibrate_intervals.py OUT [--methods anatomy svgmm cohort pvgmm] [--hearts 120] [--brains 24]

Each method segments the same phantoms. Where a method says what it knows of its own errors (``results/cues.py``), rules
are fitted (``results/interval_rule.py``); everywhere, an interval by standard deviations: what the reference volume has
more than the found one, divided by the estimated one, from its lower to its upper percentile. Printed is the share of
each seed's volumes that the intervals of the others hold, and how wide these are, as a share of the true volume. A
method that takes another's intervals (``OPINION_OF``) is checked as it is. ``--write`` puts what was found on
all seeds into the package. ``--score DIR`` also scores it on patients with reference labels. OUT keeps every result: a
second run goes on where one stopped.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import runner
import yaml
from numpy.typing import NDArray

import monai_deepgmm.results
from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import labels, nifti
from monai_deepgmm.patients import discovery
from monai_deepgmm.results import interval_rule, uncertainty
from monai_deepgmm.results.cues import LEAST_ML, Cues
from monai_deepgmm.results.interval_rule import IntervalRule
from monai_deepgmm.results.refit import USUAL_COUNT

PLACE = Path(monai_deepgmm.results.__file__).parent
REACHES, RULES = PLACE / "interval_calibration.yaml", PLACE / "interval_rules.yaml"
#: Method → the protocol whose phantoms it is calibrated on.
PROTOCOLS = {"anatomy": "infarct", "svgmm": "infarct", "gmm": "infarct", "cohort": "infarct", "pvgmm": "brain"}
#: Slopes are drawn to 0 as if so many patients had shown none.
RIDGE = 3.0
#: Cues that vary by less are the same for all.
LEAST_SPREAD = 1e-3

Array = NDArray[np.float64]


class Width(NamedTuple):
    """What moves and widens a tissue's interval: see ``IntervalRule``; only the ratio of the two reaches matters.

    Attributes:
        cues: what is weighed.
        doubt: the tissue whose doubtful regions count.
        at: two shares of the volume.
        reach: how wide the interval is there.
        share: how much of the phantoms' mean error is taken over: a patient need not have it.
    """

    cues: tuple[str, ...]
    doubt: str | None = None
    at: tuple[float, float] = (0.0, 1.0)
    reach: tuple[float, float] = (1.0, 1.0)
    share: float = 0.5


class Kind(NamedTuple):
    """A kind of patients with rules of their own.

    Attributes:
        sequences: that the phantoms have.
        needs: those of them that a patient must have.
        widths: of each tissue.
    """

    sequences: tuple[str, ...]
    needs: tuple[str, ...]
    widths: Mapping[str, Width]


PROBABLE = ("expected", "candidates")
PLAIN = ("bright", "noise_T2", "uneven_T2", "contrast_T2", "noise_bSSFP", "uneven_bSSFP")
PLAIN_LGE = ("bright", "noise_LGE", "uneven_LGE", "contrast_LGE")
SHOWN = ("level", "evidence", "separation")
KINDS = (
    Kind(
        ("LGE", "T2", "bSSFP"),
        ("LGE", "T2"),
        {
            "blood": Width((*PLAIN, *SHOWN, "present")),
            "myocardium": Width((*PROBABLE, *PLAIN, *SHOWN, "present"), "edema", (0.055, 0.065), (0.2, 1.0)),
            "edema": Width((*PROBABLE, *PLAIN), "edema", reach=(0.3, 1.3)),
            "scar": Width((*PROBABLE, *PLAIN, *SHOWN), "scar", reach=(0.2, 1.2), share=0.75),
        },
    ),
    Kind(
        ("LGE",),
        ("LGE",),
        {
            "blood": Width((*PLAIN_LGE, *SHOWN, "present")),
            "myocardium": Width(("candidates", *PLAIN_LGE, *SHOWN, "present"), "scar", (0.02, 0.06), (0.4, 1.0)),
            "scar": Width((*PROBABLE, *PLAIN_LGE, *SHOWN), "scar", reach=(0.1, 1.1)),
        },
    ),
)
#: Methods with rules of their own, and one whose network is taught by another's labels and errs as that does.
RULED, TAUGHT = {"anatomy": KINDS}, {"cohort": "anatomy"}
#: Methods whose intervals are those that another gives of the same patient.
OPINION_OF = {"svgmm": "anatomy"}
#: How many healthy phantoms there are for each with an infarct: their blood and wall are fitted with the others', and
#: they say what there may be where nothing was found.
HEALTHY = 0.1
#: What is said of a tissue that was not found needs so many phantoms.
LEAST_ABSENT = 10


class Volume(NamedTuple):
    """One tissue of one patient, in ml: as the reference has it, as found, its standard deviation; what is known.

    The interval that the patient's sidecar tells is ``told_ml``, if any.
    """

    tissue: str
    reference_ml: float
    found_ml: float
    sd_ml: float
    mask_ml: float
    cues: Cues
    sequences: tuple[str, ...]
    told_ml: tuple[float, float] | None = None


def volumes(data: Path, results: Path, protocol: str, method: str, *, every: bool = False) -> dict[str, list[Volume]]:
    """The volumes of each tissue in every patient of a folder, which is segmented now if it was not before.

    Of a tissue that no phantom has, nothing can be said, and it is left out if it is not asked for (``every``).
    """
    wanted = protocols.load(protocol)
    refits = (
        ["--set", f"perturbations={USUAL_COUNT}"] if method == "anatomy" else []
    )  # σ is for patients without a rule
    runner.deepgmm("segment", data, results, "--protocol", wanted.name, "--method", method, *refits, "-q")
    found: dict[str, list[Volume]] = {t.name: [] for t in wanted.tissues}
    for study in discovery.find(data, wanted).studies:
        place = results / study.patient / f"{study.patient}_dseg.json"
        sidecar = runner.read_json(place)
        try:
            reference = nifti.read(place.with_suffix("").with_suffix(".nii.gz"))
            marked = labels.read(study, wanted, sidecar["sequences"], like=reference).labels
        except StudyError as error:
            print(f"left out: {study.patient}: {error}", file=sys.stderr)
            continue
        sequences = tuple(sidecar["sequences"])
        told, known = sidecar["uncertainty"]["volumes"], sidecar["uncertainty"].get("cues") or {}
        cues = Cues(known.get("patient", {}), known.get("tissues", {}))
        mask_ml = sum(one["volume_ml"] for one in told.values())
        for name, one in told.items():
            count = int((marked == wanted.tissue(name).index).sum()) * reference.voxel_ml
            end = None if one["low_ml"] is None else (one["low_ml"], one["high_ml"])
            found[name].append(Volume(name, count, one["volume_ml"], one["sd_ml"], mask_ml, cues, sequences, end))
    return {name: rows for name, rows in found.items() if every or any(row.reference_ml for row in rows)}


def phantoms(
    out: Path, protocol: str, seed: int, number: int, sequences: tuple[str, ...] | None, *, healthy: bool = False
) -> Path:
    """The phantoms of a seed, perhaps with some of their sequences only; or a few healthy ones."""
    options = ["-n", max(round(number * HEALTHY), 1), "--set", "healthy=1"] if healthy else ["-n", number]
    name = f"{protocol}-{seed}{'-healthy' if healthy else ''}"
    whole = runner.phantoms(out / name, *options, "--seed", seed, "--protocol", protocol)
    if sequences is None or len(sequences) == len(protocols.load(protocol).sequences):
        return whole
    part = out / f"{name}-{'-'.join(sequences)}"
    for image in whole.glob("*/*.nii.gz"):
        if not image.name.removesuffix(".nii.gz").endswith((*sequences, "_gd")):
            continue
        place = part / image.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(image.resolve())
    return part


def reaches(rows: Sequence[Volume]) -> tuple[float, float]:
    """How far below and above a volume its interval must reach, in standard deviations.

    Between the i-th and the j-th of n values lies a further one with probability (j − i) / (n + 1): of few values, more
    must be held than of further ones.
    """
    outside = (1 - min(uncertainty.LEVEL * (len(rows) + 1) / max(len(rows) - 1, 1), 1)) / 2
    values = [(r.reference_ml - r.found_ml) / r.sd_ml for r in rows]
    low, high = np.quantile(values, (outside, 1 - outside))
    return round(float(low), 3), round(float(high), 3)


def _by_sd(rows: Sequence[Volume], _healthy: Sequence[Volume]) -> tuple[float, float]:
    return reaches(rows)


def rule(rows: Sequence[Volume], healthy: Sequence[Volume] = (), *, width: Width) -> IntervalRule:
    """The rule of a tissue: slopes by least squares, weighed by how wide the interval is, and the reach that holds.

    Args:
        rows: the volumes to be held.
        healthy: those of patients without infarct: held, too, of what they have; of what they have not, they tell what
            to say where none is found.
        width: how they are held.
    """
    rows, healthy = [*rows, *(r for r in healthy if r.reference_ml)], [r for r in healthy if not r.reference_ml]
    z, usual = _standardised(rows, width.cues)
    target = np.array([np.log((r.reference_ml + LEAST_ML) / (r.found_ml + LEAST_ML)) for r in rows])
    spread = np.array([_spread(row, width) for row in rows])
    weights = spread**-2.0 / np.mean(spread**-2.0)
    mean, middle = float(np.average(target, weights=weights)), np.average(z, axis=0, weights=weights)
    away, left = z - middle, target - mean
    slopes = np.linalg.solve((away.T * weights) @ away + RIDGE * np.eye(z.shape[1]), (away.T * weights) @ left)
    centre = width.share * mean - float(middle @ slopes)
    expected = centre + z @ slopes
    # An interval holds the found volume (a ratio of log 1 = 0), and what lies between that and its middle.
    beyond = np.where(target * (target - expected) <= 0, 0, np.abs(target - expected)) / spread
    absent = np.array([r.reference_ml for r in (*rows, *healthy) if r.found_ml == 0])
    absent_ml = round(_level(absent), 2) if len(absent) >= LEAST_ABSENT else None
    if absent_ml is not None:  # what the ends of the others cannot help
        missed = np.array([r.reference_ml > absent_ml for r in rows])
        beyond = np.where([r.found_ml == 0 for r in rows], np.where(missed, np.inf, 0), beyond)
    reach = _level(beyond)
    weighed = {name: (round(float(b), 4), *u) for (name, u), b in zip(usual.items(), slopes, strict=True)}
    return IntervalRule(
        centre=round(centre, 4),
        cues=weighed,
        doubt=width.doubt,
        at=width.at,
        reach=(round(width.reach[0] * reach, 4), round(width.reach[1] * reach, 4)),
        absent_ml=absent_ml,
    )


def _level(values: Sequence[float] | Array) -> float:
    """What a further value does not exceed with the level's probability."""
    return float(np.quantile(values, min(uncertainty.LEVEL * (len(values) + 1) / len(values), 1)))


def _standardised(rows: Sequence[Volume], cues: Sequence[str]) -> tuple[Array, dict[str, tuple[float, float]]]:
    """Cues in standard deviations (N, C), and of each name what is usual and that deviation.

    A cue that is the same for all says nothing; one that some lack is not weighed.
    """
    told = [row.cues.about(row.tissue) for row in rows]
    known = [n for n in cues if all(n in one for one in told) and np.std([one[n] for one in told]) > LEAST_SPREAD]
    columns = {n: np.array([one[n] for one in told]) for n in known}
    usual = {n: (round(float(v.mean()), 4), round(float(v.std()), 4)) for n, v in columns.items()}
    z = [[interval_rule.standardised(v, *usual[n]) for v in column] for n, column in columns.items()]
    return np.array(z).T.reshape(len(rows), -1), usual


def _spread(row: Volume, width: Width) -> float:
    share = 0.0 if width.doubt is None else interval_rule.doubtful_share(row.cues, width.doubt, row.found_ml)
    return interval_rule.between(share, width.at, width.reach)


def ends(row: Volume, way: IntervalRule | tuple[float, float] | None) -> tuple[float, float]:
    """Those of a volume's interval, in ml; None: those that were told."""
    if way is None:
        return row.told_ml or (np.nan, np.nan)
    if isinstance(way, IntervalRule):
        return uncertainty.held(row.found_ml, *way.ends_ml(row.tissue, row.found_ml, row.cues), mask_ml=row.mask_ml)
    found = uncertainty.interval(row.found_ml, row.sd_ml, way, mask_ml=row.mask_ml)
    return float(found.low_ml or 0), float(found.high_ml or 0)


def checked(rows: Sequence[Volume], way: IntervalRule | tuple[float, float] | None) -> tuple[float, float]:
    """The share of volumes that their intervals hold, and the median width as a share of the true volume."""
    lows, highs = np.array([ends(row, way) for row in rows]).T
    true = np.array([r.reference_ml for r in rows])
    width = (highs - lows) / np.maximum(true, 1e-9)
    return float(((lows <= true) & (true <= highs)).mean()), float(np.median(width))


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates, checks, prints and, if asked to, writes."""
    parser = runner.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--methods", nargs="+", choices=PROTOCOLS, default=["anatomy", "svgmm", "cohort", "pvgmm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 200, 300, 500, 800])
    parser.add_argument("--hearts", type=int, default=120, help="phantoms of each seed")
    parser.add_argument("--brains", type=int, default=24, help="phantoms of each seed")
    parser.add_argument("--score", type=Path, metavar="DIR", help="hearts with reference labels, for scoring only")
    parser.add_argument("--write", action="store_true", help="put what was found into the package")
    asked = parser.parse_args(argv)
    table, ruled = (yaml.safe_load(place.read_text(encoding="utf-8")) or {} for place in (REACHES, RULES))
    print("| method | tissue | held on the other seeds | median widths | patients |\n|---|---|---:|---:|---:|")
    for method in asked.methods:
        protocol = PROTOCOLS[method]
        number = asked.hearts if protocol == "infarct" else asked.brains
        where = Where(asked.out, protocol, method, asked.seeds, number)
        scored = asked.score if protocol == "infarct" else None
        seeds = _of_seeds(where, None)
        found = {name: reaches([row for one in seeds for row in one[name]]) for name in seeds[0]}
        _tell(f"`{method}`, by σ", seeds, dict.fromkeys(found, _by_sd), _scored(asked.out, scored, method, None))
        table.setdefault(protocol, {})[method] = {name: list(reach) for name, reach in found.items()}
        entries = [_entry(where, kind, scored) for kind in RULED.get(method, ())]
        if entries:
            ruled.setdefault(protocol, {})[method] = entries
        if teacher := TAUGHT.get(method):
            _tell(f"`{method}`, as `{teacher}`", seeds, _taught(protocol, teacher, seeds), {})
            ruled.setdefault(protocol, {})[method] = teacher
        if other := OPINION_OF.get(method):
            ways: dict[str, Way] = dict.fromkeys(seeds[0], lambda *_: None)
            _tell(f"`{method}`, as `{other}` tells", seeds, ways, _scored(asked.out, scored, method, None))
            ruled.setdefault(protocol, {})[method] = {"opinion_of": other}
    if asked.write:
        for place, content in ((REACHES, table), (RULES, ruled)):
            _write(place, content)
    return 0


#: From the volumes of one tissue in patients with an infarct and in healthy ones to its interval.
Way = Callable[[Sequence[Volume], Sequence[Volume]], "IntervalRule | tuple[float, float] | None"]
Volumes = dict[str, list[Volume]]


class Where(NamedTuple):
    """Where results lie, of which protocol and method, of which seeds and how many phantoms of each."""

    out: Path
    protocol: str
    method: str
    seeds: Sequence[int]
    number: int


def _of_seeds(where: Where, sequences: tuple[str, ...] | None, *, healthy: bool = False) -> list[Volumes]:
    out, protocol, method, seeds, number = where
    folders = [phantoms(out, protocol, seed, number, sequences, healthy=healthy) for seed in seeds]
    return [volumes(data, out / f"{data.name}-{method}", protocol, method, every=healthy) for data in folders]


def _scored(out: Path, data: Path | None, method: str, kind: Kind | None) -> Volumes:
    """The volumes of patients with reference labels, where there are some: those whose rules are a kind's."""
    if data is None:
        return {}
    found = volumes(data, out / f"{data.name}-{method}", PROTOCOLS[method], method)
    return {name: [r for r in rows if kind is None or _kind(r) is kind] for name, rows in found.items()}


def _kind(row: Volume) -> Kind | None:
    return next((kind for kind in KINDS if set(kind.needs) <= set(row.sequences)), None)


def _entry(where: Where, kind: Kind, scored: Path | None) -> dict[str, Any]:
    """The rules of one kind of patients, after they were checked."""
    seeds = _of_seeds(where, kind.sequences)
    healthy = _of_seeds(where, kind.sequences, healthy=True)
    ways: dict[str, Way] = {name: functools.partial(rule, width=width) for name, width in kind.widths.items()}
    title = f"`{where.method}`, {', '.join(kind.sequences)}"
    _tell(title, seeds, ways, _scored(where.out, scored, where.method, kind), healthy)
    found = {name: way(_of_all(seeds, name), _of_all(healthy, name)) for name, way in ways.items()}
    return {"needs": list(kind.needs), "tissues": {name: _fields(one) for name, one in found.items()}}  # type: ignore[arg-type]


def _taught(protocol: str, teacher: str, seeds: Sequence[Volumes]) -> dict[str, Way]:
    """The rules in the package, whatever the rows."""
    found = interval_rule.rules(protocol, teacher, KINDS[0].sequences)
    return {name: lambda *_, one=found[name]: one for name in seeds[0]}  # type: ignore[misc]


def _fields(found: IntervalRule) -> dict[str, Any]:
    cues = {name: list(numbers) for name, numbers in found.cues.items()}
    return {
        "centre": found.centre,
        "cues": cues,
        "doubt": found.doubt,
        "absent_ml": found.absent_ml,
        "at": list(found.at),
        "reach": list(found.reach),
    }


def _tell(
    title: str, seeds: Sequence[Volumes], ways: Mapping[str, Way], scored: Volumes, healthy: Sequence[Volumes] = ()
) -> None:
    """Prints how each seed's volumes fare with the intervals of the others, and patients with those of all."""
    held: list[float] = []
    for name, way in ways.items():
        found = [way(_of_all(seeds, name, but=i), _of_all(healthy, name, but=i)) for i in range(len(seeds))]
        figures = [checked(one[name], its) for one, its in zip(seeds, found, strict=True)]
        told = [_row(figures)]
        held += [share for share, _ in figures]
        if scored.get(name):
            told.append(_row([checked(scored[name], way(_of_all(seeds, name), _of_all(healthy, name)))]))
        print(f"| {title} | {name} | {' | '.join([*told, ''][:2])} |", flush=True)
        well = [[r for r in one[name] if r.reference_ml] for one in healthy]
        if any(well):
            print(f"| {title} | {name}, healthy | {_row([checked(*one) for one in zip(well, found, strict=True)])} | |")
        elif healthy:
            clear = [row.found_ml == 0 for row in _of_all(healthy, name)]
            print(f"| {title} | {name}, healthy | none found in {sum(clear)} of {len(clear)} | | |")
    print(f"| {title} | all | {np.mean(held):.0%} | | |", flush=True)


def _row(figures: Sequence[tuple[float, float]]) -> str:
    """Shares and widths, in two cells."""
    return " | ".join(", ".join(f"{value:.0%}" for value in values) for values in zip(*figures, strict=True))


def _of_all(seeds: Sequence[Volumes], name: str, *, but: int | None = None) -> list[Volume]:
    """One tissue's volumes of all seeds, perhaps but one."""
    return [row for i, one in enumerate(seeds) if i != but for row in one.get(name, ())]


def _write(place: Path, content: object) -> None:
    comments = [line for line in place.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = yaml.safe_dump(content, default_flow_style=None, sort_keys=True)
    place.write_text("\n".join([*comments, text]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
