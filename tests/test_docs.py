import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import make_docs
import pytest

from monai_deepgmm.errors import CODES
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS
from monai_deepgmm.methods.registry import method_class
from monai_deepgmm.methods.training_config import TrainingConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "bundle" / "docs"
SITE = ROOT / "scripts" / "mkdocs.yaml"
#: What the site is built with.
BUILDS = [name for name in ("mkdocs", "material", "latex2mathml") if importlib.util.find_spec(name) is None]


def test_the_table_of_codes_is_the_code():
    table = (ROOT / "bundle/docs/codes.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(E_\w+)` \| (.+) \|$", table, re.MULTILINE)) == CODES


def test_every_warning_is_in_the_table():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "monai_deepgmm").rglob("*.py"))
    documented = set(re.findall(r"^\| `(W_\w+)`", (ROOT / "bundle/docs/codes.md").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r'"(W_[A-Z_]+): ', source)) == documented


@pytest.mark.parametrize("kind", [*map(method_class, METHODS), TrainingConfig, Preprocessing], ids=lambda k: k.__name__)
def test_every_setting_of_a_method_is_an_attribute_in_its_docstring(kind):
    sections = [(base.__doc__ or "").partition("Attributes:\n")[2] for base in kind.__mro__]
    documented = set(re.findall(r"^ +(\w+): \S", "\n".join(sections), re.MULTILINE))
    assert {f.name for f in dataclasses.fields(kind)} <= documented


def test_pages_made_from_the_code_are_those_that_it_makes_now():
    for name, text in make_docs.pages().items():
        assert make_docs.read(name) == text, f"{name}: run python scripts/make_docs.py"


def test_what_has_no_description_cannot_become_a_page():
    table = {"title": "t", "properties": {"a": {"type": "object", "properties": {"b": {"type": "number"}}}}}
    table["properties"]["a"]["description"] = "an a"
    with pytest.raises(ValueError, match=r"a\.b has no description"):
        list(make_docs.keys(table, table, ""))


def test_every_page_is_on_the_site_and_links_lead_to_pages():
    text = SITE.read_text("utf-8")
    nav = re.findall(r": ([\w.]+\.md)$", text[text.index("nav:") :], re.MULTILINE)
    assert len(nav) == len(set(nav))
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} == set(nav) - {"bundle.md"}
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", page.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{page.name}: {target}"


@pytest.mark.skipif(BUILDS != [], reason=f"the extra docs is not installed: {', '.join(BUILDS)}")
def test_the_site_is_built_without_a_warning_and_asks_nobody_for_anything(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--config-file",
        SITE,
        "--site-dir",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("index.html")}
    assert {"methods", "bundle", "tried", "commands"} <= set(pages)
    for name, text in pages.items():
        assert not re.search(
            r"""<(?:script|img|iframe|link (?!rel="(?:canonical|edit)))[^>]*(?:src|href)="https?:""", text
        ), name
        assert 'class="arithmatex"' not in text
    assert pages["methods"].count("<math") > 20


def test_the_notebook_runs_on_a_phantom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(make_docs.NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "ml" in shown
    assert "compared: 1 patient" in shown


def test_the_readme_opens_with_a_picture_three_lines_one_command_and_two_to_set_up():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    opening, *blocks = re.split(r"^```\n", text, flags=re.MULTILINE)
    picture, title, lines = [part for part in re.sub(r"<!--.*?-->", "", opening).strip().split("\n\n") if part]
    assert picture.startswith("![")
    assert (ROOT / picture.partition("](")[2].rstrip(")")).stat().st_size < 200_000
    assert title == "# monai-deepgmm"
    assert len(lines.splitlines()) == 3
    assert "**Research use only, not a medical device.**" in lines
    assert blocks[0] == "deepgmm segment PATIENTS OUT\n"
    assert blocks[2] == "bash scripts/demo.sh\nbash scripts/test.sh\n"
