#!/usr/bin/env bash
# TPU VMs from the first request to the last log line; --help says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

usage() {
    cat <<'END'
launch/tpu.sh COMMAND --name=NAME --zone=ZONE [--project=PROJECT] [flags] [--dry-run] [-- flags of train.py]

  create   asks for the machines and waits until they are there
             --type=TYPE         v5litepod-16, v6e-64, v5p-128, ...
             --spot              cheaper, but may be taken away at any time
             --slices=N          how many slices of TYPE, joined by the data centre network (default: 1)
             --runtime=VERSION   the machines' image (default: the one Google names for JAX on TYPE)
  setup    copies this clone, as it is now, to all workers and installs it
             --prepare=COMMAND   run on each worker first; mount the directory of the run here
  run      starts train.py on all workers, detached; --workdir is gs://BUCKET/NAME, or a directory that all share
             --env=NAME=VALUE    for train.py; may be given several times
  follow   shows the output of one worker until its process ends
             --slice=I --worker=I  which one (default: 0 and 0, whose process prints the progress)
  stop     SIGTERM: the run saves and ends; "run" again resumes
  kill     SIGKILL, for what hangs: nothing is saved
  retry    after a preemption: deletes what is left of the request, then create, setup and run with the flags of all three
  delete   gives the machines back, with their disks; asks for the name again
             --confirm=NAME      the answer, for scripts

  --dry-run prints the commands and does nothing.  launch/README.md has an example and what goes wrong.
END
}

gcloud_tpu() { # gcloud_tpu VERB ARGUMENTS...
    run gcloud compute tpus queued-resources "$@" "--zone=$zone" ${project:+"--project=$project"}
}

everywhere=(--node=all --worker=all)

on_workers() { # on_workers COMMAND: in the copy of the clone, on all workers
    gcloud_tpu ssh "$name" "${everywhere[@]}" "--command=cd darkformer_jax && $1"
}

query_state() { # prints the state of the request; nothing if there is none
    gcloud_tpu list "--filter=name~(^|/)$name\$" "--format=value(state.state)"
}

wait_while() { # wait_while STATE...: sets now to the first other state
    while true; do
        now="$(query_state 2>/dev/null)" || { # one failure must not end a wait of hours
            sleep 30
            now="$(query_state)" || fail "gcloud cannot tell the state of $name (above)"
        }
        case " $* " in *" ${now:-absent} "*) ;; *) return ;; esac
        [ "$now" = "${said-none}" ] || say "$name is ${now:-not there yet}; waiting. Ctrl-C leaves the request in the queue"
        said="$now"
        sleep 30
    done
}

default_runtime() {
    case "$type" in
        v5litepod-[1-9]*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-[1-9]*) runtime=v2-alpha-tpuv5 ;;
        v6e-[1-9]*) runtime=v2-alpha-tpuv6e ;;
        v2-[1-9]* | v3-[1-9]* | v4-[1-9]*) runtime=tpu-ubuntu2204-base ;;
        *) fail "--type=$type: no image known for it; known are v2-N v3-N v4-N v5litepod-N v5p-N v6e-N; or give --runtime=" ;;
    esac
}

check_create() {
    need type
    need_number slices
    [ -n "$runtime" ] || default_runtime
}

create() {
    local nodes=("--node-id=$name")
    [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
    gcloud_tpu create "$name" "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot}
    wait_active
}

wait_active() {
    if [ -n "$dry_run" ]; then
        echo "# every 30 s, until the state is ACTIVE:"
        query_state
        return
    fi
    wait_while ACCEPTED CREATING PROVISIONING WAITING_FOR_RESOURCES absent
    [ "$now" = ACTIVE ] || fail "$name is $now, not ACTIVE; 'gcloud compute tpus queued-resources describe' says why"
    say "$name is ACTIVE"
}

pack() { # the clone's files as they are now, without those that git ignores and those that are deleted but still in git
    local file
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done | tar -czf "$1" --null -T -
}

setup() {
    local archive="${TMPDIR:-/tmp}/darkformer_jax.tar.gz" scratch=""
    if [ -n "$dry_run" ]; then
        echo "# $archive: the files of this clone, as they are now, except what git ignores"
    else
        scratch="$(mktemp -d)"
        archive="$scratch/darkformer_jax.tar.gz"
        pack "$archive"
        say "this clone packed: $(wc -c <"$archive") bytes"
    fi
    gcloud_tpu scp "$archive" "$name:" "${everywhere[@]}"
    [ -z "$scratch" ] || rm -r "$scratch"
    # The files that were sent before are removed first: one that was deleted or renamed here must not stay there.
    gcloud_tpu ssh "$name" "${everywhere[@]}" "--command=mkdir -p darkformer_jax && cd darkformer_jax && \
if [ -e .sent ]; then xargs -d '\\n' -a .sent rm -f; fi && \
tar -xzf ../darkformer_jax.tar.gz && tar -tzf ../darkformer_jax.tar.gz >.sent"
    [ -z "$prepare" ] || on_workers "bash -ec $(quoted "$prepare")"
    on_workers "bash launch/worker.sh install"
}

check_train() {
    need_workdir
    case "$workdir" in
        /* | gs://*) ;;
        *) fail "--workdir=$workdir: on TPU VMs it must be gs://BUCKET/NAME, or an absolute path that all workers share" ;;
    esac
}

train() {
    on_workers "bash launch/worker.sh start $(quoted ${environment[@]+"${environment[@]}"} -- "${train_flags[@]}")"
}

retry() {
    if [ -n "$dry_run" ]; then
        query_state
        echo "# if it is SUSPENDED or FAILED:"
        gcloud_tpu delete "$name" --force --quiet
        create
    else
        wait_while SUSPENDING DELETING
        case "$now" in
            SUSPENDED | FAILED)
                gcloud_tpu delete "$name" --force --quiet
                wait_while DELETING SUSPENDED FAILED
                create
                ;;
            ACTIVE) fail "$name is ACTIVE, its machines were not taken: 'run' starts train.py again, after 'kill' if it hangs" ;;
            "") create ;;
            *) wait_active ;;
        esac
    fi
    setup
    train
}

delete() {
    confirm_name "$name" "its machines and their disks"
    gcloud_tpu delete "$name" --force --quiet
}

take_command "create setup run follow stop kill retry delete" "$@"
shift

name="" zone="" project="" type="" runtime="" slices=1 prepare="" slice=0 worker=0 confirm="" spot="" dry_run=""
case "$command" in
    create) values="type slices runtime" switches="spot" ;;
    setup) values="prepare" switches="" ;;
    follow) values="slice worker" switches="" ;;
    retry) values="type slices runtime prepare" switches="spot" ;;
    delete) values="confirm" switches="" ;;
    *) values="" switches="" ;;
esac
parse_flags "name zone project $values" "$switches dry_run" "$@"
need name zone
need_plain_name "$name"
case "$command" in
    run | retry) check_train ;;
    *) [ ${#train_flags[@]} = 0 ] || fail "$command takes no flags of train.py; 'run' and 'retry' do" ;;
esac
case "$command" in create | retry) check_create ;; esac

case "$command" in
    create) create ;;
    setup) setup ;;
    run) train ;;
    follow) gcloud_tpu ssh "$name" "--node=$slice" "--worker=$worker" "--command=bash darkformer_jax/launch/worker.sh follow" ;;
    stop) on_workers "bash launch/worker.sh stop" ;;
    kill) on_workers "bash launch/worker.sh kill" ;;
    retry) retry ;;
    delete) delete ;;
esac
