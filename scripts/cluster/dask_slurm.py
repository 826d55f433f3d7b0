"""Segments on SLURM through Dask, which asks for workers by itself and gives each the next patient.

    pip install distributed dask-jobqueue
    python scripts/cluster/dask_slurm.py PATIENTS OUT --workers 20 [--queue Q --memory 4GB --walltime 02:00:00] \
        [options of deepgmm segment]

Run it on a node that the others can reach; the folders must be the same on all of them.
"""

from __future__ import annotations

import argparse
import sys

from dask_jobqueue import SLURMCluster

from monai_deepgmm.cli import main


def run(argv: list[str] | None = None) -> int:
    """Starts the workers, segments, and ends them; returns the exit code of ``deepgmm``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="jobs, of one core each")
    parser.add_argument("--queue", help="the cluster's own default if absent")
    parser.add_argument("--memory", default="4GB", help="of each job")
    parser.add_argument("--walltime", default="02:00:00", help="of each job")
    parser.add_argument("--interface", help="the network interface that the nodes share, such as ib0")
    given, segment = parser.parse_known_args(argv)
    with SLURMCluster(
        cores=1,
        processes=1,
        memory=given.memory,
        queue=given.queue,
        walltime=given.walltime,
        interface=given.interface,
        python=sys.executable,
        job_script_prologue=["export OMP_NUM_THREADS=1"],
    ) as cluster:
        cluster.scale(jobs=given.workers)
        return main(["segment", *segment, "--dask", cluster.scheduler_address])


if __name__ == "__main__":
    sys.exit(run())
