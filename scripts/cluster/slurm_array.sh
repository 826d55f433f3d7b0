#!/usr/bin/env bash
# A SLURM job array: every task takes its part of the patients. When one is killed, submit the same line again: what is
# done stays. Tables and pages are rebuilt by whoever ends last.
#   sbatch --array=1-20 scripts/cluster/slurm_array.sh PATIENTS OUT [options of deepgmm segment]
#SBATCH --job-name=deepgmm
#SBATCH --array=1-4
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=02:00:00
set -euo pipefail
export OMP_NUM_THREADS=1
part="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
exec deepgmm segment "$@" --part "$part" --jobs "${SLURM_CPUS_PER_TASK:-1}"
