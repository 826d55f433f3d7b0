"""Files under OUT that someone has damaged, moved or locked, and names that would harm a terminal or a table."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import row, sidecar
from test_batch import full_when

from monai_deepgmm import __main__ as entry
from monai_deepgmm import cli
from monai_deepgmm.cli import main
from monai_deepgmm.images import atomic_files

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_patient) -> tuple[Path, Path]:
    """Two patients and their results, to be copied."""
    base = tmp_path_factory.mktemp("made")
    for number in (1, 2):
        make_patient(base / "in", f"pat{number}", seed=number)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("monai_deepgmm.results.report.preview", lambda segmentation: b"no picture")
        assert main(["segment", str(base / "in"), str(base / "out")]) == 0
    return base / "in", base / "out"


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def summary(out: Path) -> dict[str, list[str]]:
    text = (out / "summary.tsv").read_bytes().decode("utf-8", "surrogateescape")
    return {line.split("\t")[0]: line.split("\t")[1:] for line in text.split("\n")[1:-1]}


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2]], ids=["zero bytes", "half"])
@pytest.mark.parametrize("what", ["dseg.nii.gz", "dseg.json"])
def test_a_result_that_is_not_what_was_written_is_made_again(made, out, what, damage):
    path = out / "pat1" / f"pat1_{what}"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    other = (out / "pat2" / "pat2_row.json").stat().st_mtime_ns
    assert main(["segment", str(made[0]), str(out)]) == 0
    assert path.read_bytes() == whole
    assert (out / "pat2" / "pat2_row.json").stat().st_mtime_ns == other


def everywhere(value: object, odd: object) -> list[object]:
    """Copies of a JSON value, each with one part of it replaced."""
    if isinstance(value, dict):
        changed = [{**value, key: new} for key in value for new in everywhere(value[key], odd)]
        return [odd, *changed]
    return [odd]


@pytest.mark.parametrize("odd", [None, 7, "text", [1], {"a": {}}], ids=repr)
def test_a_damaged_sidecar_or_row_spoils_no_report(out, odd):
    file, found = out / "pat1" / "pat1_dseg.json", sidecar(out)
    for damaged in everywhere(found, odd)[:: 3 if odd is None else 7]:
        file.write_text(json.dumps(damaged))
        assert main(["report", str(out)]) == 0
    file.write_text("{")
    for damaged in everywhere(row(out), odd)[1:]:
        (out / "pat1" / "pat1_row.json").write_text(json.dumps(damaged))
        assert main(["report", str(out)]) == 0
        assert summary(out)["pat2"][0] == "ok"
    (out / "pat1" / "pat1_row.json").write_text("{")
    assert main(["report", str(out)]) == 0
    assert summary(out)["pat1"][:2] == ["failed", "E_FILE"]


def test_a_missing_sidecar_is_told_on_the_page(out):
    (out / "pat1" / "pat1_dseg.json").unlink()
    assert main(["report", str(out)]) == 0
    assert "W_SIDECAR" in (out / "pat1" / "pat1_report.html").read_text(encoding="utf-8")


def test_an_id_that_begins_like_the_refused_ones_is_in_the_tables(made, tmp_path):
    folder = Path(shutil.copytree(made[0], tmp_path / "in"))
    for path in folder.glob("pat1_*"):
        path.rename(path.with_name(path.name.replace("pat1", ".refused-1")))
    manifest = folder / "m.csv"
    manifest.write_text("patient,LGE,T2,mask\n.refused-1,.refused-1_LGE.nii.gz,.refused-1_T2.nii.gz,pat2_gd.nii.gz\n")
    labels = ("--mask-labels", "200", "500", "1220", "2221")
    assert main(["segment", str(folder), str(tmp_path / "out"), "--manifest", str(manifest), *labels]) == 0
    assert summary(tmp_path / "out")[".refused-1"][0] == "ok"


def test_a_folder_that_cannot_be_written_keeps_no_older_ok(made, out, tmp_path, monkeypatch):
    write = atomic_files._write_beside

    def denied(path: Path, data: bytes) -> None:
        if path.parent.name == "pat1":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        write(path, data)

    again = ["segment", str(made[0]), str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(atomic_files, "_write_beside", denied)
        patched.setattr("monai_deepgmm.results.outputs.clear", lambda *_: None)  # nor can anything be removed
        assert main([*again, "--set", "max_iter=9"]) == 1
    assert summary(out)["pat1"][:2] == ["failed", "E_WRITE"]
    assert main(["report", str(out)]) == 0
    assert summary(out)["pat1"][:2] == ["failed", "E_WRITE"]
    assert main(again) == 0
    assert summary(out)["pat1"][0] == "ok"
    assert not list((out / ".refused").iterdir())


@pytest.mark.parametrize("place", [".", "below"])
def test_a_patients_folder_that_is_a_link_into_the_input_is_refused(made, tmp_path, place, capsys):
    folder = Path(shutil.copytree(made[0], tmp_path / "in"))
    (folder / "below").mkdir()
    before = sorted(folder.rglob("*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pat1").symlink_to(folder / place)
    assert main(["segment", str(folder), str(tmp_path / "out")]) == cli.USAGE
    assert "input folder" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_what_a_stopped_writer_left_does_not_outlive_a_full_disk(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "pat2").mkdir(parents=True)
    label = out / "pat2" / "pat2_dseg.nii.gz"  # of another job's, which was ended before it wrote the row
    label.write_bytes(b"label")
    full_when(monkeypatch, "pat1_dseg.nii.gz")
    assert main(["segment", str(made[0]), str(out)]) == cli.DISK_FULL
    assert not label.exists()


def bad_bytes(folder: Path) -> None:
    for path in folder.glob("pat1_*"):
        os.rename(path, os.fsencode(path).replace(b"pat1", b"p\xff"))


def test_evaluate_takes_a_name_that_is_not_utf_8(made, tmp_path, capsys):
    folder, out = Path(shutil.copytree(made[0], tmp_path / "in")), tmp_path / "out"
    try:
        bad_bytes(folder)
    except OSError:
        pytest.skip("this file system takes only text")
    assert main(["segment", str(folder), str(out), "--patients", "p\udcff"]) == 0
    assert main(["evaluate", str(out), str(folder)]) == 1
    assert b"p\xff\t" in (out / "evaluation.tsv").read_bytes()
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert (list(found["patients"]), list(found["problems"])) == (["p\udcff"], ["pat2"])


@pytest.mark.parametrize("command", ["scan", "segment", "dry run"])
def test_control_characters_of_ids_reach_no_terminal_log_or_table(made, tmp_path, capsys, command):
    folder, out = Path(shutil.copytree(made[0], tmp_path / "in")), tmp_path / "out"
    for path in folder.glob("pat1_*"):
        path.rename(path.with_name(path.name.replace("pat1", "a\x1b[31m\nb")))
    given = [str(folder), *([] if command == "scan" else [str(out)])]
    main([command.split()[-1].replace("run", "segment"), *given, *(["--dry-run"] if command == "dry run" else [])])
    told = "".join(capsys.readouterr())
    if command == "segment":
        told += (out / "deepgmm.log").read_text() + (out / "summary.tsv").read_text()
        assert len((out / "summary.tsv").read_text().splitlines()) == 3
    assert not {c for c in told if not c.isprintable()} - {"\n", "\t"}


def test_scan_prints_on_a_terminal_that_knows_only_ascii(made, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in made[0].glob("pat1_*"):
        shutil.copy(path, folder / path.name.replace("pat1", "Müller-日本"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["scan", str(folder)]) == 0
    terminal.flush()
    assert b"M\\xfcller-" in terminal.buffer.getvalue()


def interrupting(name: str) -> Callable[[str], object]:
    def get(attribute: str) -> object:
        raise KeyboardInterrupt

    return get


def test_an_interrupt_while_modules_are_imported_is_one(monkeypatch, capsys):
    module = types.ModuleType("monai_deepgmm.cli")
    module.__getattr__ = interrupting("main")
    monkeypatch.setitem(sys.modules, "monai_deepgmm.cli", module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert entry.run() == 130
    assert capsys.readouterr().err.startswith("deepgmm: interrupted")
