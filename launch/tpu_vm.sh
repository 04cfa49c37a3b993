#!/usr/bin/env bash
# Trains on a Cloud TPU VM, one host or a whole pod slice: the same command on every host.
#
#   launch/tpu_vm.sh NAME ZONE --config=configs/vit_b.py --workdir=/mnt/shared/vit_b
#
# NAME is a TPU VM that exists; what is checked out here is copied to each of its hosts. All
# hosts write into --workdir, so it has to be on a file system that they share. Processes that hang or lose another one
# start again. The run goes on when this connection ends; the same command shows its output again (~/run/log on each
# host), and after a preemption goes on from the last checkpoint. To stop: `kill -TERM "$(cat run/pid)"` on each host.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz -o "$archive" HEAD

gcloud compute tpus tpu-vm scp "$archive" "$name:mmjax.tar.gz" --zone="$zone" --worker=all
# %q quotes each argument for the remote shell.
arguments=$(printf '%q ' "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  run=\$PWD/run
  mkdir -p mmjax
  # The code under a run that goes on stays as it is.
  if ! kill -0 \"\$(cat \$run/pid 2>/dev/null)\" 2>/dev/null; then
    tar -xzf mmjax.tar.gz -C mmjax
    python=\$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
    \$python -m venv mmjax/.venv && mmjax/.venv/bin/pip install -q -e 'mmjax[tpu]'
  fi
  cd mmjax
  launch/detached.sh \$run launch/keep_running.sh .venv/bin/python -m mmjax.main $arguments"
