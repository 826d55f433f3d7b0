"""The page of agreement with reference labels: by tissue, by case, and in words that a paper can take over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai_deepgmm.images.atomic_files import write_whole
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results import evaluate, markup
from monai_deepgmm.results.agreement import Agreement, Pair, agreement, pairs
from monai_deepgmm.results.evaluate import Evaluation
from monai_deepgmm.results.markup import as_map
from monai_deepgmm.wording import counted

FILE = "agreement.html"
WIDTH, HEIGHT, EDGE = 300.0, 150.0, 8.0
#: Where each way to measure agreement comes from.
MEASURES = (
    "Dice (Dice 1945), the 95th percentile Hausdorff distance (Huttenlocher et al. 1993) and the average symmetric "
    "surface distance"
)
VOLUMES = (
    "limits of agreement (Bland and Altman 1986), Lin's concordance correlation coefficient (Lin 1989) and the "
    "intraclass correlation ICC(A,1) (McGraw and Wong 1996)"
)
MIXTURES = "Gaussian mixture models (Schwab et al. 2024, arXiv:2404.12252)"


class Plot(NamedTuple):
    """A Bland-Altman plot in SVG units.

    Attributes:
        tissue: its name.
        dots: x, y and words of each patient.
        lines: y of the bias and of the limits, as far as known.
        zero: y of no difference.
        least: the smallest mean, in ml, at the left edge.
        most: the largest.
        reach: the largest difference either way, in ml.
    """

    tissue: str
    dots: list[tuple[float, float, str]]
    lines: list[float]
    zero: float
    least: float
    most: float
    reach: float


def write(out: Path, evaluation: Evaluation, protocol: Protocol) -> None:
    """Writes ``agreement.html`` beside the index."""
    write_whole(out / FILE, markup.encoded(page(evaluation, protocol, _sidecars(out, evaluation))))


def page(evaluation: Evaluation, protocol: Protocol, sidecars: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, without any resource outside the file.

    Args:
        evaluation: what was compared.
        protocol: with the tissues' colours.
        sidecars: patient → the sidecar, for what was really used.
    """
    volumes = pairs(evaluation)
    found = {tissue: agreement(v) for tissue, v in volumes.items()}
    return (
        markup.environment()
        .get_template("agreement.html.j2")
        .render(
            title=f"{protocol.title}: agreement",
            evaluation=evaluation,
            numbers=evaluate.as_json(evaluation),
            agreement=found,
            plots=[_plot(tissue, v, found[tissue]) for tissue, v in volumes.items() if len(v) > 1],
            cases=_cases(evaluation, volumes),
            problems={markup.readable(name): problem for name, problem in evaluation.problems.items()},
            colors=markup.colors_of([{"name": t.name, "color": t.color} for t in protocol.tissues], []),
            methods=methods(evaluation, protocol, sidecars),
        )
    )


def methods(evaluation: Evaluation, protocol: Protocol, sidecars: Mapping[str, Mapping[str, Any]]) -> str:
    """What was done, as a paragraph for a paper, from what the sidecars say was used."""

    def used(key: str) -> str:
        values = {json.dumps(s.get(key)): s.get(key) for s in sidecars.values() if s.get(key) is not None}
        words = [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values.values()]
        return " or ".join(sorted(words)) or "not recorded"

    versions = {str(as_map(s.get("versions")).get("monai-deepgmm", "unknown")) for s in sidecars.values()}
    n4 = any(as_map(s.get("bias")).get("rule") == "N4 before the fit" for s in sidecars.values())
    unit = "2-D slice" if evaluation.unit == "slice" else "volume"
    kept = " that hold every tissue in the reference" if evaluation.slices == "complete" else ""
    shading = " Shading was taken off by N4 (Tustison et al. 2010)." if n4 else ""
    return (
        f"{protocol.title}: the images ({used('sequences')}) of {counted(len(evaluation.patients), 'patient')} were "
        f"segmented with monai-deepgmm {', '.join(sorted(versions)) or 'unknown'} (method {used('method')}, seed "
        f"{used('seed')}), by {MIXTURES} on MONAI (Cardoso et al. 2022, arXiv:2211.02701).{shading} "
        f"For each {unit}{kept} we computed "
        f"{MEASURES}; means and standard deviations are over {unit}s, and those in which neither labelling holds a "
        f"tissue were not counted for it. Volumes, per patient over the same {unit}s, were compared by {VOLUMES}. "
        f"{counted(len(evaluation.problems), 'patient')} could not be compared."
    )


def _plot(tissue: str, volumes: Sequence[Pair], found: Agreement) -> Plot:
    """Mean of both against software minus reference."""
    means = [(p.predicted_ml + p.true_ml) / 2 for p in volumes]
    differences = [p.predicted_ml - p.true_ml for p in volumes]
    limits = [v for v in (found.bias, found.low, found.high) if math.isfinite(v)]
    reach = max(map(abs, [*differences, *limits])) or 1.0
    least, most = min(means), max(means)

    def x(value: float) -> float:
        return round(EDGE + (WIDTH - 2 * EDGE) * (value - least) / ((most - least) or 1.0), 1)

    def y(value: float) -> float:
        return round(HEIGHT / 2 - (HEIGHT / 2 - EDGE) * value / reach, 1)

    told = [f"{markup.readable(p.patient)}: {p.predicted_ml:.1f} ml, reference {p.true_ml:.1f} ml" for p in volumes]
    dots = [(x(m), y(d), words) for m, d, words in zip(means, differences, told, strict=True)]
    return Plot(tissue, dots, [y(v) for v in limits], y(0.0), least, most, reach)


def _cases(evaluation: Evaluation, volumes: Mapping[str, Sequence[Pair]]) -> list[dict[str, Any]]:
    """Each patient's Dice and differences, worst first; those without any Dice last."""
    numbers = evaluate.as_json(evaluation)["patients"]
    difference = {(p.patient, tissue): p.predicted_ml - p.true_ml for tissue, v in volumes.items() for p in v}
    cases = [
        {
            "patient": markup.readable(name),
            "link": f"{markup.quoted(name)}/{markup.quoted(name)}_report.html",
            "dice": found["dice"],
            "difference": {tissue: difference.get((name, tissue)) for tissue in evaluation.tissues},
            "warnings": found["warnings"],
        }
        for name, found in numbers.items()
    ]
    return sorted(cases, key=lambda c: (c["dice"]["mean"] is None, c["dice"]["mean"] or 0.0, c["patient"]))


def _sidecars(out: Path, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    found = {}
    for name in evaluation.patients:
        try:
            found[name] = as_map(json.loads((out / name / f"{name}_dseg.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return found
