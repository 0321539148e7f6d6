#!/usr/bin/env bash
# Installs this clone into .venv with the versions that were tested:  launch/install.sh [core|test|dev|gguf|lm_eval|notebook|parquet|gcs|aot|gpu|tpu|peers|wandb|mlflow]
# Does nothing if that is already done and neither setup.py nor the constraints have changed since.
#
#   PYTHON            the interpreter to make .venv from (default: the first of python3, python3.12, python3.11 that fits)
#   DARKFORMER_VENV   another place for the environment (default: .venv in the clone)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-core}"
venv="${DARKFORMER_VENV:-.venv}"
started=$SECONDS

fail() {
    echo "error: $*" >&2
    exit 1
}

say() {
    printf '[setup %3ds] %s\n' $((SECONDS - started)) "$*"
}

version_of() { # prints 3.11, say; nothing if there is no such interpreter
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

find_python() { # sets python
    local candidate version seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
        version="$(version_of "$candidate")"
        case "$version" in
            3.11 | 3.12)
                python="$candidate"
                return
                ;;
        esac
        [ -z "$version" ] || seen="$seen, $candidate is $version"
        [ -z "${PYTHON:-}" ] || break
    done
    fail "Python 3.11 or 3.12 is needed${seen:-, none found}. Name one with PYTHON=/path/to/python3.12"
}

make_venv() {
    local hint="install it (Debian, Ubuntu: apt-get install python3-venv)"
    find_python
    "$python" -c 'import venv' 2>/dev/null || fail "$python has no venv module; $hint"
    say "making $venv with $("$python" --version)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$venv" >/dev/null || fail "$python cannot make $venv (see above)"
    else # Debian's python3 without python3-venv: its own pip installs one into the environment
        "$python" -m pip --version >/dev/null 2>&1 || fail "$python has neither ensurepip nor pip; $hint"
        "$python" -m venv --clear --without-pip "$venv" || fail "$python cannot make $venv (see above)"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip || fail "pip cannot be installed into $venv"
    fi
}

show_progress() { # shows of pip's output the downloads from 1 MB up and the long quiet part at the end
    local line name
    while IFS= read -r line; do
        case "$line" in
            *"Downloading "*" MB)"* | *"Using cached "*" MB)"*)
                name="${line##*/}"
                name="${name#*Downloading }"
                name="${name#*Using cached }"
                name="${name%% *}"
                name="${name%%-cp3*}"
                say "  ${name%%-py3*} (${line##*(}"
                ;;
            "Installing collected packages: "*)
                name="${line//[!,]/}"
                say "  unpacking $((${#name} + 1)) packages"
                ;;
            *"Retrying "*) say "  the package index does not answer, trying again" ;;
        esac
    done
}

install_cpu_torch() { # tests need PyTorch only for the CPU; the package index's Linux builds bring gigabytes of CUDA
    [ "$(uname)" = Linux ] || return 0
    "$python" -m pip show --quiet torch 2>/dev/null && return 0
    "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile --no-deps \
        --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu \
        --constraint "$constraints" torch >"$log" 2>&1 || say "  PyTorch's CPU builds cannot be reached, taking the default"
}

case "$extra" in
    core) target="." covers="core" ;;
    test) target=".[test]" covers="core gguf notebook parquet test" ;;
    dev) target=".[dev]" covers="core gguf notebook parquet gcs test aot dev" ;;
    tpu) target=".[tpu]" covers="core gcs tpu" ;;
    gguf | notebook | parquet | gcs | aot | gpu | peers | wandb | mlflow) target=".[$extra]" covers="core $extra" ;;
    *) fail "there is no extra '$extra'; allowed: core test dev gguf notebook parquet gcs aot gpu tpu peers wandb mlflow" ;;
esac

if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "$venv exists and is not a virtual environment; move it away"
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # absent, or left unfinished
    make_venv
fi
python="$venv/bin/python"
version="$(version_of "$python")"
constraints="constraints/py$version.txt"
[ -e "$constraints" ] || fail "$venv has Python $version, 3.11 or 3.12 is needed; remove $venv and run this again"

wanted="$(cat setup.py pyproject.toml "$constraints" | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $PWD"
if [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

say "installing darkformer_jax ($extra) with $constraints"
log="$venv/install-$extra.log"
case "$extra" in test | dev) install_cpu_torch ;; esac
# --no-compile: byte-compiling all of 60 packages takes as long as the rest; the import below compiles what is used
# editable_mode=compat: the clone's path, where setuptools' import hook would come after a folder of the same name
if ! "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile \
    --constraint "$constraints" --config-settings editable_mode=compat --editable "$target" 2>&1 | tee "$log" | show_progress; then
    grep -E '^ *ERROR' "$log" | tail -n 3 >&2 || true
    fail "pip could not install darkformer_jax; its output is in $log"
fi
say "first import"
env -u PYTHONDONTWRITEBYTECODE "$python" -c "import jax, flax.nnx, optax, orbax.checkpoint, grain, safetensors, tokenizers, \
sentencepiece, tensorboardX, matplotlib.pyplot, ml_collections, absl.app, tqdm" || fail "the installation is broken (above)"
for name in $covers; do
    echo "$wanted" >"$venv/installed-$name"
done
say "ready"
