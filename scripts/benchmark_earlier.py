"""The same fit by an earlier revision of this software, in a process of its own that waits for its turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner import Facts, StageError

ROOT = Path(__file__).parents[1]
#: What runs there: one fit for each line that it reads, and what it took.
WORKER = """
import json, sys, time, torch
torch.set_num_threads(1)
from monai_deepgmm.mixture.em import fit_em
asked = torch.load(sys.argv[1])
parts = [asked.pop(name) for name in ("image", "mask", "start")]
for _ in sys.stdin:
    before = time.process_time()
    known = fit_em(*parts, **asked).diagnostics
    spent = time.process_time() - before
    print(json.dumps([spent, float(known.nll.mean()), int(known.iterations.sum())]), flush=True)
"""


class Earlier:
    """A fit by another revision.

    Args:
        revision: as git names it; the first that has ``mixture.em.fit_em`` or a later one.
        asked: the arguments of ``fit_em``, by name.
    """

    def __init__(self, revision: str, asked: Mapping[str, Any]) -> None:
        import torch

        self.images, folder = len(asked["image"]), Path(tempfile.mkdtemp())
        packed = subprocess.run(["git", "-C", ROOT, "archive", revision, "monai_deepgmm"], capture_output=True)
        if packed.returncode:
            raise StageError(f"{revision}: {packed.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        torch.save(dict(asked), folder / "asked.pt")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, folder / "asked.pt"],
            env=os.environ | {"PYTHONPATH": str(folder)},
            cwd=folder,  # python -c looks there first
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> Facts:
        """One run: its CPU seconds and what came of it.

        Raises:
            StageError: that revision cannot do it.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise StageError("the earlier revision's process has no pipes")
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise StageError("the earlier revision ended")
        spent, nll, iterations = json.loads(line)
        came = f"NLL {nll:.4f}, {iterations} iterations"
        return {"spent": spent, "patients": self.images, "objective": nll, "came": came}
