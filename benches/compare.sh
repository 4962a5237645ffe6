#!/usr/bin/env bash
# Measures this program against the Python package on the same configs, batch and cores, in alternating runs.
#   benches/compare.sh [ROUNDS] [CONFIG...]     default: 3 rounds of tt mt mm m2t t_1d mtt_3d
# Needs Python 3 with venv; installs the package into target/peer once. Prints medians and their ratios.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3}
shift || true
configs=("$@")
[ ${#configs[@]} -gt 0 ] || configs=(tt mt mm m2t t_1d mtt_3d)

cargo build --release --quiet
peer=target/peer
if [ ! -x "$peer/bin/python" ]; then
    python3 -m venv "$peer"
    "$peer/bin/pip" install --quiet mblm==0.4.2 torch==2.9.1
fi
out=target/compare
rm -rf "$out" && mkdir -p "$out"
for ((round = 1; round <= rounds; round++)); do
    for config in "${configs[@]}"; do
        prefix=1024
        [ "$config" = mtt_3d ] && prefix=4096
        yaml=benches/configs/$config.yaml
        echo "round $round: $config" >&2
        ours=(target/release/mblm bench "$yaml" --batch 4 --prefix $prefix --bytes 256 --json)
        "${ours[@]}" >>"$out/$config.ours"
        if grep -qs avx512_bf16 /proc/cpuinfo; then "${ours[@]}" --precision bf16 >>"$out/$config.bf16"; fi
        "$peer/bin/python" benches/upstream.py "$yaml" --batch 4 --prefix $prefix >>"$out/$config.peer"
    done
done
python3 - "$out" "${configs[@]}" <<'PYTHON'
import json, os, statistics, sys

out, *configs = sys.argv[1:]
fields = ["train_bytes_per_s", "forward_bytes_per_s", "generate_bytes_per_s", "peak_rss_mb"]
print("| config | " + " | ".join(f"{f.replace('_', ' ')}: ours / package (ratio)" for f in fields) + " |")
print("|---" * (1 + len(fields)) + "|")
def read(config, side):
    return [json.loads(line) for line in open(f"{out}/{config}.{side}")]

def row(name, ours, peer):
    cells = []
    for field in fields:
        a, b = ([run[field] for run in side] for side in (ours, peer))
        ratio = statistics.median(a) / statistics.median(b)
        spread = max((max(side) - min(side)) / statistics.median(side) for side in (a, b))
        ratio = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
        cells.append(f"{statistics.median(a):,.0f} / {statistics.median(b):,.0f} ({ratio}, ±{50 * spread:.0f}%)")
    print(f"| {name} | " + " | ".join(cells) + " |")

for config in configs:
    peer = read(config, "peer")
    row(config, read(config, "ours"), peer)
    if os.path.exists(f"{out}/{config}.bf16"):
        row(f"{config}, bf16", read(config, "bf16"), peer)
PYTHON
