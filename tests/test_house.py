"""The picture of the house, the contract that holds it, and the house itself agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "monai_deepgmm"


def of_import_linter() -> list[dict]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content["tool"]["importlinter"]["contracts"]


def floors() -> list[set[str]]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    wings = next(c for c in contracts if c["name"].startswith("Wings"))
    return [{part.strip().removeprefix("monai_deepgmm.") for part in layer.split(":")} for layer in wings["layers"]]


def test_the_picture_of_the_wings_is_the_contract():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("```")[1].strip().splitlines()
    assert [set(re.split(r"  +", line)[0].split(" · ")) for line in picture] == floors()


def test_every_wing_is_in_the_contract_and_every_room_in_its_wings():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    wings = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert wings <= set().union(*floors())
    rooms = {c["containers"][0]: ":".join(c["layers"]) for c in contracts if "containers" in c}
    assert set(rooms) >= {f"monai_deepgmm.{wing}" for wing in wings - {"phantom"}}
    for container, layers in rooms.items():
        folder = PACKAGE.joinpath(*container.split(".")[1:])
        held = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
        assert held - {"__init__"} == {part.strip() for part in layers.split(":")}


def test_no_file_holds_more_than_one_idea():
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {p.name: n for p, n in lines.items() if n > 400} == {}
    scripts = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "scripts").rglob("*.py")}
    assert {p.name: n for p, n in scripts.items() if n > 450} == {}
