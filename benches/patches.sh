#!/usr/bin/env bash
# What packed rows buy: training with patches of words against the same patches padded to their full length, in alternating
# runs on the same made-up text.
#   benches/patches.sh [ROUNDS] [CONFIG...]     default: 5 rounds of tt m2t mm
# A model with full patches computes what padded patches cost: its bytes per second times the fill are theirs. Prints medians.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5}
shift || true
configs=("$@")
[ ${#configs[@]} -gt 0 ] || configs=(tt m2t mm)
program=${MBLM:-target/release/mblm}
[ -n "${MBLM:-}" ] || cargo build --release --quiet
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for ((round = 1; round <= rounds; round++)); do
    for config in "${configs[@]}"; do
        for rule in fixed spacelike; do
            echo "round $round: $config, $rule" >&2
            "$program" bench "benches/configs/$config.yaml" --set patching=$rule --only train --batch 4 --json \
                >>"$out/$config.$rule"
        done
    done
done
python3 - "$out" "${configs[@]}" <<'PYTHON'
import json, statistics, sys

out, *configs = sys.argv[1:]
print("| config | fill | padded, bytes/s | packed, bytes/s | ratio of medians | ratios of the rounds |")
print("|---|---|---|---|---|---|")
for config in configs:
    full, packed = ([json.loads(line) for line in open(f"{out}/{config}.{rule}")] for rule in ("fixed", "spacelike"))
    fill = packed[0]["length"] / full[0]["length"]
    padded = [fill * run["train_bytes_per_s"] for run in full]
    packed = [run["train_bytes_per_s"] for run in packed]
    ratios = sorted(b / a for a, b in zip(padded, packed))
    a, b = statistics.median(padded), statistics.median(packed)
    print(f"| {config} | {fill:.1%} | {a:,.0f} | {b:,.0f} | {b / a:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")
PYTHON
