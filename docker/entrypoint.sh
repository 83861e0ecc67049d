#!/bin/sh
# Runs what is asked, in place of this shell: signals (docker stop, SLURM's warning) reach it.
set -eu
cd /workspace
if [ ! -w runs ] && [ -e runs ]; then
  echo "docker: /workspace/runs is not writable by user $(id -u); mount a folder that is: chown $(id -u) runs" >&2
  exit 2
fi
exec "$@"
