"""How far one sequence lies beside another: shifts of slices and of whole stacks, from the images alone."""

from __future__ import annotations

from typing import Literal

#: What is looked for (``--align``): slices of hearts that lie beside the reference; nothing; also whole volumes.
Align = Literal["auto", "off", "rigid"]
ALIGN: tuple[Align, ...] = ("auto", "off", "rigid")
