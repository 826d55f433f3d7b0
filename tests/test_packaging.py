"""What is installed, by whom and how: the project's own files agree with each other."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import yaml

import monai_deepgmm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: Names of distributions that differ from what is imported.
IMPORTED = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pytorch-ignite": "ignite", "pillow": "PIL"}
#: What no import shows: MONAI's bundle command is built on it.
NEEDED = {"fire"}


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name → lowest version."""
    return {m[1].lower(): m[2] for r in requirements if (m := re.match(r"([\w.-]+)>=([\w.]+)", r))}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()
    return {n.lower(): v for n, _, v in (line.partition("==") for line in lines) if v}


def imports() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "monai_deepgmm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
    return found


def test_what_is_installed_is_what_the_package_uses():
    core = bounds(PROJECT["project"]["dependencies"])
    used = imports()
    for name in set(core) - NEEDED:
        assert IMPORTED.get(name, name) in used | {n.lower() for n in used}, name


def test_the_lowest_versions_are_those_that_are_tried_and_conda_asks_for_the_same():
    core = bounds(PROJECT["project"]["dependencies"])
    lowest = pins("lowest.txt")
    assert set(lowest) == set(core)
    assert all(version.startswith(core[name]) for name, version in lowest.items())
    listed = yaml.safe_load((ROOT / "scripts" / "environment.yaml").read_text(encoding="utf-8"))["dependencies"]
    conda = bounds(listed)
    renamed = {"torch": "pytorch-cpu", "pytorch-ignite": "ignite"}
    assert {renamed.get(n, n): v for n, v in core.items()} == {n: v for n, v in conda.items() if n != "python"}


def test_what_scripts_install_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {*bounds(PROJECT["project"]["dependencies"]), *bounds(extras["test"])}
    assert wanted <= set(pins("constraints.txt"))
    assert {"dask", "dicom", "brain-mask", "networks", "tracking", "bench", "test", "dev"} <= set(extras)


def test_the_wheel_carries_what_the_program_looks_for():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        assert (ROOT / source).exists()
        assert target == f"monai_deepgmm/{source}"
    assert (ROOT / "monai_deepgmm" / "py.typed").is_file()
    assert (ROOT / "bundle" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_type_checkers_see_the_lazy_exports():
    tree = ast.parse(Path(monai_deepgmm.__file__).read_text(encoding="utf-8"))
    (listed,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    assert set(ast.literal_eval(listed)) == set(monai_deepgmm._EXPORTS)  # written out: no type checker computes it
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    exported = {n: p if ":" in p else f"{p}:{n}" for n, p in monai_deepgmm._EXPORTS.items()}
    assert seen == {name: f"monai_deepgmm.{place}" for name, place in exported.items()}


def test_the_readmes_links_are_absolute_on_pypi():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
        assert (ROOT / target).exists(), target
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for change in hook["substitutions"]:
        assert PROJECT["project"]["urls"]["Homepage"] in change["replacement"]
        text = re.sub(change["pattern"], change["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 5
    assert all(re.match(r"https?://|#", target) for target in targets)


def test_every_file_tells_the_same_version():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == version
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Homepage"]
    log = (ROOT / "bundle" / "docs" / "changelog.md").read_text(encoding="utf-8")
    told = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text(encoding="utf-8"))["changelog"]
    assert re.findall(r"^## (\d\S+)", log, re.MULTILINE) == list(told)


def test_workflows_run_what_stands_here():
    """The three Pythons, and no script or file that has moved."""
    folder = ROOT / ".github" / "workflows"
    jobs = yaml.safe_load((folder / "tests.yaml").read_text(encoding="utf-8"))["jobs"]
    pythons = jobs["tests"]["strategy"]["matrix"]["python"]
    assert pythons == re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        yaml.safe_load(text)
        for named in re.findall(r"(?:scripts|tests)/[\w/.]+", text):
            assert (ROOT / named).exists(), named
    copied = re.findall(
        r"^COPY (?!--from)(\S+) ", (ROOT / "scripts/container/Dockerfile").read_text("utf-8"), re.MULTILINE
    )
    assert all((ROOT / source).exists() for source in copied)
