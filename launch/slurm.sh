#!/usr/bin/env bash
# Trains under SLURM, one process for each GPU: the same command for all.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=configs/vit_b.py --workdir=/shared/vit_b
#
# Submit it from the root of the checkout, with the environment active where mmjax is installed.
# All nodes write into --workdir, so it has to be on a file system that they share. Processes that hang or lose another
# one start again; a job that is requeued goes on from its last checkpoint.
#SBATCH --job-name=mmjax
#SBATCH --requeue
set -euo pipefail
exec srun --kill-on-bad-exit=1 launch/keep_running.sh python -m mmjax.main "$@"
