#!/usr/bin/env bash
# Installs what is missing, then trains the quickstart, or whatever experiment the flags name:
#   launch/quickstart.sh [--config=configs/lm_1b.py] [--workdir=...] [--config.num_steps=...]
# Flags go to train.py; relative paths in them start at the clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh core
if [ ! -e "${DARKFORMER_VENV:-.venv}/installed-gpu" ] && nvidia-smi -L >/dev/null 2>&1; then
    echo "note: this trains on the CPU; JAX for this machine's NVIDIA GPU is installed by: bash launch/install.sh gpu" >&2
fi
exec "${DARKFORMER_VENV:-.venv}/bin/python" train.py "$@"
