"""Slicer's module, MONAI Label's task and MONAI Deploy's operator, with stand-ins for those programs."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import nibabel as nib
import numpy as np
import pytest
from scenes import INFARCT, labels, write_mask

from monai_deepgmm.cli import main

VIEWERS = Path(__file__).parents[2] / "scripts" / "viewers"
QUICK = ("--method", "gmm", "--set", "max_iter=10")
pytestmark = pytest.mark.usefixtures("no_picture")


def load(name: str, monkeypatch, **modules: object) -> ModuleType:
    """A file of scripts/viewers, with these modules installed."""
    for place, content in modules.items():
        monkeypatch.setitem(sys.modules, place.replace("__", "."), content)
    spec = importlib.util.spec_from_file_location(name, VIEWERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def patient(tmp_path, make_patient) -> dict[str, Path]:
    """The files of one patient, in a folder as MONAI Label's datastore may hold it."""
    made, place = make_patient(tmp_path / "made", "p"), tmp_path / "in" / "pat1"
    place.mkdir(parents=True)
    files = {"mask": write_mask(made["gd"], place / "mask.nii.gz")}
    for kind, name in (("LGE", "LGE"), ("T2", "T2"), ("C0", "bSSFP")):
        files[name] = Path(shutil.copyfile(made[kind], place / f"{name}.nii.gz"))
    return files


@pytest.fixture
def expected(patient, tmp_path) -> np.ndarray:
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "expected"), *QUICK, "-q"]) == 0
    return labels(tmp_path / "expected", "pat1")


class Segment:
    def __init__(self, value: int) -> None:
        self.value, self.name, self.colour = value, "", ()

    def GetLabelValue(self):  # noqa: N802
        return self.value

    def SetName(self, name):  # noqa: N802
        self.name = name

    def SetColor(self, *colour):  # noqa: N802
        self.colour = colour


class Segmentation(Segment):
    """What Slicer makes of a label map."""

    def __init__(self, path: str) -> None:
        self.labels = np.asarray(nib.load(path).dataobj)
        self.segments = [Segment(int(v)) for v in np.unique(self.labels) if v]
        self.GetSegmentation = lambda: self
        self.GetNumberOfSegments = lambda: len(self.segments)
        self.GetNthSegment = self.segments.__getitem__


@pytest.fixture
def slicer_module(monkeypatch, tmp_path) -> ModuleType:
    class Base:
        def __init__(self, parent=None):
            self.layout = MagicMock()

        def setup(self):
            pass

    util = SimpleNamespace(exportNode=shutil.copyfile, loadSegmentation=Segmentation, tryWithErrorDisplay=MagicMock())
    names = ("ScriptedLoadableModule", "ScriptedLoadableModuleLogic", "ScriptedLoadableModuleWidget")
    bases = SimpleNamespace(**dict.fromkeys(names, Base))
    slicer = SimpleNamespace(util=util, ScriptedLoadableModule=bases, qMRMLNodeComboBox=MagicMock(), mrmlScene=None)
    qt = MagicMock(QLineEdit=lambda text="": MagicMock(text=text))  # the two lines are not one
    return load("DeepGMM", monkeypatch, qt=qt, slicer=slicer, slicer__ScriptedLoadableModule=bases)


def in_process(monkeypatch) -> None:
    """The command that the module starts, without another interpreter; the first word is the command itself."""

    def run(command, **given):
        assert not any(k.startswith("PYTHON") for k in given["env"])
        return SimpleNamespace(returncode=main(command[1:]), stderr="deepgmm: the command's own words")

    monkeypatch.setattr("subprocess.run", run)


def test_slicer_gets_the_tissues_with_their_names_and_colours(slicer_module, patient, expected, monkeypatch):
    in_process(monkeypatch)
    volumes = {name: patient[name] for name in INFARCT.sequences}
    found = slicer_module.DeepGMMLogic().segment(volumes, patient["mask"], options=QUICK)
    assert np.array_equal(found.labels, expected)
    told = {s.value: (s.name, "#" + bytes(round(c * 255) for c in s.colour).hex()) for s in found.segments}
    assert told == {t.index: (t.name, t.color) for t in INFARCT.tissues}
    assert found.name == "DeepGMM infarct"


def test_slicer_says_what_is_missing_or_failed(slicer_module, patient, monkeypatch):
    logic = slicer_module.DeepGMMLogic()
    with pytest.raises(ValueError, match="choose a volume for LGE"):
        logic.segment({"T2": patient["T2"]})
    in_process(monkeypatch)
    with pytest.raises(RuntimeError, match="the command's own words"):
        logic.segment({"LGE": patient["LGE"]}, patient["mask"], options=["--method", "deepg", "--model", "none"])


def test_slicers_panel_passes_on_what_was_chosen(slicer_module, monkeypatch):
    asked = []
    monkeypatch.setattr(slicer_module.DeepGMMLogic, "segment", lambda self, *a, **k: asked.append((a, k)))
    monkeypatch.setattr(slicer_module, "volume_box", lambda kind: MagicMock())
    panel = slicer_module.DeepGMMWidget()
    panel.setup()
    panel.protocol.currentText = "brain"
    panel.rows[1][1].currentNode.return_value = None
    panel.options.text, panel.command.text = "--set n4=true", "deepgmm"
    panel.apply()
    (((volumes, mask), given),) = asked
    assert list(volumes) == ["T1", "FLAIR"]
    assert mask is panel.mask.currentNode()
    assert given["options"] == ["--mask", "nonzero", "--set", "n4=true"]
    slicer_module.DeepGMM(parent := MagicMock())
    assert parent.categories == ["Segmentation"]


def test_monai_label_segments_the_patient_of_an_image(patient, expected, monkeypatch):
    class InferTask:
        def __init__(self, type, labels, dimension, description, config=None):
            self.labels, self.dimension = labels, dimension

    stub = SimpleNamespace(InferTask=InferTask, InferType=SimpleNamespace(SEGMENTATION="segmentation"))
    packages = {f"monailabel{rest}": ModuleType("monailabel") for rest in ("", "__interfaces", "__interfaces__tasks")}
    module = load("monai_label", monkeypatch, **packages, monailabel__interfaces__tasks__infer_v2=stub)
    task = module.DeepGMMInfer("infarct", method="gmm", settings=["max_iter=10"])
    assert (task.is_valid(), task.dimension) == (True, 3)
    path, told = task({"image": str(patient["LGE"])})
    assert np.array_equal(np.asarray(nib.load(path).dataobj), expected)
    assert told["label_names"] == {t.name: t.index for t in INFARCT.tissues}
    with pytest.raises(FileNotFoundError, match="belongs to no patient"):
        task({"image": str(patient["mask"])})


def test_monai_deploy_segments_a_folder(patient, expected, tmp_path, monkeypatch):
    class Operator:
        def __init__(self, fragment, *args, **kwargs):
            self.ports = []
            spec = SimpleNamespace(input=self.ports.append, output=self.ports.append)
            self.setup(spec)

    core = SimpleNamespace(Operator=Operator, OperatorSpec=object)
    module = load("monai_deploy", monkeypatch, monai__deploy=ModuleType("monai.deploy"), monai__deploy__core=core)
    operator, sent = module.DeepGMMOperator(None, out=tmp_path / "out", options=(*QUICK, "-q")), []
    assert operator.ports == ["patients", "results"]
    ports = SimpleNamespace(receive=lambda name: tmp_path / "in", emit=lambda value, name: sent.append((name, value)))
    operator.compute(ports, ports, None)
    assert sent == [("results", tmp_path / "out")]
    assert np.array_equal(labels(tmp_path / "out", "pat1"), expected)
    patient["mask"].write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"summary\.tsv"):
        operator.compute(ports, ports, None)
