#!/usr/bin/env bash
# Installs what is missing, then runs the tests in two processes:  launch/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh test
exec "${DARKFORMER_VENV:-.venv}/bin/python" -m pytest -n 2 --dist worksteal "$@"
