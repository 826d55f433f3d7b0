"""A run over patients as ignite's engine, so that MONAI's handlers (MLflow, statistics) can follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ignite.engine import Engine, Events


class Handler(Protocol):
    """What MONAI and ignite call a handler."""

    def attach(self, engine: Engine) -> None:
        """Asks the engine to be called at its events."""


class PatientEngine(Engine):  # type: ignore[misc]  # handlers attach to nothing less than ignite's own
    """One epoch in which each iteration is a patient; its output is the patient's row.

    At the end ``state.metrics`` holds how many patients are ``ok``, how many ``failed``, and the mean ``seconds``.

    Args:
        handlers: who is told.
    """

    def __init__(self, handlers: Sequence[Handler]) -> None:
        super().__init__(lambda engine, row: row)
        self.rows: list[Mapping[str, Any]] = []
        for handler in handlers:
            handler.attach(self)

    def begin(self, patients: int) -> None:
        """Before the first of so many patients."""
        self.state.max_epochs, self.state.epoch_length, self.state.epoch = 1, patients, 1
        self.fire_event(Events.STARTED)
        self.fire_event(Events.EPOCH_STARTED)

    def patient(self, row: Mapping[str, Any]) -> None:
        """After each patient."""
        self.rows.append(row)
        self.state.iteration, self.state.output = len(self.rows), row
        self.fire_event(Events.ITERATION_COMPLETED)

    def end(self) -> None:
        """After the last patient."""
        failed = sum(row["status"] == "failed" for row in self.rows)
        seconds = sum(float(row["seconds"]) for row in self.rows) / max(len(self.rows), 1)
        self.state.metrics = {"ok": len(self.rows) - failed, "failed": failed, "seconds": seconds}
        self.fire_event(Events.EPOCH_COMPLETED)
        self.fire_event(Events.COMPLETED)
