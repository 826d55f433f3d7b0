import dataclasses
import re
from pathlib import Path

import pytest

from monai_deepgmm.errors import CODES
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS
from monai_deepgmm.methods.registry import method_class
from monai_deepgmm.methods.training_config import TrainingConfig

ROOT = Path(__file__).parent.parent


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
