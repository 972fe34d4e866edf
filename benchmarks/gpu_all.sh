#!/usr/bin/env bash
# All that a GPU has to show, in one command of under eight minutes: benchmarks/gpu_all.py, whose arguments it takes.
#   benchmarks/gpu_all.sh --json gpu.json
# It needs this folder, torch with Triton, Lightning, torchmetrics and safetensors: nothing is installed or downloaded.
set -euo pipefail
exec timeout --kill-after=5 475 "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_all.py" "$@"
