#!/usr/bin/env bash
# Everything about lorap's kernels that only a GPU can tell, in two commands of less than six minutes each.
#
#   benchmarks/gpu_check.sh check [--out DIR]     values, self-checks, sanitizers, CUDA graphs, and times of single layers
#   benchmarks/gpu_check.sh tune [--out DIR]      a sweep of launch settings, and whole models: decoding, generate, prefill
#   benchmarks/gpu_check.sh check --dry-run       on any machine: runs this program itself, small and on the CPU
#
# Needs a GPU, torch and triton; no network. Each step has its own time limit: one that hangs is cut off, and the report says so.
# Rows are written to DIR as they are found, and the last page of what is printed has at most 100 lines; DIR is $OUT where that is
# set. Exits with 1 where a value is wrong. PYTHON chooses the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 2
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && PYTHON=.venv/bin/python
exec "${PYTHON:-python3}" -u benchmarks/gpu_run.py "$@"
