#!/usr/bin/env bash
# Submits a run on GPUs to Slurm, one process per GPU; --help says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

usage() {
    cat <<'END'
launch/slurm.sh --nodes=N --gpus=N --time=TIME [flags] [--dry-run] -- --workdir=DIRECTORY [flags of train.py]

  --nodes=N            how many nodes
  --gpus=N             GPUs per node, with one process each
  --time=TIME          time limit, as sbatch takes it (24:00:00, 2-00:00:00); before its end the run saves and queues again
  --partition= --account= --qos=   as your cluster wants them
  --cpus=N             CPU cores for each process (default: the cluster's)
  --grace=SECONDS      how long before the limit the run is told to save (default: 120)
  --name=NAME          the job's (default: darkformer); its output is runs/slurm/NAME-<job>.log in this clone
  --env=NAME=VALUE     for train.py; may be given several times
  --directive=OPTIONS  more of sbatch's options (--directive='--constraint=h100 --mem=0')

This clone, its .venv ("bash launch/install.sh gpu") and --workdir must be on a disk that all nodes share.
--dry-run prints the batch script and does nothing.  launch/README.md has an example and what goes wrong.
END
}

check_directives() { # each becomes a word, --directive a line, of an #SBATCH comment
    local flag
    for flag in name time partition account qos; do
        case "${!flag}" in *[[:space:]]*) fail "--$flag=${!flag}: no spaces, an #SBATCH line cannot hold them" ;; esac
    done
    case "$name" in */* | *%*) fail "--name=$name: no / and no %, it is part of the log's name" ;; esac
    case "$directive" in *$'\n'*) fail "--directive: one line; it may hold several of sbatch's options" ;; esac
}

directives() {
    printf '#SBATCH %s\n' "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
        ${cpus:+"--cpus-per-task=$cpus"} "--time=$time" ${partition:+"--partition=$partition"} \
        ${account:+"--account=$account"} ${qos:+"--qos=$qos"} ${directive:+"$directive"} \
        "--requeue" "--signal=TERM@$grace" "--open-mode=append" "--output=runs/slurm/%x-%j.log"
}

batch_script() {
    cat <<END
#!/usr/bin/env bash
$(directives)
set -uo pipefail
cd $(quoted "$PWD") || exit 2
export JAX_PLATFORMS=cuda,cpu  # without a GPU that works: an error, not a run on the CPU
$([ ${#environment[@]} = 0 ] || printf 'export %s\n' "$(quoted "${environment[@]}")")
$([ -z "$cpus" ] || printf 'export SRUN_CPUS_PER_TASK=%s  # srun no longer takes it from the job\n' "$cpus")

# scancel and preemption signal this script as well as the processes; the time limit's --signal the processes alone.
ended_by=limit
trap 'ended_by=other' TERM

# JAX finds the coordinator, the number of processes and its own number in srun's variables, and takes the GPU of its
# number on the node. So every process must see all GPUs of its node, and nothing binds them. --kill-on-bad-exit=0,
# because processes that save and end together must not be killed when the first has ended. --wait ends those that wait
# for a dead one.
srun --kill-on-bad-exit=0 --wait=120 $(quoted "$venv/bin/python" -u train.py "${train_flags[@]}")
status=\$?

# 143 and 138: train.py has saved because of SIGTERM or of SIGUSR1, with which some sites warn. A job that was preempted
# is queued again by Slurm itself (--requeue).
if { [ "\$status" = 143 ] || [ "\$status" = 138 ]; } && [ "\$ended_by" = limit ]; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
END
}

name=darkformer nodes="" gpus="" time="" partition="" account="" qos="" cpus="" grace=120 directive="" dry_run=""
parse_flags "name nodes gpus time partition account qos cpus grace directive" "dry_run" "$@"
need nodes gpus time
need_number nodes gpus grace ${cpus:+cpus}
check_directives
need_workdir
venv="${DARKFORMER_VENV:-.venv}"

if [ -n "$dry_run" ]; then
    echo "# sbatch, from $PWD, of:"
    batch_script
    exit
fi
command -v sbatch >/dev/null || fail "sbatch is not on this machine; run this on a login node of the cluster"
[ -x "$venv/bin/python" ] || fail "$venv is not installed here ($PWD); run: bash launch/install.sh gpu"
mkdir -p runs/slurm # Slurm makes no directories for its logs; without it the job fails and says nothing
batch_script | sbatch
