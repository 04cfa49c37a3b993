#!/usr/bin/env bash
# Runs a command, and again when it hung, crashed, or lost another process of the run.
#
#   launch/keep_running.sh python -m mmjax.main --config=configs/vit_b.py --workdir=/shared/vit_b
#
# It ends with the command where that is finished (exit code 0), was given wrong settings (2) or was stopped (130, 143),
# and after five restarts that did not last ten minutes. SIGINT and SIGTERM are passed on.
set -uo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
set -m # without it, what runs in the background ignores Ctrl-C
child= stopped=
trap 'stopped=130; [ -z "$child" ] || kill -s INT "$child" 2>/dev/null' INT
trap 'stopped=143; [ -z "$child" ] || kill -s TERM "$child" 2>/dev/null' TERM
short=0
while :; do
  began=$SECONDS
  "$@" &
  child=$!
  while :; do
    wait "$child" # a signal ends it before the command has ended
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
  child=
  [ -z "$stopped" ] || exit "$stopped"
  if [ $((SECONDS - began)) -lt 600 ]; then short=$((short + 1)); else short=0; fi
  if [ "$short" -gt 5 ]; then
    echo "keep_running.sh: exit code $code again and again: giving up" >&2
    exit "$code"
  fi
  echo "keep_running.sh: exit code $code: starting again" >&2
  sleep "${MMJAX_RESTART_SECONDS:-5}"
  [ -z "$stopped" ] || exit "$stopped"
done
