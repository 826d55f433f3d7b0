"""The picture and the pages: right way up, self-contained, safe with hostile names, rebuilt from files alone."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import LPS, OBLIQUE, failed, hearts, page_of, row_of, write
from PIL import Image, ImageColor

from monai_deepgmm.errors import UsageError
from monai_deepgmm.results import markup, measure, mosaic, report, tiles

HOSTILE = "<script>alert('owned')</script>\"&"


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.split("</head>")[1]))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def near(picture: np.ndarray, color: str, tolerance: int = 6) -> np.ndarray:
    wanted = np.array(ImageColor.getrgb(color))
    return np.abs(picture.astype(int) - wanted).max(axis=-1) <= tolerance


@pytest.mark.parametrize(
    ("affine", "slice_axis", "edges", "plane"),
    [
        (np.eye(4), 2, ("R", "L", "A", "P"), "axial"),
        (LPS, 2, ("R", "L", "A", "P"), "axial"),
        (np.eye(4), 1, ("R", "L", "S", "I"), "coronal"),
        (np.eye(4), 0, ("A", "P", "S", "I"), "sagittal"),
        (np.eye(4)[[2, 0, 1, 3]], 0, ("R", "L", "S", "I"), "coronal"),
        (OBLIQUE, 2, ("RA", "LP", "AL", "PR"), "axial"),  # two letters
    ],
)
def test_slices_are_shown_the_radiological_way(affine, slice_axis, edges, plane):
    view = mosaic.view(affine, slice_axis)
    assert (view.edges, mosaic.PLANE_NAMES[view.plane]) == (edges, plane)


def test_upright_puts_the_patients_right_on_the_left_and_anterior_on_top():
    volume = np.zeros((4, 5, 3))
    volume[3, 4, 1] = 1  # identity affine: the right-most, most anterior corner
    upright = mosaic.view(np.eye(4), 2).upright(volume)
    assert upright.shape == (3, 5, 4)
    assert upright[1, 0, 0] == 1


def test_a_row_per_slice_with_mask_and_a_column_per_panel():
    one, three = (pixels(report.preview(hearts(sequences=s))) for s in (("LGE",), ("LGE", "T2", "bSSFP")))
    # Columns: sequences, tissues, unsure, 4 pixels apart. Tiles show the mask's 31 × 31 voxels with a margin of 10,
    # which the image's 48 rows cut to 51 × 48.
    tile = (three.shape[1] - 34) / 5 - 4
    assert (one.shape[1] - 34) / 3 - 4 > tile  # fewer panels are shown larger
    assert three.shape[0] == pytest.approx(24 + 3 * (tile * 48 / 51 + 4), abs=3)


def test_a_slice_is_not_squashed_when_voxels_are_not_square():
    tall = LPS @ np.diag([1.0, 3.0, 8.0, 1.0])
    picture = pixels(report.preview(hearts(affine=tall)))
    blood = near(picture, "#8c1c3a", 12)
    rows, columns = np.flatnonzero(blood.any(axis=1)), np.flatnonzero(blood.any(axis=0))
    third = rows[rows < rows[0] + (rows[-1] - rows[0]) / 3]  # the first slice's pool: 17 voxels either way
    assert np.ptp(third) / np.ptp(columns) == pytest.approx(3, rel=0.1)


def test_tissues_and_uncertainty_bear_their_colours():
    sure = hearts()
    picture, light = pixels(report.preview(sure)), tiles.UNCERTAINTY_COLORS[-1]
    for tissue in sure.tissues:
        assert near(picture, tissue.color).any() == (tissue.name != "scar")  # no voxel is scar
    assert not near(picture, light).any()
    even = dataclasses.replace(sure, probabilities=np.where(sure.mask, 0.25, 0).astype(np.float32)[None].repeat(4, 0))
    assert near(pixels(report.preview(even)), light).sum() > 5000  # light where all tissues are equally likely


def test_a_brain_is_shown_in_three_orientations():
    brain = hearts(name="brain", sequences=("T1",))
    picture = pixels(report.preview(brain))
    titles = [b.title for b in (mosaic._block(brain, axis, 8) for axis in mosaic._by_plane(brain))]
    assert titles == ["axial", "coronal", "sagittal"]
    assert picture.shape[1] <= 1120


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7.0])
def test_odd_intensities_do_not_stop_the_picture(value: float):
    odd = hearts()
    odd.images["T2"][...] = np.where(odd.mask, 7.0, value)
    assert pixels(report.preview(odd)).size


def test_page_tells_volumes_warnings_naming_fit_and_provenance_and_is_self_contained():
    html = page_of(hearts())
    assert not re.search(r"(src|href)=[\"']?(https?:|//)|url\(|@import|<script src|<link", html)
    assert html.count("<script>") == 1
    assert "data:image/png;base64," in html
    assert "default-src 'none'" in html
    blood = measure.measure(hearts())[0]
    told = words(html)
    for text in (
        "W_QFORM the sform was used",
        "by signature",
        "88 % 2.500 3 no",  # slice 1: certainty, NLL, steps, converged
        "ab" * 32,
        "Research use only, not a medical device",
        f"blood {blood.volume_ml:.1f} {blood.mass_g:.1f} – {blood.expected_ml:.1f}",
    ):
        assert text in told


@pytest.mark.parametrize(
    ("unit", "shown"),
    [
        ({"slice": 1, "nll": 2.5}, "2.500 – –"),  # a trained network's
        ({"slice": 1, "nll": 2.5, "converged": None, "iterations": None, "trace": None}, "2.500 – –"),
        ({"slice": 1, "converged": True, "iterations": 7}, "– 7 yes"),
        ({"slice": 1}, "– – –"),
    ],
    ids=str,
)
def test_a_page_shows_a_dash_for_what_no_fit_told(unit, shown):
    heart = hearts()
    heart.sidecar.update(converged=None, presence=None, fit={"units": [unit]})
    told = words(page_of(heart))
    assert f"88 % {shown}" in told
    assert "None" not in told


def test_myocardium_is_called_healthy_where_edema_is_told_apart():
    assert "healthy myocardium" in words(page_of(hearts()))
    assert "healthy" not in words(page_of(hearts(sequences=("LGE",))))


def test_a_page_tells_the_ends_of_the_curve_and_how_sure_guessed_names_are():
    heart = hearts()
    heart.sidecar["fit"] = {"units": [{"slice": 1, "nll": 2.5, "trace": [2.75, 2.5, 2.625]}]}
    told = words(page_of(heart))
    assert "2.750 to 2.625" in told  # it rises in the end, and says so
    assert "Certainty of the names: 90 %" in told
    heart.sidecar["naming"] = {"rule": "fixed", "certainty": None, "units": [{"slice": 1, "certainty": None}]}
    assert "Certainty" not in words(page_of(heart))


def test_slices_that_the_picture_leaves_out_are_said():
    heart = hearts()
    assert "not shown" not in words(page_of(heart))
    heart.sidecar["coverage"] = {"slices": 30}
    assert "24 of 30 slices with mask, evenly spaced; the others are not shown" in words(page_of(heart))
    heart.sidecar["fit"] = {"units": [{"slice": None, "nll": 2.5}]}
    heart.sidecar["naming"] = {}
    told = words(page_of(heart, slices=[]))
    assert "8 evenly spaced slices in each of three orientations" in told


def test_what_is_flagged_is_in_the_table_of_codes():
    table = (Path(__file__).parents[2] / "bundle" / "docs" / "codes.md").read_text(encoding="utf-8")
    assert [code for code in markup.SERIOUS if f"`{code}`" not in table] == []


def test_a_failed_patients_page_says_what_to_do():
    html = report.page(failed("p"), None, [], None)
    assert "E_GZIP" in html
    assert "x_T2.nii.gz: cut &lt;short&gt;" in html
    assert "Copy it again" in html
    assert "data:image" not in html


def test_a_mask_that_was_found_has_no_file():
    found = {"rule": "found from the images", "confidence": 0.875}
    row = {"patient": "sub-1", "status": "ok"}
    shown = report.page(row, hearts().sidecar | {"inputs": {"mask": found}}, [], None)
    assert "<dt>mask</dt><dd>found from the images, with confidence 0.88</dd>" in shown


def test_hostile_text_is_escaped_everywhere():
    heart = hearts(HOSTILE)
    heart.sidecar.update(method=HOSTILE, sequences=[HOSTILE], versions={HOSTILE: HOSTILE}, configuration=HOSTILE)
    heart.sidecar["naming"]["rule"] = HOSTILE
    heart.sidecar["tissues"][0]["color"] = "red;background:url(x)"
    html = page_of(heart, warnings=[f"W_X: {HOSTILE}"], message=HOSTILE)
    rows = [m._asdict() for m in measure.measure(heart)]
    cohort = report.index([row_of(heart), failed(HOSTILE)], rows, HOSTILE)
    for text in (html, cohort, report.page(failed(HOSTILE, message=HOSTILE, remedy=HOSTILE), None, [], None)):
        assert "alert(" in text
        assert "<script>alert" not in text
        assert "url(" not in text
    assert 'href="%3Cscript%3Ealert%28%27owned%27%29%3C%2Fscript%3E%22%26/' in cohort


@pytest.mark.parametrize(
    "sidecar",
    [
        None,
        {},
        {"naming": None, "fit": [], "mixture": {"units": [None]}, "tissues": "x", "inputs": {}},
        {"fit": {"units": [{"slice": None, "nll": float("nan"), "trace": [float("inf"), 1.0]}, 3]}},
        {"naming": {"units": [{"slice": 2}, {"slice": None}]}},
    ],
)
def test_a_sparse_sidecar_only_leaves_parts_out(sidecar):
    assert "sub-1" in report.page({"patient": "sub-1", "status": "ok"}, sidecar, [], None)


def test_an_id_that_is_no_utf8_can_be_shown():
    name = b"sub-\xff".decode("utf-8", "surrogateescape")
    assert 'href="sub-%FF/sub-%FF_report.html"' in report.index([failed(name)], [], "t")
    report.page(failed(name), None, [], None).encode("utf-8")


def test_index_counts_and_puts_the_failed_first():
    heart = hearts("a")
    rows = [row_of(heart), failed("z"), row_of(hearts("b"), warnings=[]), failed("y", status="skipped")]
    html = report.index(rows, [m._asdict() for m in measure.measure(heart)], "Cohort")
    counts = dict(reversed(pair) for pair in re.findall(r"<b>(\d+)</b>\W*(\w+)", html))
    assert counts == {"patients": "4", "flagged": "0", "processed": "2", "failed": "1", "skipped": "1", "with": "1"}
    table = html[html.index('id="patients"') :]
    order = re.findall(r'<td class="name">.*?>?([abyz])<', table)
    assert order == ["z", "y", "a", "b"]
    assert "Copy it again" in html
    assert 'href="summary.tsv"' in html
    assert 'href="measurements.tsv"' in html


def test_who_failed_for_one_reason_stands_in_one_line():
    rows = [failed(f"p{number:02d}") for number in range(23)] + [failed("other", message="x_LGE.nii.gz: cut")]
    above, _, table = report.index(rows, [], "t").partition('<table id="patients"')
    assert above.count("x_T2.nii.gz: cut &lt;short&gt;") == above.count("x_LGE.nii.gz: cut") == 1
    assert "p07</strong></a> and 15 more" in above
    assert table.count(">E_GZIP<") == 24  # so that the search finds all of them


def test_bars_share_one_scale():
    volumes = [
        {"patient": p, "tissue": "blood", "volume_ml": v, "percent": None} for p, v in (("a", 50.0), ("b", 200.0))
    ]
    html = report.index([{"patient": p, "status": "ok"} for p in "ab"], volumes, "t")
    assert re.findall(r'<i class="t0" style="width:([\d.]+)%', html) == ["100.0", "25.0"]  # the largest first


def test_rebuild_is_idempotent_and_reads_files_alone(tmp_path):
    heart = hearts("sub 1 é")
    folder = write(tmp_path, row_of(heart), heart)
    write(tmp_path, failed("bad"))
    (tmp_path / ".refused").mkdir()
    (tmp_path / ".refused" / "1.json").write_text(json.dumps(failed("../up", code="E_ID")))
    assert report.rebuild(tmp_path) == 2
    first = {f: f.read_bytes() for f in tmp_path.rglob("*.html")}
    assert {f.name for f in first} == {"sub 1 é_report.html", "bad_report.html", "index.html"}
    assert report.rebuild(tmp_path) == 2
    assert {f: f.read_bytes() for f in tmp_path.rglob("*.html")} == first

    cohort = first[tmp_path / "index.html"].decode()
    links = re.findall(r'href="([^"]+_report.html)"', cohort)
    assert set(links) == {"sub%201%20%C3%A9/sub%201%20%C3%A9_report.html", "bad/bad_report.html"}
    assert "../up" in cohort
    page = folder / "sub 1 é_report.html"
    assert b"data:image/png" in first[page]

    (folder / "sub 1 é_row.json").write_text(json.dumps(failed("sub 1 é")))  # who fails shows no older result
    report.rebuild(tmp_path)
    assert "data:image" not in page.read_text(encoding="utf-8")
    assert "by signature" not in page.read_text(encoding="utf-8")


def test_one_broken_row_does_not_hide_the_others(tmp_path):
    write(tmp_path, failed("a", code="E_DIM"))
    folder = write(tmp_path, failed("b"))
    (folder / "b_row.json").write_text('{"patient": "b", ')
    assert report.rebuild(tmp_path) == 2
    cohort = (tmp_path / "index.html").read_text()
    assert "E_DIM" in cohort
    assert "b_row.json" in cohort
    assert "run deepgmm segment again" in cohort
    assert str(tmp_path) not in cohort


def test_rebuild_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(UsageError, match="no results"):
        report.rebuild(tmp_path)
    assert not list(tmp_path.iterdir())


def test_colours_of_the_index_follow_the_written_table(tmp_path):
    heart = hearts("p")
    write(tmp_path, row_of(heart), heart)
    (tmp_path / "dseg.tsv").write_text("index\tname\tcolor\n1\tblood\t#123456\n2\tmyocardium\turl(x)\n")
    report.rebuild(tmp_path)
    cohort = (tmp_path / "index.html").read_text()
    assert "background-color: #123456" in cohort
    assert "url(" not in cohort
