"""Every command on every page is run: here, by the test that the page names, or not, and then the page says why.

A block of commands may stand below ``<!-- run by: tests/… -->`` or ``<!-- not run: why -->``; the others are run here,
page by page, from the top, in a folder that holds what pages take for granted. What takes long is cut (``SHORTER``).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import models
import nibabel as nib
import numpy as np
import pytest

from monai_deepgmm import cli
from monai_deepgmm.cli import main

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *(ROOT / "bundle/docs").glob("*.md"))}
FENCE = re.compile(r"^(?:<!-- (run by|not run): (.*?) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER = {
    "phantom": "-n 1 --set slices=[1,1] size=220",
    "segment": "--jobs 1",
    "train": "--epochs 1 --network tiny.json --set validation=0",
}
#: Which word of a command names what it makes.
MAKES = {"phantom": 1, "segment": 2, "mask": 2, "train": 2}


class Block(NamedTuple):
    mark: str
    why: str
    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    found = [Block(*match.groups(default="")) for match in FENCE.finditer(PAGES[page].read_text(encoding="utf-8"))]
    return [block for block in found if block.kind in ("", "bash", "python")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    """What pages take for granted: patients by several names, results, a model, a review."""
    here = tmp_path_factory.mktemp("pages")
    files = make_patient(here / "made", "x", shape=(48, 48, 1))
    relabelled(files["gd"], here / "seg.nii.gz", {500: 1, 200: 2, 1220: 3, 2221: 4})
    relabelled(files["gd"], here / "mask.nii.gz", dict.fromkeys((500, 200, 1220, 2221), 1))
    files |= {"seg": here / "seg.nii.gz", "mask": here / "mask.nii.gz"}
    for name in ("PATIENTS", "NEW_PATIENTS"):
        placed(files, here / name / "anna", {s: s for s in ("LGE", "T2", "C0", "mask", "seg")} | {"T2star": "LGE"})
    anat, drawn = here / "BIDS_DIR/sub-01/anat", here / "BIDS_DIR/derivatives/manual/sub-01/anat"
    placed(files, anat, {"sub-01_LGE": "LGE", "sub-01_T2w": "T2", "sub-01_cine": "C0"})
    placed(files, drawn, {"sub-01_dseg": "seg", "sub-01_desc-lv_mask": "mask"})
    (here / "BIDS_DIR/dataset_description.json").write_text('{"Name": "tiny", "BIDSVersion": "1.10.0"}')
    models.write(here / "MODEL")
    (here / "tiny.json").write_text(json.dumps(models.TINY))
    (here / "review.tsv").write_text(
        "patient\tdecision\tnote\treviewer\tdate\tresult\nanna\tredo\t\tme\t2026-01-01\t\n"
    )
    assert main(["segment", str(here / "PATIENTS"), str(here / "OUT"), "-q"]) == cli.OK
    return here


def placed(files: dict[str, Path], folder: Path, names: dict[str, str]) -> None:
    """Copies files under other names."""
    folder.mkdir(parents=True)
    for name, what in names.items():
        shutil.copy(files[what], folder / f"{name}.nii.gz")


def relabelled(source: Path, target: Path, values: dict[int, int]) -> None:
    """The labels of a file under other values."""
    image = nib.load(source)
    old = np.asanyarray(image.dataobj)
    new = sum((np.where(old == value, to, 0) for value, to in values.items()), np.zeros_like(old))
    nib.save(nib.Nifti1Image(new.astype(np.uint8), image.affine), target)


class Reader:
    """Types what stands on a page."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.names = folder, set[str](), dict[str, object]()

    def run(self, block: Block) -> None:
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, "page", "exec"), self.names)
            return
        for line in block.text.splitlines():
            if words := shlex.split(line, comments=True):
                self.type(words)

    def type(self, words: list[str]) -> None:
        program, *words = words
        assert program == "deepgmm", f"{program}: say by which test it is run, or why it is not"
        shown = io.StringIO()
        if ">" in words:
            words, (target,) = words[: words.index(">")], words[words.index(">") + 1 :]
            (self.folder / target).write_text("")
        command = words[0]
        if command in MAKES and (made := words[MAKES[command]]) not in self.made:
            shutil.rmtree(self.folder / made, ignore_errors=True)
            self.made.add(made)
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            code = main([*words, *shlex.split(SHORTER.get(command, ""))])
        assert code == cli.OK, f"deepgmm {shlex.join(words)}: {code}\n{shown.getvalue()}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(not block.mark for block in blocks(page))])
def test_the_commands_of_a_page_work_one_after_the_other(prepared, tmp_path, monkeypatch, no_picture, page):
    folder = Path(shutil.copytree(prepared, tmp_path / "here"))
    monkeypatch.chdir(folder)
    for found in re.finditer(r"^Save it as `([\w.]+)`", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE):
        (folder / found[1]).write_text(re.search(r"```yaml\n(.*?)^```", PAGES[page].read_text("utf-8"), re.M | re.S)[1])
    reader = Reader(folder)
    for block in blocks(page):
        if not block.mark:
            reader.run(block)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_here_is_run_by_a_test_or_says_why_not(page):
    for block in blocks(page):
        if block.mark == "not run":
            assert len(block.why.split()) > 2
        for named in re.findall(r"tests/[\w/]+\.py", block.why):
            assert (ROOT / named).is_file(), named
        if block.mark == "run by":
            texts = [(ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"tests/[\w/]+\.py", block.why)]
            assert texts
            for script in re.findall(r"scripts/(?:\w+/)*(\w+)\.py", block.text):
                assert any(script in text for text in texts), script


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_lines_can_be_typed(page):
    text = FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))
    for line in re.findall(r"`(deepgmm [^`]*)`", text):
        words = shlex.split(re.sub(r"\[[^\]]*\]|…", "", line))[1:]
        if words[0].islower() and not words[0].startswith("-"):
            commands = cli.parser().commands.choices
            assert words[0] in commands, line
            if len(words) > 1 and "--help" not in words and "--help-method" not in words:
                replaced = [re.sub(r"^I/N$", "1/2", re.sub(r"^[NS]$", "1", word)) for word in words]
                try:
                    cli.parser().read(replaced)
                except SystemExit:
                    pytest.fail(f"{page}: {line}")
