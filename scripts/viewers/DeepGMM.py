"""A module of 3D Slicer: choose the sequences and a mask, run the installed command, see the tissues in their colours.

Edit > Application Settings > Modules > Additional module paths: the folder of this file. Slicer's own Python needs
nothing: ``deepgmm`` is installed in an environment of its own, whose ``bin/deepgmm`` is named in the module's panel.
Research use only, not a medical device.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import qt
import slicer
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
)

#: Protocol → sequences, in order of reference; the first must be there.
SEQUENCES = {"infarct": ("LGE", "T2", "bSSFP"), "brain": ("T1", "T2", "FLAIR")}
PATIENT = "patient"


class DeepGMM(ScriptedLoadableModule):
    """What Slicer shows in its list of modules."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = "DeepGMM (label-free tissues)"
        parent.categories = ["Segmentation"]
        parent.contributors = ["The monai-deepgmm developers"]
        parent.helpText = __doc__


class DeepGMMWidget(ScriptedLoadableModuleWidget):
    """The panel."""

    def setup(self):
        """Builds it."""
        ScriptedLoadableModuleWidget.setup(self)
        form = qt.QFormLayout()
        self.layout.addLayout(form)
        self.command = qt.QLineEdit(qt.QSettings().value("DeepGMM/command") or "deepgmm")
        self.command.toolTip = "deepgmm, or the path of it, such as /home/me/.venv/bin/deepgmm"
        form.addRow("Command:", self.command)
        self.protocol = qt.QComboBox()
        self.protocol.addItems(list(SEQUENCES))
        self.protocol.currentTextChanged.connect(self.show_sequences)
        form.addRow("Protocol:", self.protocol)
        self.rows = [(qt.QLabel(), volume_box("vtkMRMLScalarVolumeNode")) for _ in range(3)]
        for label, box in self.rows:
            form.addRow(label, box)
        self.mask = volume_box("vtkMRMLLabelMapVolumeNode")
        form.addRow("Mask (none: found, or what is not 0):", self.mask)
        self.nonzero = qt.QCheckBox("the image is skull-stripped")
        form.addRow("", self.nonzero)
        self.options = qt.QLineEdit()
        self.options.toolTip = "further options of deepgmm segment, such as --method svgmm --set n4=true"
        form.addRow("Options:", self.options)
        button = qt.QPushButton("Segment")
        button.clicked.connect(self.apply)
        self.layout.addWidget(button)
        self.layout.addStretch(1)
        self.show_sequences(next(iter(SEQUENCES)))

    def show_sequences(self, protocol):
        """Names the rows after the protocol's sequences."""
        for (label, _), sequence in zip(self.rows, SEQUENCES[protocol]):  # noqa: B905 (Slicer's Python may be 3.9)
            label.text = f"{sequence}:"

    def apply(self, *_):
        """Runs the command; what went wrong is shown in its own words."""
        qt.QSettings().setValue("DeepGMM/command", self.command.text)
        protocol = self.protocol.currentText
        boxes = [box for _, box in self.rows]
        volumes = {s: b.currentNode() for s, b in zip(SEQUENCES[protocol], boxes) if b.currentNode()}  # noqa: B905
        with slicer.util.tryWithErrorDisplay("DeepGMM found no tissues.", waitCursor=True):
            DeepGMMLogic().segment(
                volumes,
                self.mask.currentNode(),
                command=self.command.text,
                protocol=protocol,
                options=["--mask", "nonzero"] * bool(self.nonzero.checked) + shlex.split(self.options.text),
            )


class DeepGMMLogic(ScriptedLoadableModuleLogic):
    """What the panel does, for scripts."""

    def segment(self, volumes, mask=None, *, command="deepgmm", protocol="infarct", options=()):
        """Writes the volumes, runs the command, loads what it found.

        Args:
            volumes: sequence → volume node.
            mask: a label map, or None.
            command: as typed in a terminal.
            protocol: one of SEQUENCES.
            options: further options of ``deepgmm segment``.

        Returns:
            The segmentation node.

        Raises:
            ValueError: the reference sequence is missing.
            RuntimeError: the command failed; its own words say why.
        """
        if SEQUENCES[protocol][0] not in volumes:
            raise ValueError(f"choose a volume for {SEQUENCES[protocol][0]}: the labels lie on its grid")
        with tempfile.TemporaryDirectory() as folder:
            place, out = Path(folder, "in", PATIENT), Path(folder, "out")
            place.mkdir(parents=True)
            for name, node in {**volumes, **({"mask": mask} if mask is not None else {})}.items():
                slicer.util.exportNode(node, str(place / f"{name}.nii.gz"))
            run([*shlex.split(command), "segment", str(place.parent), str(out), "--protocol", protocol, *options], out)
            found = slicer.util.loadSegmentation(str(out / PATIENT / f"{PATIENT}_dseg.nii.gz"))
            paint(found.GetSegmentation(), read_tissues(out / "dseg.tsv"))
        found.SetName(f"DeepGMM {protocol}")
        return found


def volume_box(kind):
    """A choice among the scene's volumes, or none."""
    box = slicer.qMRMLNodeComboBox()
    box.nodeTypes = [kind]
    box.noneEnabled = True
    box.addEnabled = box.removeEnabled = False
    box.setMRMLScene(slicer.mrmlScene)
    return box


def run(command, out):
    """Runs a command without Slicer's own Python in its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_LIBRARY"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")


def read_tissues(path):
    """Index → (name, (red, green, blue) from 0 to 1)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {int(r["index"]): (r["name"], tuple(c / 255 for c in bytes.fromhex(r["color"].lstrip("#")))) for r in rows}


def paint(segmentation, tissues):
    """Gives each segment the name and the colour of its tissue."""
    for i in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(i)
        name, colour = tissues[segment.GetLabelValue()]
        segment.SetName(name)
        segment.SetColor(*colour)
