"""Text files that are wrong, as commands meet them: refused with place and reason, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import models
import pytest

from monai_deepgmm import cli, protocol, schema
from monai_deepgmm.cli import main
from monai_deepgmm.patients.layout import Layout

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
LAYOUT = "images: ['{patient}_{sequence}']\nsequences: {LGE: [LGE]}\n"
MEANS = {"protocol": "infarct", "normalisation": models.INFARCT.normalisation, "n_slices": 1, "means": {}}

#: What any YAML file can hold, and the words that the refusal must bear.
ANY = {
    "empty": (b"", "expected keys with values"),
    "binary": (bytes(range(256)) * 4, "is not UTF-8"),
    "a zero byte": (b"name: \0", "is no text file"),
    "Latin-1": ("title: x\nname: Ödem".encode("latin-1"), "line 2: is not UTF-8; save the file as UTF-8"),
    "a control character": (b"title: \x1b[31m", r"line 1: the character 27 is not allowed"),
    "deep": (b"name: " + b"[" * 100_000, "line 1: nested more than 12 deep"),
    "deep blocks": (b"".join(b" " * n + b"a:\n" for n in range(200)), "line 12: nested more than 12 deep"),
    "laughs": (LAUGHS.encode(), "line 2: aliases (*name) are not read"),
    "itself": (b"a: &a [*a]", "line 1: aliases"),
    "a tag": (b"name: !!python/object/apply:os.system ['true']", "line 1: could not determine a constructor"),
    "twice": (b"title: a\ntitle: b", "line 2: 'title' stands there twice"),
    "no key": (b"{[a]: b}", "line 1: found unhashable key"),
    "huge number": (b"title: " + b"9" * 5000, "cannot be read as YAML"),
    "huge hexadecimal": (b"title: 0x" + b"f" * 9000, "line 1: title: got a number of very many digits"),
    "a date": (b"title: 2020-13-45", "cannot be read as YAML (month must be in 1..12"),
    "large": (b"# " + b"x" * (1 << 17), "has more than 131072 bytes; is it the right file?"),
    "two documents": (b"title: a\n---\ntitle: b", "line 2: but found another document"),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("text") / "in"
    make_patient(folder, "pat1")
    return folder


def refused(capsys, cohort: Path, *options: object) -> str:
    """What ``segment`` says on one line of what it refuses, within the time that a test has."""
    out = cohort.parent / "out"
    assert main(["segment", str(cohort), str(out), *map(str, options)]) == cli.USAGE
    said = capsys.readouterr().err
    assert said.startswith("deepgmm: ")
    assert said.count("\n") == 1
    assert not out.exists()
    return said


@pytest.mark.parametrize("option", ["--protocol", "--layout"])
@pytest.mark.parametrize("case", ANY)
def test_yaml_that_is_no_such_file(cohort, tmp_path, capsys, option, case):
    content, words = ANY[case]
    (tmp_path / "own.yaml").write_bytes(content)
    said = refused(capsys, cohort, option, tmp_path / "own.yaml")
    assert f"{option} {tmp_path / 'own.yaml'}" in said
    assert words in said


def test_what_is_no_file_is_refused_unread(cohort, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml", "gone.yaml"):
        assert f"there is no file {tmp_path / name}" in refused(capsys, cohort, "--protocol", tmp_path / name)


def test_a_mark_of_the_byte_order_and_utf16_are_read(tmp_path):
    text = protocol.as_yaml(models.INFARCT)
    for codec in ("utf-8-sig", "utf-16"):
        (tmp_path / "own.yaml").write_bytes(text.encode(codec))
        assert protocol.load(tmp_path / "own.yaml") == models.INFARCT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("sequences:", "sequenzes:"), "sequenzes: no such key (did you mean sequences?)"),
        (("index: 3", "index: 1"), "tissues: indices must differ"),
        (("index: 3", "index: 3.5"), "tissues[2].index: got 3.5, expected a whole number in 1-255"),
        (("index: 3", "index: true"), "tissues[2].index: got True"),
        (("name: edema", "name: Blood"), "tissues: names must differ"),
        (("name: edema", 'name: "a\\tb"'), "tissues[2].name: got 'a\\tb', expected a name"),
        (("name: edema", "name: 7"), "tissues[2].name: got 7, expected a name (text of up to 40 letters, in quotes"),
        (("merges_into: myocardium", "merges_into: scar"), "merges_into of edema leads round in a circle"),
        (("merges_into: myocardium", "merges_into: myocard"), "'myocard' is unknown (did you mean myocardium?)"),
        (("bright\n", "brigt\n"), "signature.bSSFP: got 'brigt'"),
        (("density_g_per_ml: 1.05", "density_g_per_ml: .inf"), "density_g_per_ml: got inf, expected a number above 0"),
        (("share: 0.2\n", "share: 1e400\n"), "tissues[2].share: got inf"),
        (("size: 4.25", "size: nan"), "tissues[2].evidence.size: got 'nan', expected a number"),
        (("color: '#58c98b'", "color: yellow"), "tissues[2].color: got 'yellow', expected a color such as"),
        (("T2", "Mask"), "sequences: mask is what a column of a manifest is called"),
        (("required: []", "required: [T1]"), "required: 'T1' is unknown; choose of LGE, T2, bSSFP"),
        (("crop_mm: 120", "crop_mm: 0"), "normalisation.crop_mm: got 0, expected a number from 1 to 10000, or null"),
    ],
)
def test_a_protocol_that_does_not_fit_together(cohort, tmp_path, capsys, change, words):
    text = protocol.as_yaml(models.INFARCT)
    text = text.replace("bSSFP: 0.75", "bSSFP: bright")
    assert change[0] in text
    (tmp_path / "own.yaml").write_text(text.replace(*change))
    said = refused(capsys, cohort, "--protocol", tmp_path / "own.yaml")
    assert words in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("patient: '(a+)+b'", "line 3: patient: a repeated group is not taken; repeat single characters"),
        ("patient: '(a|a)*b'", "a repeated group is not taken"),
        ("patient: 'a*a*a*a*b'", "has 4 repeats, expected at most 2"),
        ("patient: '(?P<x>a)\\1+'", "a repeated group is not taken"),
        ("patient: '('", "is no regular expression (missing )"),
        ("mask: ['*a*b*c*{patient}']", "two * in a name"),
        ("mask: ['**/**/**/{patient}']", "at most two **/"),
        ("mask: '{patient}'", "mask: got '{patient}', expected a list"),
        ("mask_labels: [a]", "mask_labels[0]: got 'a', expected a number"),
        ("tissues: {blood: 1}", "tissues.blood: the key: got 'blood', expected a label's value"),
        ("words: {masks: [a]}", "words.masks: no such key (did you mean mask?)"),
    ],
)
def test_a_layout_that_does_not_fit_together(cohort, tmp_path, capsys, more, words):
    (tmp_path / "own.yaml").write_text(LAYOUT + more)
    assert words in refused(capsys, cohort, "--layout", tmp_path / "own.yaml")


def test_a_pattern_of_the_most_that_is_taken_is_matched_at_once(tmp_path, capsys):
    """The worst name for it, which has 255 letters: repeated groups would be busy with it for years."""
    own = "images: ['*_{patient}*_{sequence}']\nsequences: {LGE: [LGE]}\npatient: '[^/_]*[^/]*'"
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{'_a' * 120}.nii.gz").write_bytes(b"")
    assert main(["scan", str(tmp_path / "in"), "--layout", str(tmp_path / "own.yaml")]) == cli.USAGE
    assert "no patient found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1: Expecting value"),
        (b"\xff\xfe\xfd", "is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"n_slices": NaN}', "NaN is no number"),
        (b'{"n_slices": 1, "n_slices": 2}', "a key stands there twice"),
        (json.dumps(MEANS | {"means": []}).encode(), "means: got [], expected keys with values"),
        (
            json.dumps(MEANS | {"means": {"blood": {"LGE": "1"}}}).encode(),
            "means.blood.LGE: got '1', expected a number",
        ),
        (json.dumps(MEANS | {"means": {"blood": {"LGE": 10**400}}}).encode(), "means.blood.LGE: got 1000"),
        (json.dumps({k: v for k, v in MEANS.items() if k != "means"}).encode(), "'means' is missing"),
    ],
)
def test_means_that_are_none(cohort, tmp_path, capsys, content, words):
    (tmp_path / "means.json").write_bytes(content)
    said = refused(capsys, cohort, "--means", tmp_path / "means.json", "--method", "svgmm")
    assert words in said
    assert "deepgmm means" in said


@pytest.mark.parametrize("text", ["{a: 1}", "[[1]]", "2020-01-01", "!!set {a}", "[" + "1," * 40 + "1]", "1" * 5000])
def test_a_setting_is_a_number_a_word_or_a_list_of_those(cohort, capsys, text):
    assert "max_iter" in refused(capsys, cohort, "--set", f"max_iter={text}")


def test_tables_name_the_keys_that_are_read():
    """What is added to a layout or a protocol is added to its table too."""
    assert set(schema.table("layout")["properties"]) == {f.name for f in dataclasses.fields(Layout)} - {"name"}
    renamed = {"crop_mm": "normalisation", "percent_name": "percent_of"}
    own = {renamed.get(f.name, f.name) for f in dataclasses.fields(protocol.Protocol)}
    assert set(schema.table("protocol")["properties"]) == own - {"settings"}
    tissue = {f.name for f in dataclasses.fields(protocol.Tissue)} - {"criteria"} | {"evidence"}
    assert set(schema.table("protocol")["$defs"]["tissue"]["properties"]) == tissue
