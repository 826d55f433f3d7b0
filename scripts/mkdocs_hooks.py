"""What MkDocs does besides: formulas become MathML, so that no script is needed, and the bundle's README a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

#: As pymdownx.arithmatex leaves formulas: in a line, and on lines of their own.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
#: Keys in tables stay on one line, and formulas are as large as the text.
STYLE = "td:first-child code { white-space: nowrap; }\nmath { font-size: 1.1em; }\n"


def on_page_content(content: str, **_: Any) -> str:
    """Each formula of a page as MathML."""
    content = INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    return BLOCK.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)


def on_files(files: Files, config: Any) -> Files:
    """The bundle's README, which must bear that name, as a page of the site; and the style."""
    readme = Path(config["docs_dir"], "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "bundle.md", content=readme))
    files.append(File.generated(config, "site.css", content=STYLE))
    return files
