#!/usr/bin/env bash
# Everything about lorap's kernels that only a GPU can tell, in under nine minutes.
#
#   benchmarks/gpu_check.sh [--out FILE]     on a machine with a GPU, torch and triton; no network is used
#   benchmarks/gpu_check.sh --dry-run        on any machine: runs this program itself, small and on the CPU
#
# Builds csrc for this GPU only, checks values, CUDA graphs and determinism, then measures. Each step has its own time limit:
# one that hangs is cut off, and the report says so. Exits with 1 where a value is wrong. PYTHON chooses the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 2

dry_run=()
out=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=(--dry-run) ;;
    --out) out=(--out "${2:?--out needs a file}") && shift ;;
    -h | --help) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    *) echo "gpu_check.sh: unknown option $1" >&2 && exit 2 ;;
  esac
  shift
done

[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && PYTHON=.venv/bin/python
PYTHON=${PYTHON:-python3}
total=${LORAP_CHECK_SECONDS:-520}
work=$(mktemp -d)
export LORAP_CHECK_CUDA_LIBRARY=$work/lorap_cuda.so
export TORCHINDUCTOR_CACHE_DIR=$work/inductor

# With what is known so far, also after an interruption.
finish() {
  local code=$?
  "$PYTHON" benchmarks/gpu_report.py "$work" "${dry_run[@]}" "${out[@]}" || code=1
  rm -rf "$work"
  exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

# step NAME LIMIT COMMAND...: at most LIMIT seconds, and no more than what is left of the total.
step() {
  local name=$1 limit=$2 start=$SECONDS left=$((total - SECONDS)) code
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    printf '%s\t-1\t0\t0\n' "$name" >>"$work/steps.tsv"
    return 1
  fi
  echo "-- $name, at most $limit s" >&2
  timeout --kill-after=5 "$limit" "$@" >&2
  code=$?
  printf '%s\t%d\t%d\t%d\n' "$name" $code $((SECONDS - start)) "$limit" >>"$work/steps.tsv"
  return $code
}

check() {
  step "$1" "$2" "$PYTHON" benchmarks/gpu_check.py "$1" --work "$work" "${dry_run[@]}"
}

# setup.py needs CMake; without it nvcc alone builds the CUDA operator as a library of its own.
build() {
  local arch torch
  arch=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a == 9 else ""))') || return
  torch=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)') || return
  export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  LORAP_CUDA_ARCHS=$arch "$PYTHON" setup.py build_ext --inplace
  if "$PYTHON" -c 'import sys, torch; torch.ops.load_library("lorap/_native.so"); torch.ops.lorap_cuda.low_rank_linear'; then
    return 0
  fi
  echo "setup.py built no CUDA part; trying nvcc alone"
  nvcc -O3 -std=c++20 -shared -Xcompiler -fPIC -gencode "arch=compute_$arch,code=sm_$arch" \
    -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$torch/include" \
    csrc/cuda/low_rank_decode.cu csrc/cuda/ops.cpp -L "$torch/lib" -ltorch_cpu -ltorch_cuda \
    -o "$LORAP_CHECK_CUDA_LIBRARY"
}
export -f build
export PYTHON

if ((${#dry_run[@]})); then
  printf 'build\t-2\t0\t0\n' >>"$work/steps.tsv"
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check.sh: torch sees no GPU here; --dry-run tests this program without one" >&2
  trap - EXIT
  rm -rf "$work"
  exit 2
else
  step build 120 bash -c build
fi

check environment 30
check self-check 80
check self-check-cuda 30
check values 70
check values-cuda 30
check graphs 30
check graphs-cuda 20
check timings 130
check timings-cuda 30
check merged 40
check launches 20
check squares 20
check out-dtype 20
check factorization 50
check sanitizer 95
check compiled 120 # tries many kernels for each shape: as many as fit into what is left
exit 0
