"""Job arrays, Dask on SLURM and Snakemake, with a stand-in for the scheduler."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "scripts" / "cluster"
PATIENTS = ("pat1", "pat2", "pat3")
QUICK = ("--method", "gmm", "--set", "max_iter=10", "-q")


@pytest.fixture
def there(tmp_path, make_patient, monkeypatch) -> Path:
    """Three patients, and the commands that a cluster's nodes have."""
    for number, name in enumerate(PATIENTS):
        make_patient(tmp_path / "in", name, seed=number)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "deepgmm": f'#!/bin/sh\nexec {sys.executable} -m monai_deepgmm "$@"\n',
        "sbatch": "#!/bin/sh\nfor script; do :; done\nbash $script >/dev/null 2>&1 &\necho Submitted batch job $!\n",
        "scancel": "#!/bin/sh\nkill $1 2>/dev/null\nexit 0\n",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def all_done(out: Path) -> bool:
    with (out / "summary.tsv").open() as file:
        rows = {row["patient"]: row["status"] for row in csv.DictReader(file, delimiter="\t")}
    return rows == dict.fromkeys(PATIENTS, "ok") and (out / "index.html").is_file()


def test_the_tasks_of_a_job_array_share_the_patients(there):
    for task in ("1", "2"):
        tasks = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        command = ["bash", str(CLUSTER / "slurm_array.sh"), "in", "out", *QUICK]
        subprocess.run(command, cwd=there, env={**os.environ, **tasks}, check=True, timeout=300)
        done = {p.name for p in (there / "out").iterdir() if p.is_dir() and p.name in PATIENTS}
        assert done == ({"pat1", "pat3"} if task == "1" else set(PATIENTS))
    assert all_done(there / "out")


@pytest.mark.skipif(importlib.util.find_spec("dask_jobqueue") is None, reason="needs dask-jobqueue")
def test_dask_asks_slurm_for_workers(there):
    command = [sys.executable, str(CLUSTER / "dask_slurm.py"), "in", "out", "--workers", "1", *QUICK]
    subprocess.run(command, cwd=there, check=True, timeout=300)
    assert all_done(there / "out")


@pytest.mark.skipif(shutil.which("snakemake") is None, reason="needs snakemake")
def test_snakemake_runs_a_job_per_patient(there):
    config = ["patients=in", "out=out", f"method={' '.join(QUICK)}"]
    command = ["snakemake", "-s", str(CLUSTER / "Snakefile"), "--cores", "1", "--config", *config]
    subprocess.run(command, cwd=there, check=True, timeout=600)
    assert all_done(there / "out")
