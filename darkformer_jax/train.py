"""Trains the experiment that a config describes. Run it again with the same --workdir to resume.

python train.py                                                          the quickstart: a small model, real text
python train.py --config=configs/lm_1b.py --workdir=runs/lm_1b           another experiment
python train.py --workdir=runs/lm_1b                                     resume, with the config that the run has
python train.py --config=configs/ablation.py:attention=performer,m=128   an ablation
python train.py --config=configs/finetune.py:dark --config.init_from=runs/smollm2   a pretrained model, fine-tuned
python train.py --workdir=runs/wide --config.model.mlp_dim=1024 --dry_run   override any field; print sizes and stop

On several machines, run the same command on each. On TPU VMs and under srun, the processes find each other. Elsewhere,
give --coordinator=HOST:PORT --num_processes=N --process_id=I, where HOST is that of process 0. launch/ has scripts.

On CPUs, a small model's rows are divided over the cores, a JAX device for each; JAX_NUM_CPU_DEVICES=1 declines.
"""

import sys
import traceback

from absl import app, flags, logging

from darkformer_jax.cli.experiment_flags import (
    config_file,
    define_whole_number,
    overridden_fields,
    parse_experiment_flags,
)
from darkformer_jax.cli.experiments import FOLDER, experiments_root
from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.distributed import processes
from darkformer_jax.distributed.libtpu import quiet_libtpu
from darkformer_jax.distributed.platform import jax_does_not_start
from darkformer_jax.errors import Transient, UserError, one_line

DEFAULT_CONFIG = str(experiments_root() / FOLDER / "quickstart.py")  # from any directory
FLAGS = flags.FLAGS


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake is one line and exit status 2."""
    return parse_experiment_flags(argv, "train", __doc__, DEFAULT_CONFIG, define_flags)


def define_flags() -> None:
    """Defines the flags beside --config."""
    flags.DEFINE_string("workdir", None, "Directory of the run (default: runs/<name of the config file>).")
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Print parameters, state size and tokens per step of the run in --workdir, or refuse it; write nothing.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if the processes cannot find it themselves.")
    define_whole_number("num_processes", None, "Number of processes that train together; with --coordinator.")
    define_whole_number("process_id", None, "Index of this process, from 0; with --coordinator.")
    define_whole_number(
        "coordinator_timeout", 300, "Seconds to wait for all processes at the start.", lower_bound=1, upper_bound=86400
    )


def default_workdir() -> str:
    """runs/<name of the config file>."""
    path = config_file() or DEFAULT_CONFIG
    return "runs/" + path.partition(":")[0].rpartition("/")[2].removesuffix(".py")


def main(argv: list[str]) -> None:
    """Trains. Exit status: 2 after a mistake, in one line (1 if it may pass), and 128 + its number after a signal."""
    from darkformer_jax.training.stopping import Stopped  # in here, and more in `_train`, for a quick --help

    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step of every save
    quiet_libtpu()
    stop: Stopped | None = None
    try:
        try:
            _train()
        except Stopped as stopped:
            stop = stopped
            print(stop, file=sys.stderr)
        processes.leave()
    except UserError as error:
        # Kubernetes (launch/gke.sh) starts the processes again after 1, and gives up after 2.
        processes.fail(str(error), 1 if isinstance(error, Transient) else 2)
    except OSError as error:  # such as a full disk
        processes.fail(one_line(error), 1)
    except KeyboardInterrupt:
        processes.fail("interrupted while no step was under way", 130)
    except Exception as error:
        if isinstance(error, RuntimeError) and (line := jax_does_not_start(error)):
            processes.fail(line, 2)
        if not processes.is_distributed():
            raise
        traceback.print_exc()
        hint = "; if a connection was lost, another process has died" if "onnection" in str(error) else ""
        processes.fail(f"{type(error).__name__}: {one_line(error)[:300]}{hint}", 1)
    if stop:
        sys.exit(stop.exit_status)


def _train() -> None:
    from darkformer_jax.cli.progress import Progress
    from darkformer_jax.runs.workdir import CONFIG_FILE, Workdir
    from darkformer_jax.training.run import dry_run, train

    cluster = processes.cluster_of_flags(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    timeout = FLAGS.coordinator_timeout
    processes.join(cluster or processes.cluster_of_environment(timeout), timeout)
    processes.require_same("command", {"--dry_run": FLAGS.dry_run})
    config = FLAGS.config
    workdir = Workdir(default_workdir() if FLAGS.workdir is None else FLAGS.workdir)
    progress = Progress(config.num_steps, config.log.every)
    if config_file() is None:
        progress.note(f"no --config: the experiment is that of {workdir}/{CONFIG_FILE}")
    if FLAGS.dry_run:
        dry_run(config, overridden_fields(), workdir, over_cores=True)
    else:
        train(config, workdir, progress, overridden_fields(), over_cores=True)


if __name__ == "__main__":
    with lost_output_is_no_crash():
        start_with_huge_pages()
        app.run(main, flags_parser=parse_flags)
