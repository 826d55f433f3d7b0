"""The files that make an output folder a data set of its own: a BIDS derivative whose colours other programs know."""

from __future__ import annotations

import json

from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results.provenance import DISCLAIMER, versions

#: What BIDS has no name for, in the order in which it counts: what lies beside the subjects, folders of one session
#: (a session is a patient of its own here), and pages, rows and images without their shading.
IGNORED = (
    *("/*", "!/dataset_description.json", "!/README.md", "!/dseg.tsv", "!/sub-*", "/sub-*_ses-*"),
    *(
        "*_row.json",
        "*_report.html",
        "*_preview.png",
        "*_viewer.json",
        "*_thumb.png",
        "*_entropy.nii.gz",
        "*_dseg.nrrd",
        "*_dseg.mha",
        "*_bias.nii.gz",
        "*_corrected.nii.gz",
        "*_seg.dcm",
    ),
)
README = """# {title}: tissue segmentation

Made by monai-deepgmm {version}. {disclaimer}

Begin with `index.html`: a page per patient, to check by eye. `summary.tsv` says who succeeded and who did not, and
why; `measurements.tsv` holds the volumes. `<patient>/<patient>_dseg.nii.gz` are the labels, on the grid of the scan
that they were made from; `dseg.tsv` names them (for ITK-SNAP: `itksnap_labels.txt`), and `_dseg.json` says how they
were made.

The folder is a BIDS derivative where the patients' ids are those of a BIDS data set. `.bidsignore` lists what BIDS has
no name for; among that are sessions, since each is a patient of its own here, with its folder `sub-01_ses-1`.
"""
SNAP_HEADER = """# ITK-SnAP Label Description File
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
    0     0    0    0        0  0  0    "Clear Label"
"""


def files(protocol: Protocol) -> dict[str, bytes]:
    """What lies beside the patients' folders and depends on no patient: name → content."""
    version = versions()["monai-deepgmm"]
    description = {
        "Name": f"{protocol.title}: tissue segmentation",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "monai-deepgmm", "Version": version}],
        "Disclaimer": DISCLAIMER,
    }
    rows = [f"{t.index}\t{t.name}\t{t.color}" for t in protocol.tissues]
    text = {
        "dataset_description.json": json.dumps(description, indent=1) + "\n",
        "dseg.tsv": "\n".join(["index\tname\tcolor", *rows]) + "\n",
        "itksnap_labels.txt": snap_labels(protocol),
        "README.md": README.format(title=protocol.title, version=version, disclaimer=DISCLAIMER),
        ".bidsignore": "\n".join(IGNORED) + "\n",
    }
    return {name: content.encode("utf-8", "surrogateescape") for name, content in text.items()}


def snap_labels(protocol: Protocol) -> str:
    """The tissues' names and colours in ITK-SNAP's own format (Segmentation > Import Label Descriptions)."""
    lines = [SNAP_HEADER]
    for tissue in protocol.tissues:
        red, green, blue = bytes.fromhex(tissue.color.removeprefix("#"))
        lines.append(f'{tissue.index:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{tissue.name}"\n')
    return "".join(lines)
