"""A training that is stopped and resumed is as if it had never been stopped, and what must not be resumed is not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from scenes import EPOCHS, INFARCT, OPTIONS, STEPS, contents, same_training, stop_at, train
from torch import nn

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files
from monai_deepgmm.methods import model_spec
from monai_deepgmm.methods.model_spec import WEIGHTS
from monai_deepgmm.networks.nll_loss import Staged
from monai_deepgmm.training.dataset import Examples
from monai_deepgmm.training.handlers import CHECKPOINT, HISTORY, Checkpoint, Clip, Epochs, read_checkpoint, read_history


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """The trained model, for a test that changes it."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


@pytest.mark.parametrize("change", [["--seed", "1"], ["--epochs", "5"], ["--patients", "pat1"], ["--means", "cohort"]])
def test_other_options_do_not_resume(patients, copy, trained, capsys, change):
    assert train(patients, copy, "--resume", *change) == 2
    assert "began with other patients, files or options" in capsys.readouterr().err
    assert contents(copy) == contents(trained)


@pytest.mark.parametrize(
    ("gone", "resume", "said"),
    [
        ([], [], "go on with --resume"),
        ([CHECKPOINT], [], "holds a finished model; without checkpoint.pt"),
        ([CHECKPOINT], ["--resume"], "holds a finished model; without checkpoint.pt"),
        # Weights are all that a training leaves that was killed before its first checkpoint.
        ([CHECKPOINT, "provenance.json"], [], "go on with --resume"),
    ],
)
def test_a_model_is_not_trained_over(patients, trained, copy, capsys, gone, resume, said):
    for name in gone:
        (copy / name).unlink()
    before = contents(copy)
    assert train(patients, copy, *resume) == 2
    assert said in capsys.readouterr().err
    assert contents(copy) == before
    if len(gone) != 1:
        assert train(patients, copy, "--resume") == 0
        assert ("no checkpoint; the training begins" in capsys.readouterr().err) == (CHECKPOINT in gone)
        same_training(copy, trained)


def test_what_a_killed_training_leaves_before_its_first_file_is_no_content(patients, trained, tmp_path, capsys):
    out = tmp_path / "model"
    for place in (out, out / "models", out / "configs"):
        place.mkdir(parents=True)
        (place / ".deepgmm-1-ab.part").write_bytes(b"half")
    (out / "configs" / "mine").write_text("mine")
    assert train(patients, out) == 2
    assert "is not empty" in capsys.readouterr().err
    (out / "configs" / "mine").unlink()
    assert train(patients, out) == 0
    same_training(out, trained)  # so nothing is left of the halves


def test_a_checkpoint_is_read_without_running_what_it_holds(patients, copy, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'went off'}'",)

    torch.save({**read_checkpoint(copy / CHECKPOINT), "bomb": Bomb()}, copy / CHECKPOINT)
    assert train(patients, copy, "--resume") == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "went off").exists()
    torch.load(copy / CHECKPOINT, weights_only=False)
    assert (tmp_path / "went off").exists()  # it was a bomb


@pytest.mark.parametrize("name", [CHECKPOINT, WEIGHTS])
@pytest.mark.parametrize("kind", ["torn", "empty", "gone", "another"])
def test_damaged_files_do_not_resume(patients, copy, capsys, name, kind):
    if kind == "gone":
        (copy / name).unlink()
    elif kind == "another":
        torch.save({"network": {}, "fingerprint": 3} if name == CHECKPOINT else [1], copy / name)
    else:
        (copy / name).write_bytes((copy / name).read_bytes()[: 999 if kind == "torn" else 0])
    before = contents(copy)
    assert train(patients, copy, "--resume") == 2
    said = "without checkpoint.pt" if (name, kind) == (CHECKPOINT, "gone") else f"{name.name} cannot be read ("
    assert said in capsys.readouterr().err
    assert contents(copy) == before


@pytest.mark.parametrize("steps", [(2,), (7,), (11,), (6, 5, 4)])
def test_interrupted_anywhere_and_resumed_is_never_interrupted(patients, trained, tmp_path, monkeypatch, steps):
    """Also again and again: each step is counted from the last whole epoch."""
    out, whole = tmp_path / "model", 0
    for step in steps:
        with monkeypatch.context() as patched:
            stop_at(patched, step)
            assert train(patients, out, "--resume") == 130
        whole += step // STEPS
        assert (out / CHECKPOINT).is_file() == (whole > 0)
        if whole:
            assert read_checkpoint(out / CHECKPOINT)["epoch"] == len(read_history(out / HISTORY)) == whole
            torch.load(out / WEIGHTS, weights_only=True)
        assert not (out / "provenance.json").exists()
        if whole == EPOCHS - 1:
            break
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


@pytest.mark.parametrize(
    ("name", "which"),
    [("model.pt", 0), ("model.pt", 1), ("checkpoint.pt", 0), ("checkpoint.pt", 2), (HISTORY, 0), (HISTORY, 2)],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), StudyError("E_DISK", "the disk is full", "")])
def test_stopped_while_a_file_is_written(patients, trained, tmp_path, monkeypatch, capsys, name, which, error):
    written, whole, out = [], atomic_files.write_whole, tmp_path / "model"

    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            written.append(path)
            if len(written) == which + 1:
                raise error
        whole(path, data)

    monkeypatch.setattr(atomic_files, "write_whole", write)
    interrupted = isinstance(error, KeyboardInterrupt)
    assert train(patients, out) == (130 if interrupted else 4)
    monkeypatch.undo()
    said = "run the same command with --resume to go on" if interrupted else "E_DISK: the disk is full"
    assert said in capsys.readouterr().err
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


KILLED = """
    import os, signal, sys
    from monai_deepgmm.cli import main
    from monai_deepgmm.training import handlers

    what, number = sys.argv[1], int(sys.argv[2])
    count = 0

    def die_when(call, counts=lambda *given: True):
        def dying(*given):
            global count
            count += counts(*given)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given)
        return dying

    if what == "step":
        handlers.Clip.__call__ = die_when(handlers.Clip.__call__)
    else:
        os.replace = die_when(os.replace, lambda part, path: path.name == "checkpoint.pt")
    main(sys.argv[3:])
"""


def test_killed_and_resumed_is_never_killed(patients, trained, tmp_path):
    """SIGKILL in the middle of a step, and between a checkpoint's temporary file and its name."""
    draw = random.Random(2)
    points = [("step", draw.randrange(STEPS + 1, 3 * STEPS)), ("write", draw.randrange(2, EPOCHS + 1))]
    running = []
    for what, number in points:
        arguments = ["train", str(patients), str(tmp_path / what), *OPTIONS]
        script = [sys.executable, "-c", textwrap.dedent(KILLED), what, str(number), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [process.wait(timeout=300) for process in running] == [-signal.SIGKILL] * 2
    assert len(list((tmp_path / "write" / "models").glob(".deepgmm-*"))) == 1
    for (what, number), whole_epochs in zip(points, ((points[0][1] - 1) // STEPS, points[1][1] - 1), strict=True):
        out = tmp_path / what
        assert read_checkpoint(out / CHECKPOINT)["epoch"] == whole_epochs, number
        torch.load(out / WEIGHTS, weights_only=True)
        assert train(patients, out, "--resume") == 0
        same_training(out, trained)


@pytest.mark.parametrize("gone", [False, True])
def test_resuming_what_is_finished_changes_nothing_and_a_lost_table_comes_back(patients, trained, copy, gone):
    if gone:
        (copy / HISTORY).unlink()
    assert train(patients, copy, "--resume") == 0
    same_training(copy, trained)


def test_what_changes_no_weight_may_change(patients, trained, copy):
    assert train(patients, copy, "--resume", "--set", "label_rule=posterior") == 0
    assert (copy / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    rules = [model_spec.read(model, INFARCT).spec.training.label_rule for model in (copy, trained)]
    assert rules == ["posterior", "both"]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_programs_own_random_numbers_go_on(patients, tmp_path, monkeypatch, error):
    torch.manual_seed(7)
    torch.rand(3)
    before = torch.get_rng_state()
    if error is not None:
        stop_at(monkeypatch, 5, error=error)
    assert train(patients, tmp_path / "model") == {None: 0, RuntimeError: 70, KeyboardInterrupt: 130}[error]
    assert torch.equal(torch.get_rng_state(), before)


class Toy:
    """A training of one number, which each epoch raises by one, and whose validation losses are given."""

    def __init__(self, folder: Path, watched: list[float], *, tol: float = 0.0, patience: int = 99, **options) -> None:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        self.folder, self.network, self.watched = folder, nn.Linear(1, 1, bias=False), watched
        nn.init.zeros_(self.network.weight)
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.5)
        self.evaluator, self.engine = Engine(lambda engine, batch: None), Engine(self.step)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self.validate)
        self.checkpoint = Checkpoint(
            folder,
            network=self.network,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
            evaluator=self.evaluator,
            metric="loss",
            fingerprint="toy",
            tol=tol,
            patience=patience,
            **options,
        )
        self.checkpoint.attach(self.engine)
        self.engine.run([1, 3], max_epochs=len(watched))

    def step(self, engine, images: int):
        with torch.no_grad():
            self.network.weight += 0.5
        return [{"image": None, "loss": torch.tensor(float(images))}] * images

    def validate(self, engine) -> None:
        self.evaluator.state.metrics = {"loss": self.watched[engine.state.epoch - 1]}

    def weight(self, name: Path) -> float:
        state = torch.load(self.folder / name, weights_only=True)
        return float(state.get("network", state)["weight"])


def test_the_best_weights_and_the_last_state_are_kept_and_resumed_only_when_asked(tmp_path):
    assert len(Toy(tmp_path, [2.0, 1.0], writes=False).checkpoint.history) == 2
    assert contents(tmp_path) == {}  # only one rank writes
    toy = Toy(tmp_path, [3.0, 1.0, 2.0, 1.0])
    assert (toy.weight(WEIGHTS), toy.weight(CHECKPOINT)) == (2, 4)
    rows = read_history(tmp_path / HISTORY)
    assert [row["validation_loss"] for row in rows] == [3, 1, 2, 1]
    assert {row["loss"] for row in rows} == {(1 * 1 + 3 * 3) / 4}  # the mean over images, not over batches
    assert list(torch.load(tmp_path / WEIGHTS, weights_only=True)) == ["weight"]
    again = Toy(tmp_path, [3.0, 1.0, 2.0, 1.0, 0.5], resume=True)
    assert again.weight(CHECKPOINT) == 5
    assert [row["epoch"] for row in again.checkpoint.history] == [1, 2, 3, 4, 5]
    assert len(Toy(tmp_path, [3.0]).checkpoint.history) == 1


def test_tol_and_patience_by_hand(tmp_path):
    losses = [1.0, 0.5, 0.45, 0.44, 0.1]
    # After three epochs the last two gained 1 − 0.45; after four, 0.5 − 0.44.
    assert len(Toy(tmp_path / "a", losses, tol=0.1, patience=2).checkpoint.history) == 4
    assert len(Toy(tmp_path / "b", losses, tol=0.05, patience=2).checkpoint.history) == 5
    assert len(Toy(tmp_path / "c", losses, tol=0.1, patience=1).checkpoint.history) == 3


def test_gradients_are_clipped():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    Clip(parameters, 10.0)(Engine(lambda engine, batch: None))
    assert parameters[1].grad.item() == 4
    Clip(parameters, 1.0)(Engine(lambda engine, batch: None))
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor([0.6, 0.0, 0.8]))


def test_the_epoch_is_told_to_all_that_draw():
    class Sampler:
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    loss, dataset, sampler, drawn = Staged(nn.Identity()), Examples([]), Sampler(), []
    engine = Engine(lambda engine, batch: drawn.append(float(torch.rand(()))))
    Epochs(loss, dataset, sampler, seed=5).attach(engine)
    engine.run([0], max_epochs=3)
    assert loss.epoch == dataset.epoch == sampler.epoch == 3
    wanted = [float(torch.rand((), generator=torch.Generator().manual_seed(5 + epoch))) for epoch in (1, 2, 3)]
    assert drawn == wanted
