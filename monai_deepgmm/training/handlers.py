"""The few handlers that MONAI's engine lacks: seeds by epoch, gradient clipping, checkpoints that resume exactly."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as distributed
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from monai_deepgmm.errors import ChangedError, UsageError
from monai_deepgmm.images import atomic_files
from monai_deepgmm.methods.model_spec import WEIGHTS
from monai_deepgmm.networks import weights
from monai_deepgmm.networks.gmm_loss import TotalLoss
from monai_deepgmm.networks.nll_loss import Staged
from monai_deepgmm.training.augmentation import Example
from monai_deepgmm.training.dataset import Examples

logger = logging.getLogger(__name__)

CHECKPOINT, HISTORY = Path("models") / "checkpoint.pt", "training.tsv"
COLUMNS = ("epoch", "loss", "validation_loss", "lr")
#: What a checkpoint holds.
STATE: Mapping[str, type] = {
    **dict.fromkeys(("network", "optimizer", "scheduler"), dict),
    **{"scaler": object, "epoch": int, "iteration": int, "history": list, "stopped": bool, "fingerprint": str},
}


def run(trainer: Engine) -> None:
    """Runs a training; whatever its end, torch's global generators, which ``Epochs`` seeds, are then as they were."""
    device = trainer.state.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer.run()


class Epochs:
    """Tells everything whose draws depend on the epoch which one begins.

    What a network itself draws comes from torch's global generator: ``run`` keeps that of the program.

    Args:
        loss: its stage.
        dataset: its augmentation.
        sampler: its order.
        seed: of what a network itself draws, such as dropout.
    """

    def __init__(
        self, loss: Staged | TotalLoss, dataset: Examples, sampler: DistributedSampler[Example] | None, *, seed: int
    ) -> None:
        self.loss, self.dataset, self.sampler, self.seed = loss, dataset, sampler, seed

    def attach(self, engine: Engine) -> None:
        """To a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """At the start of each epoch."""
        epoch = engine.state.epoch
        self.loss.epoch = self.dataset.epoch = epoch
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        torch.manual_seed(self.seed + epoch)


class Clip:
    """Limits the norm of the gradients.

    Args:
        parameters: whose.
        max_norm: the limit.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        self.parameters, self.max_norm = list(parameters), max_norm

    def attach(self, engine: Engine) -> None:
        """To a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """After each backward pass."""
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


class Checkpoint:
    """Keeps the best and the last state in files that are whole or not there, goes on from the last, stops at tol.

    MONAI's CheckpointSaver writes in place (``atomic=False``), so that a kill can leave half a file, and its
    EarlyStopHandler keeps its counter in no file, so that a resumed training would count anew. Here one file holds all
    of the state, scheduler, history and best epoch included: resumed training ends as if it had never been stopped.

    Attach it after the validation. With several ranks, all read and the first writes.

    Args:
        folder: MODEL_DIR.
        network: whose weights; inside DistributedDataParallel or not.
        optimizer: its state.
        scheduler: its state.
        evaluator: its best metric.
        metric: the evaluator's metric that is the lower the better.
        interval: how many epochs lie between two validations; what came after the last one is not kept.
        fingerprint: of the plan and the data; a checkpoint with another one is not gone on from.
        tol: see ``TrainingConfig``.
        patience: see ``TrainingConfig``.
        resume: whether to go on from a checkpoint that is there.
        writes: False on all ranks but the first.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        evaluator: Engine,
        metric: str,
        interval: int = 1,
        fingerprint: str,
        tol: float,
        patience: int,
        resume: bool = False,
        writes: bool = True,
    ) -> None:
        self.folder, self.metric, self.fingerprint = Path(folder), metric, fingerprint
        self.network = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        self.optimizer, self.scheduler, self.evaluator, self.interval = optimizer, scheduler, evaluator, interval
        self.tol, self.patience, self.resume, self.writes = tol, patience, resume, writes
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self._lr = 0.0
        self._loss, self._count = 0.0, 0

    def attach(self, engine: Engine) -> None:
        """To a trainer."""
        if not 1 <= self.interval <= (engine.state.max_epochs or self.interval):
            limits = f"1 to {engine.state.max_epochs}, the number of epochs"
            raise UsageError(f"val_interval: got {self.interval}, expected {limits}")
        engine.add_event_handler(Events.STARTED, self._restore)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._save)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._explain)

    def _restore(self, engine: Engine) -> None:
        path = self.folder / CHECKPOINT
        if not (self.resume and path.is_file()):
            return
        state = read_checkpoint(path)
        check_fingerprint(self.folder, state, self.fingerprint)
        scaler = getattr(engine, "scaler", None)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if scaler is not None and state["scaler"] is not None:
                scaler.load_state_dict(state["scaler"])
        except Exception as error:  # whatever a state of something else makes torch raise
            raise _not_resumed(path, error) from error
        if self.writes:  # a training that was killed right after its checkpoint lacks that epoch's row
            atomic_files.write_whole(self.folder / HISTORY, _table(state["history"]))
        self.history, self.stopped = state["history"], state["stopped"]
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        if self.stopped:
            engine.state.epoch = int(engine.state.max_epochs or state["epoch"])
        logger.info("going on after epoch %d", state["epoch"])

    def _begin(self, engine: Engine) -> None:
        self._loss, self._count = 0.0, 0
        self._lr = self.optimizer.param_groups[0]["lr"]

    def _collect(self, engine: Engine) -> None:
        images = len(engine.state.output)  # one dictionary each, every one with the loss of them all
        self._loss += float(engine.state.output[0]["loss"]) * images
        self._count += images

    def _save(self, engine: Engine) -> None:
        watched = float(self.evaluator.state.metrics[self.metric])
        loss, count = (float(distributed.all_reduce(n)) for n in (self._loss, float(self._count)))
        if not (math.isfinite(watched) and math.isfinite(loss)):
            raise _diverged(engine.state.epoch, f"the loss is {loss:g}, that of the validation {watched:g}")
        row = {
            "epoch": engine.state.epoch,
            "loss": loss / max(count, 1.0),
            "validation_loss": watched,
            "lr": self._lr,
        }
        best = watched < min((r["validation_loss"] for r in self.history), default=math.inf)
        self.history.append(row)
        self.stopped = self._flat()
        if self.writes:
            logger.info("epoch %d: loss %.4f, validation %.4f", row["epoch"], row["loss"], watched)
            if best or not (self.folder / WEIGHTS).is_file():
                atomic_files.write_whole(self.folder / WEIGHTS, _bytes(_on_cpu(self.network.state_dict())))
            atomic_files.write_whole(self.folder / CHECKPOINT, _bytes(self._state(engine)))
            atomic_files.write_whole(self.folder / HISTORY, _table(self.history))
        if self.stopped:
            logger.info("stopped: the validation loss gained less than %g in %d epochs", self.tol, self.patience)
            engine.terminate()

    def _explain(self, engine: Engine, error: Exception) -> None:
        if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is public all the same
            raise _diverged(engine.state.epoch, "a covariance is not positive definite any more") from error
        raise error

    def _flat(self) -> bool:
        """Whether the best of the last ``patience`` epochs is no better than the best before, but for tol."""
        watched = [row["validation_loss"] for row in self.history]
        before, lately = watched[: -self.patience], watched[-self.patience :]
        return bool(before) and min(before) - min(lately) < self.tol

    def _state(self, engine: Engine) -> dict[str, Any]:
        scaler = getattr(engine, "scaler", None)
        return {
            "network": _on_cpu(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "history": self.history,
            "stopped": self.stopped,
            "fingerprint": self.fingerprint,
        }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; nothing in it is executed.

    Raises:
        UsageError: it is no checkpoint.
    """
    try:
        state = weights.read(path)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise _not_resumed(path, error) from error
    if not (isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in STATE.items())):
        raise _not_resumed(path, ValueError("it is no checkpoint of a training"))
    return state


def check_fingerprint(folder: Path, state: Mapping[str, Any], fingerprint: str) -> None:
    """Refuses to go on with other data or another plan.

    Raises:
        ChangedError: the checkpoint's fingerprint is another.
    """
    if state["fingerprint"] != fingerprint:
        raise ChangedError(
            f"--resume: the training in {folder} began with other patients, files or options; "
            "repeat its command, or begin another folder"
        )


def _not_resumed(path: Path, error: Exception) -> UsageError:
    return UsageError(f"--resume: {path.name} cannot be read ({weights.reason(error)}); begin another folder")


def _diverged(epoch: int, found: str) -> UsageError:
    remedy = "begin another folder with a smaller learning rate, such as --set lr=1e-4"
    return UsageError(f"the training diverged in epoch {epoch} ({found}); {remedy}")


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}


def _bytes(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def _table(history: Sequence[Mapping[str, float]]) -> bytes:
    lines = ["\t".join(COLUMNS), *("\t".join(f"{row[c]:.6g}" for c in COLUMNS) for row in history)]
    return ("\n".join(lines) + "\n").encode()


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of ``training.tsv``."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    return [dict(zip(head.split("\t"), map(float, line.split("\t")), strict=True)) for line in lines]
