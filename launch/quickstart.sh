#!/usr/bin/env bash
# Installs what is missing, then trains the quickstart, or whatever experiment the flags name:
#   launch/quickstart.sh [--config=configs/lm_1b.py] [--workdir=...] [--config.num_steps=...]
# Flags go to train.py; relative paths in them start at the clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh core
exec "${DARKFORMER_VENV:-.venv}/bin/python" train.py "$@"
