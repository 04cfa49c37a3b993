#!/usr/bin/env bash
# Trains under SLURM, one process for each GPU node: the same command on every node.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=configs/vit_b.py --workdir=/shared/vit_b
#
# Submit it from the root of the checkout, with the environment active where mmjax is installed.
# All nodes write into --workdir, so it has to be on a file system that they share. A job that is
# requeued goes on from its last checkpoint.
#SBATCH --job-name=mmjax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
set -euo pipefail
exec srun --ntasks-per-node=1 python -m mmjax.main "$@"
