#!/bin/sh
# Healthy: a training run, if there is one, has written a step in the last ten minutes or is finished.
newest=$(find /workspace/runs -maxdepth 2 -name metrics.jsonl -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d' ' -f2-)
[ -n "$newest" ] || exit 0
[ -e "$(dirname "$newest")/finished" ] && exit 0
[ -n "$(find "$newest" -mmin -10)" ]
