#!/usr/bin/env bash
# launch/tpu.sh runs this on each TPU VM, in the copy of the clone there:
#   launch/worker.sh install               Python if the machine's is too old, then launch/install.sh tpu
#   launch/worker.sh start [NAME=VALUE...] -- [flags of train.py]      detached; output is appended to train.log
#   launch/worker.sh follow                train.log, until the process ends
#   launch/worker.sh stop                  SIGTERM, then waits until the run has saved and ended
#   launch/worker.sh kill                  SIGKILL, to the processes that it started as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

venv="${DARKFORMER_VENV:-.venv}"
host="$(hostname)"
boot="$(cat /proc/sys/kernel/random/boot_id)" # a number from before a reboot may now be another process's
read -r pid started_in <<<"$(cat train.pid 2>/dev/null || true)"
[ "${started_in:-}" = "$boot" ] || pid=""

alive() {
    [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null
}

install_tpu() {
    local candidate
    for candidate in python3 python3.12 python3.11; do
        case "$("$candidate" --version 2>/dev/null || true)" in
            "Python 3.11."* | "Python 3.12."*) break ;;
        esac
        candidate=""
    done
    if [ -z "$candidate" ] && [ ! -e "$venv/pyvenv.cfg" ]; then # Ubuntu 22.04 images have Python 3.10
        say "$host: no Python 3.11 or 3.12, installing one with uv"
        python3 -m pip install --user --quiet uv || fail "$host: pip cannot install uv; put Python 3.12 there by --prepare"
        "$HOME/.local/bin/uv" python install --quiet 3.12 || fail "$host: uv cannot install Python 3.12"
        PYTHON="$("$HOME/.local/bin/uv" python find 3.12)"
        export PYTHON
    fi
    bash launch/install.sh tpu
}

start() {
    local variables=()
    while [ "${1:---}" != -- ]; do
        variables+=("$1")
        shift
    done
    shift
    [ -x "$venv/bin/python" ] || fail "$host: $PWD is not installed; run setup first"
    ! alive || fail "$host: process $pid still runs; stop it first, or kill it if it hangs"
    echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $host: train.py $(quoted "$@")" >>train.log
    # setsid: its own group, which outlives this connection and which kill ends as a whole.
    # JAX_PLATFORMS: without a working TPU there is an error, not a run on the CPU.
    setsid env JAX_PLATFORMS=tpu,cpu ${variables[@]+"${variables[@]}"} "$venv/bin/python" -u train.py "$@" >>train.log 2>&1 </dev/null &
    echo "$! $boot" >train.pid
    say "$host: process $! started, output in $PWD/train.log"
}

follow() {
    [ -e train.log ] || fail "$host: no train.log in $PWD; nothing was started"
    if alive; then
        tail -n 100 --follow=name --pid="$pid" train.log
    else
        tail -n 100 train.log
    fi
    say "$host: train.py has ended"
}

stop() {
    alive || { say "$host: nothing runs"; return; }
    kill -TERM "$pid"
    for _ in $(seq 300); do
        alive || { say "$host: ended"; return; }
        sleep 1
    done
    fail "$host: process $pid still runs 5 minutes after SIGTERM; kill ends it without saving"
}

kill_all() {
    if [ -z "$pid" ] || ! kill -KILL -- "-$pid" 2>/dev/null; then
        say "$host: nothing runs"
        return
    fi
    say "$host: process group $pid killed"
}

command="${1:-}"
[ $# -eq 0 ] || shift
case "$command" in
    install) install_tpu ;;
    start) start "$@" ;;
    follow) follow ;;
    stop) stop ;;
    kill) kill_all ;;
    *) fail "'$command' is no command; allowed: install start follow stop kill" ;;
esac
