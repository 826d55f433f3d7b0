"""How far one sequence lies beside another: shifts of slices and of whole stacks, from the images alone."""

from __future__ import annotations

from typing import Literal

#: What is looked for (``--align``): shifts of hearts' slices; nothing; movements of whole sequences first.
Align = Literal["auto", "off", "rigid"]
ALIGN: tuple[Align, ...] = ("auto", "off", "rigid")
