#!/usr/bin/env bash
# Measures several processes against one with as many threads, at the same batch of all together, in alternating runs.
#   benches/processes.sh [ROUNDS] [PROCESSES] [CONFIG...]     default: 5 rounds, 2 processes, tt and m2t
# Needs Open MPI. Prints medians: bytes per second of both, their ratio, and what a step of several processes is made of.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5} processes=${2:-2}
shift $(($# < 2 ? $# : 2))
configs=("$@")
[ ${#configs[@]} -gt 0 ] || configs=(tt m2t)
steps=${STEPS:-12} batch=${BATCH:-2}

cargo build --release --quiet --features mpi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
out=target/processes
rm -rf "$out" && mkdir -p "$out"

# A training configuration around a model's: text of this repository, `batch` sequences of each process.
config() {
    local len
    len=$(awk '/^seq_lens:/ { gsub(/[^0-9,]/, ""); n = split($0, dims, ","); len = 1; for (i = 1; i <= n; i++) len *= dims[i]; print len }' "benches/configs/$1.yaml")
    cat <<YAML
io: {name_model: $1, output_dir: $out, dataset_dir: ., dataset_id: bytes, num_models_to_save: 1, validate_amount: 1,
  dataset_args: {files: ["mblm-*/src/**/*.rs"]}, log_train_loss_amount: 1000000}
params:
  input_seq_len: $len
$(sed 's/^/  /' "benches/configs/$1.yaml")
train: {target_elements: $((batch * processes * steps)), target_elements_strategy: batch, batch_size: $2,
  learning_rate: 0.001, gradient_clipping: 1.0, gradient_accumulate_every: 1, max_eval_steps: 1, shuffle_train: true}
YAML
}

for ((round = 1; round <= rounds; round++)); do
    for name in "${configs[@]}"; do
        echo "round $round: $name" >&2
        config "$name" $((batch * processes)) >"$out/$name-one.yaml"
        config "$name" "$batch" >"$out/$name-several.yaml"
        RAYON_NUM_THREADS=$processes target/release/mblm train "$out/$name-one.yaml" -q --out "$out/$name-one-$round" >/dev/null
        RAYON_NUM_THREADS=1 mpirun --bind-to none -n "$processes" \
            target/release/mblm train "$out/$name-several.yaml" -q --out "$out/$name-several-$round" >/dev/null
    done
done

python3 - "$out" "$rounds" "${configs[@]}" <<'PYTHON'
import json, statistics, sys

out, rounds, *configs = sys.argv[1:]

def points(name, side):
    """The points after the first two steps, of all rounds."""
    for round in range(1, int(rounds) + 1):
        lines = [json.loads(line) for line in open(f"{out}/{name}-{side}-{round}/metrics.jsonl")]
        yield [line for line in lines if line["kind"] == "train"][2:]

def median(name, side, of):
    return statistics.median(statistics.median(of(point) for point in run) for run in points(name, side))

print("| config | one process, bytes/s | several, bytes/s | efficiency | step, ms | waiting, ms | sums, ms | memory, MiB: one / each |")
print("|---|---|---|---|---|---|---|---|")
for name in configs:
    speed = {side: median(name, side, lambda p: p["bytes_per_second"]) for side in ("one", "several")}
    memory = {side: median(name, side, lambda p: p["memory_mb"]) for side in ("one", "several")}
    first, second = next(points(name, "several"))[:2]
    step = 1000 * (second["bytes_seen"] - first["bytes_seen"]) / speed["several"]
    wait, sums = (1000 * median(name, "several", lambda p: p[key]) for key in ("wait_seconds", "sum_seconds"))
    print(f"| {name} | {speed['one']:,.0f} | {speed['several']:,.0f} | {speed['several'] / speed['one']:.1%} | {step:.0f} | "
          f"{wait:.1f} | {sums:.1f} | {memory['one']:,.0f} / {memory['several']:,.0f} |")
PYTHON
