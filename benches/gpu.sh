#!/usr/bin/env bash
# Runs on a machine with an NVIDIA card, in one call: the reference cases, 200 training steps, generation, and the speed and
# memory of training beside the Python package on the same card, where its Python has `mblm` and a PyTorch for CUDA.
# The machine needs CUDA 13's libraries and no Rust: carry a program that .ci/cuda-build built, and the test program.
#   benches/gpu.sh PROGRAM TEST_PROGRAM [PYTHON]        (in the root of the repository; DEVICE=cuda:1 names another card)
set -euo pipefail
program=$(realpath "${1:?name the program}") tests=$(realpath "${2:?name the test program of tests/composed.rs}") python=${3:-}
device=${DEVICE:-cuda}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader), $(date +%F)"

echo "== reference cases"
MBLM_GOLDEN_DEVICE=$device "$tests" --ignored 2>&1 | grep -E 'passed|failed|off by'

echo "== 200 steps, evaluated on the device and on the CPU, and a sample"
"$program" train configs/quickstart.yaml --device "$device" --quiet --out "$work/run" --set train.target_elements=1_638_400 \
    --set io.validate_amount=2
"$program" eval "$work/run" README.md --device "$device"
"$program" eval "$work/run" README.md --device cpu
"$program" generate "$work/run" --device "$device" --prompt '//! ' --max-bytes 200 --seed 1

echo "== training, batch of 4: this program, then the package"
for config in benches/configs/*.yaml; do
    for precision in f32 bf16; do
        "$program" bench "$config" --device "$device" --precision "$precision" --only train --steps 9 --json
    done
    [ -z "$python" ] || "$python" benches/upstream.py "$config" --device cuda --only train --steps 9 || true
done
