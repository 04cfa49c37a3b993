#!/usr/bin/env bash
# Runs a command that goes on when the connection to this host ends, and shows its output.
#
#   launch/detached.sh FOLDER COMMAND ...
#
# FOLDER/log has the output (FOLDER/log.before that of the time before), FOLDER/pid the process, which
# `kill -TERM "$(cat FOLDER/pid)"` stops. While it runs, the same command starts nothing and shows the output again;
# then it ends with 0, whatever the command ends with.
set -uo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
folder=$1
shift
mkdir -p "$folder"
# The command inherits the lock: a number left in FOLDER/pid, by then another process's, says nothing.
exec 9>"$folder/lock"
if ! flock -n 9; then
  echo "detached.sh: it runs already; its output:" >&2
  exec tail -n 100 -f --pid="$(cat "$folder/pid")" "$folder/log" 9>&-
fi
[ ! -s "$folder/log" ] || mv "$folder/log" "$folder/log.before"
: >"$folder/log"
setsid "$@" >>"$folder/log" 2>&1 </dev/null &
echo $! >"$folder/pid"
tail -n +1 -f --pid=$! "$folder/log" 9>&-
wait $!
code=$?
rm "$folder/pid"
exit "$code"
