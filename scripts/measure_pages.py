"""What pages cost: seconds and bytes of a patient's, and of a cohort's with a thousand patients.

    python scripts/measure_pages.py DIR OUT [--protocol brain] [--patients 5] [--index 1000]

Segments patients of DIR and draws their pages again: CPU seconds from a finished segmentation to its pictures and its
page, and the page's size. Their rows, under other names, make an index; where there is a browser (Debian's chromium) it
opens and sorts it. Medians of ``--repeats`` runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import browser
import runner

from monai_deepgmm.methods import config
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import report
from monai_deepgmm.results.pictures import pictures
from monai_deepgmm.results.segment import segment

OPENED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
SORTED = (
    "new Promise(done => { const t = performance.now();"
    " document.querySelectorAll('#patients thead button')[{k}].click();"
    " requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - t))); })"
)


def median_s(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return statistics.median(took)


def patient(study: Study, made: config.Config, out: Path, repeats: int) -> str:
    """One patient's line."""
    segmentation = segment(study, made)
    drawing = median_s(lambda: pictures(study, segmentation), repeats)
    folder, page = out / study.patient, out / study.patient / f"{study.patient}_report.html"

    def write() -> None:
        page.unlink(missing_ok=True)
        report.rebuild_patient(folder)

    writing, kb = median_s(write, repeats), page.stat().st_size / 1000
    return f"| {study.patient} | {drawing + writing:.3f} | {drawing:.3f} | {writing:.3f} | {kb:.0f} |"


def many(out: Path, count: int, there: Path) -> None:
    """The rows and thumbnails of OUT's patients under so many names."""
    done = [folder for folder in sorted(out.iterdir()) if (folder / f"{folder.name}_row.json").is_file()]
    for number in range(count):
        source = done[number % len(done)]
        (folder := there / f"patient{number:04d}").mkdir(parents=True)
        row = runner.read_json(source / f"{source.name}_row.json")
        row["patient"] = folder.name
        for line in row.get("measurements", ()):
            line["volume_ml"] *= 1 + number % 97 / 97
        (folder / f"{folder.name}_row.json").write_text(json.dumps(row), encoding="utf-8")
        shutil.copyfile(source / f"{source.name}_thumb.png", folder / f"{folder.name}_thumb.png")


def index(out: Path, count: int, repeats: int) -> str:
    """The index's line."""
    with tempfile.TemporaryDirectory() as work:
        there = Path(work) / "out"
        many(out, count, there)
        made, page = median_s(lambda: report.rebuild_index(there), 1), there / "index.html"
        told = f"index of {count}: {page.stat().st_size / 1000:.0f} kB, {made:.2f} CPU s to make"
        if browser.program() is None:
            return f"{told}; no browser here"
        tab = browser.Browser(Path(work))
        opened, sorts = [], []
        for _ in range(repeats):
            tab.open(page.as_uri())
            opened.append(tab.run(OPENED) / 1000)
            sorts += [tab.run(SORTED.replace("{k}", str(k))) / 1000 for k in (0, 1, 2, 3)]
        tab.close()
        return f"{told}; opens in {statistics.median(opened):.2f} s, sorts in {statistics.median(sorts):.2f} s (wall)"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = runner.parser(__doc__)
    parser.add_argument("DIR", type=Path)
    parser.add_argument("OUT", type=Path)
    parser.add_argument("--protocol", default="infarct")
    parser.add_argument("--patients", type=int, default=5)
    parser.add_argument("--index", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args(argv)
    return runner.ended("measure_pages", lambda: run(asked))


def run(asked: argparse.Namespace) -> int:
    """Segments, draws, prints."""
    made = config.build(protocol=asked.protocol)
    studies = discovery.find(asked.DIR, made.protocol).studies[: asked.patients]
    names = [study.patient for study in studies]
    runner.deepgmm("segment", asked.DIR, asked.OUT, "--protocol", asked.protocol, "--patients", *names, "-q")
    print("| patient | CPU s | of it pictures | page | kB |\n|---|---:|---:|---:|---:|")
    for study in studies:
        print(patient(study, made, asked.OUT, asked.repeats), flush=True)
    print(f"\n{index(asked.OUT, asked.index, asked.repeats)}")
    print(f"\n{runner.machine_line(runner.machine())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
