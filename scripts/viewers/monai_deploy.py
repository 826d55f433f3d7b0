"""An operator for a MONAI Deploy application: a folder of patients in, the output folder of ``deepgmm segment`` out.

In an application's ``compose``:
``self.add_flow(loader, DeepGMMOperator(self, out="/output"), {("folder", "patients")})``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.deploy.core import Operator, OperatorSpec

from monai_deepgmm.cli import main


class DeepGMMOperator(Operator):  # type: ignore[misc]
    """Segments every patient of a folder.

    Args:
        fragment: the application.
        out: the folder for the results.
        options: of ``deepgmm segment``.
        args: of every operator.
        kwargs: of every operator.
    """

    def __init__(
        self, fragment: Any, *args: Any, out: str | Path, options: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        self.out, self.options = Path(out), options
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Its ports."""
        spec.input("patients")
        spec.output("results")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """From a folder to a folder.

        Raises:
            RuntimeError: not every patient could be segmented; ``summary.tsv`` says who and why.
        """
        code = main(["segment", str(op_input.receive("patients")), str(self.out), *self.options])
        if code:
            raise RuntimeError(f"deepgmm segment ended with {code}: see {self.out / 'summary.tsv'}")
        op_output.emit(self.out, "results")
