#!/usr/bin/env bash
# A run as a JobSet on Google Kubernetes Engine, on TPUs or GPUs; --help says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

usage() {
    cat <<'END'
launch/gke.sh COMMAND --name=NAME [--namespace=NAMESPACE] [flags] [--dry-run] [-- flags of train.py]

  run      creates the JobSet; needs --image, --claim, and --tpu or --gpu
             --image=IMAGE        of launch/Dockerfile, in a registry that the cluster can read
             --claim=NAME         PersistentVolumeClaim (ReadWriteMany) that all pods mount and --workdir is on; none for gs://
             --mount=PATH         where (default: /runs)
             --tpu=LABEL --topology=AxB   tpu-v5-lite-podslice 4x4, tpu-v6e-slice 8x8, tpu-v5p-slice 4x4x4, ...
             --slices=N           how many such slices (default: 1)
             --chips=N            chips per node (default: 4; 1 if the topology is 1x1)
             --gpu=LABEL --nodes=N --gpus=N   nvidia-h100-80gb, ..., nodes, GPUs on each (default: 1 and 8)
             --spot               on Spot nodes, which may be taken away at any time
             --restarts=N         how often a preempted or failed run starts again by itself (default: 100)
             --env=NAME=VALUE     for train.py; may be given several times
  follow   shows the output of the first process
  delete   deletes the JobSet and its pods, not the claim; asks for the name again
             --confirm=NAME       the answer, for scripts

  --dry-run prints the manifest and the command and does nothing.  launch/README.md has examples and what goes wrong.
END
}

yaml_string() { # a JSON string is a YAML string; Kubernetes itself would expand $(NAME), and takes $$ for $
    local text="$1" out="" char i
    for ((i = 0; i < ${#text}; i++)); do
        char="${text:i:1}"
        case "$char" in
            '"' | \\) out+="\\$char" ;;
            $'\n') out+='\n' ;;
            $'\t') out+='\t' ;;
            $'\r') out+='\r' ;;
            "$") out+='$$' ;;
            *) out+="$char" ;;
        esac
    done
    printf '"%s"' "$out"
}

yaml_list() { # the arguments as [..., ...]
    local word list=""
    for word in "$@"; do list+=", $(yaml_string "$word")"; done
    printf '[%s]' "${list#, }"
}

yaml_variables() { # NAME=VALUE..., one per line
    local variable
    for variable in "$@"; do
        printf '                    - {name: %s, value: %s}\n' "$(yaml_string "${variable%%=*}")" "$(yaml_string "${variable#*=}")"
    done
}

check_tpu() { # sets pods: one for each node of a slice
    local size chips_of_slice=1
    need topology
    case "$topology" in
        [1-9]*x[1-9]*) ;;
        *) fail "--topology=$topology: the form is AxB or AxBxC, 4x4 for example" ;;
    esac
    for size in ${topology//x/ }; do
        case "$size" in *[!0-9]*) fail "--topology=$topology: '$size' is not a number" ;; esac
        chips_of_slice=$((chips_of_slice * size))
    done
    [ -n "$chips" ] || chips=$((chips_of_slice < 4 ? chips_of_slice : 4))
    need_number chips slices
    [ $((chips_of_slice % chips)) = 0 ] || fail "--chips=$chips does not divide the $chips_of_slice chips of --topology=$topology"
    pods=$((chips_of_slice / chips)) jobs="$slices" resource=google.com/tpu amount="$chips"
}

check_gpu() {
    need_number nodes gpus
    [ -z "$topology$chips" ] || fail "--topology and --chips are for --tpu; a --gpu run has --nodes and --gpus"
    pods="$nodes" jobs=1 resource=nvidia.com/gpu amount="$gpus"
}

check_run() {
    local flag
    need image
    need_workdir
    need_number restarts
    case "$tpu/$gpu" in
        / | [!/]*/?*) fail "--tpu and --gpu: give one of the two" ;;
        */) check_tpu ;;
        *) check_gpu ;;
    esac
    for flag in image claim mount tpu gpu; do
        case "${!flag}" in *[!A-Za-z0-9_./:@-]*) fail "--$flag=${!flag}: letters, digits and _./:@- only" ;; esac
    done
    case "$workdir" in
        gs://*) [ -z "$claim" ] || fail "--claim=$claim: not used with --workdir=$workdir" ;;
        "$mount"/?*) need claim ;;
        *) fail "--workdir=$workdir is not in --mount=$mount, the only directory that the pods share" ;;
    esac
}

placement() { # which nodes
    if [ -n "$tpu" ]; then
        echo "                cloud.google.com/gke-tpu-accelerator: $(yaml_string "$tpu")"
        echo "                cloud.google.com/gke-tpu-topology: $(yaml_string "$topology")"
    else
        echo "                cloud.google.com/gke-accelerator: $(yaml_string "$gpu")"
    fi
    [ -z "$spot" ] || echo '                cloud.google.com/gke-spot: "true"'
    [ -z "$spot" ] || echo '              tolerations: [{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]'
}

container_command() { # on TPUs GKE tells JAX which processes there are; on GPUs the flags must
    local coordinator="--coordinator=$name-train-0-0.$name:8476"
    if [ -n "$tpu" ] || [ "$pods" = 1 ]; then
        yaml_list .venv/bin/python -u train.py "${train_flags[@]}"
    else # the shell's $ are Kubernetes' $$, too
        # shellcheck disable=SC2016
        yaml_list bash -c 'exec .venv/bin/python -u train.py "$@" --process_id="$JOB_COMPLETION_INDEX"' train.py \
            "${train_flags[@]}" "$coordinator" "--num_processes=$pods"
    fi
}

manifest() {
    # A TPU's device files belong to root. GPUs need no root: the image's own user and group may use them.
    local variables=("JAX_PLATFORMS=tpu,cpu") security="{runAsUser: 0}"
    if [ -n "$gpu" ]; then # on GKE the driver's libraries are mounted there
        variables=("JAX_PLATFORMS=cuda,cpu" "LD_LIBRARY_PATH=/usr/local/nvidia/lib64")
        security="{runAsNonRoot: true, fsGroup: 10001, fsGroupChangePolicy: OnRootMismatch}"
    fi
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
$([ -z "$tpu" ] || echo '  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}')
spec:
  failurePolicy:
    maxRestarts: $restarts  # each starts all pods again, and the run resumes
    rules:
      - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: train
      replicas: $jobs
      template:
        spec:
          parallelism: $pods
          completions: $pods
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:  # exit status 2 is a flag or a config that train.py refuses: it would refuse it again
              - {action: FailJob, onExitCodes: {containerName: train, operator: In, values: [2]}}
          template:
            spec:
              restartPolicy: Never
              securityContext: $security
              terminationGracePeriodSeconds: 120  # to save after SIGTERM; Spot nodes give less
              nodeSelector:
$(placement)
              containers:
                - name: train
                  image: $(yaml_string "$image")
                  command: $(container_command)
                  env:
$(yaml_variables "${variables[@]}" ${environment[@]+"${environment[@]}"})
                  resources: {limits: {$resource: $amount}}
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
$([ -z "$claim" ] || echo "                    - {name: runs, mountPath: $(yaml_string "$mount")}")
              volumes:
                - {name: shared-memory, emptyDir: {medium: Memory}}  # NCCL and data workers; a container's own has 64 MB
$([ -z "$claim" ] || echo "                - {name: runs, persistentVolumeClaim: {claimName: $(yaml_string "$claim")}}")
END
}

kubectl_run() {
    run kubectl ${namespace:+"--namespace=$namespace"} "$@"
}

create() {
    if [ -n "$dry_run" ]; then
        manifest
        echo "# the above is the input of:"
        kubectl_run create -f -
    else
        manifest | kubectl_run create -f -
    fi
}

delete() {
    confirm_name "$name" "its pods"
    kubectl_run delete jobset "$name"
}

take_command "run follow delete" "$@"
shift

name="" namespace="" image="" claim="" mount=/runs tpu="" topology="" slices=1 chips="" gpu="" nodes=1 gpus=8
restarts=100 confirm="" spot="" dry_run="" pods="" jobs="" resource="" amount=""
case "$command" in
    run) values="image claim mount tpu topology slices chips gpu nodes gpus restarts" switches="spot" ;;
    follow) values="" switches="" ;;
    delete) values="confirm" switches="" ;;
esac
parse_flags "name namespace $values" "$switches dry_run" "$@"
need name
need_plain_name "$name"
[ "$command" = run ] || [ ${#train_flags[@]} = 0 ] || fail "$command takes no flags of train.py; 'run' does"

case "$command" in
    run)
        check_run
        create
        ;;
    follow)
        kubectl_run logs --follow --tail=100 --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,\
batch.kubernetes.io/job-completion-index=0"
        ;;
    delete) delete ;;
esac
