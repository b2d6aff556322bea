#!/usr/bin/env bash
# Installs reft into .venv, trains on the bundled model and reviews, and scores both models on two splits.
# Needs Python 3.11+ and nothing else: no GPU, no hub.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment "."
export HF_HUB_OFFLINE=1
reft=.venv/bin/reft
run=$($reft train configs/quickstart.yaml --overwrite)
for split in test hard; do
    $reft eval "$run" --data "bundled:reviews/$split" --compare-base
done
$reft infer "$run" --compare --prompt "The soup was cold and the waiter rude, yet the dessert was so good that I will be back."
