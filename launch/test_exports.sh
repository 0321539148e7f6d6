#!/usr/bin/env bash
# Tests exported models with other versions of transformers, which it does not install:  launch/test_exports.sh [5.0.0 5.24.0]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${DARKFORMER_VENV:-.venv}/bin/python"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
[ $# -gt 0 ] || set -- 5.0.0 5.24.0 # the oldest and the newest that exports are for

for version in "$@"; do
    packages=("transformers==$version")
    case "$version" in 5.0.*) packages+=("huggingface-hub<2" httpx httpcore "tokenizers==0.22.2") ;; esac
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target="$scratch/$version" "${packages[@]}"
    export PYTHONPATH="$scratch/$version"
    "$python" -c "import transformers; assert transformers.__version__ == '$version', transformers.__version__"
    echo "transformers $version"
    "$python" -m pytest -q -W default tests/pretrained/test_exported_models.py \
        -k "(logits_are_those or prompt_in_pieces or padding_on_either_side) and not (yarn or qwen2 or gemma-dark or llama-dark)"
    "$python" -m pytest -q -W default tests/pretrained/test_exported_classifiers.py -k "not refused and not bit_for_bit and not lora"
done
