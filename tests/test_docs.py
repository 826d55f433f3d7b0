import re
from pathlib import Path

from monai_deepgmm.errors import CODES

ROOT = Path(__file__).parent.parent


def test_the_table_of_codes_is_the_code():
    table = (ROOT / "bundle/docs/codes.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(E_\w+)` \| (.+) \|$", table, re.MULTILINE)) == CODES


def test_every_warning_is_in_the_table():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "monai_deepgmm").rglob("*.py"))
    documented = set(re.findall(r"^\| `(W_\w+)`", (ROOT / "bundle/docs/codes.md").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r'"(W_[A-Z]+): ', source)) == documented
