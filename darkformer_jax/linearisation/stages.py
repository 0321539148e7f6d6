"""The stages themselves: the config of each, whether it is done, and running it."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_collections

from darkformer_jax.calibration import CALIBRATION_FILE
from darkformer_jax.calibration.fitting import FitOptions, calibrate, calibrated_config
from darkformer_jax.calibration.summary import summary
from darkformer_jax.config.arguments import shorten_warmup
from darkformer_jax.config.conversion import conversion_config
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.linearisation import stage_config
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.linearisation.settings import TRANSFER, Settings, stage_directory
from darkformer_jax.linearisation.text import HELDOUT_FRACTION
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.log import RunProgress
from darkformer_jax.training.run import train

Note = Callable[[str], None]
ProgressOf = Callable[[ml_collections.ConfigDict], RunProgress]


def transfer_options(settings: Settings) -> FitOptions:
    """What the first stage fits, as `calibrate` does by default. It reads no text that a later stage holds out."""
    attention = conversion_config("dark").model.attention
    return FitOptions(
        workdir=settings.workdir,
        step=None,
        text=settings.text,
        test_text="",
        text_field=settings.text_field,
        mechanism="dark",
        transfer_steps=settings.steps[TRANSFER],
        learning_rate=None,
        passages=settings.passages,
        context=settings.context,
        num_features=settings.num_features,
        window=settings.window,
        num_sinks=attention.num_sinks if settings.window else 0,
        geometry=settings.geometry,
        geometry_init=settings.geometry_init,
        shrinkage=0.0,
        far_gain=settings.far_gain,
        far_horizon=settings.far_horizon,
        learn_projections=False,
        exact_layers=settings.exact_layers,
        cache_budget=settings.cache_budget,
        exact_heads=settings.exact_heads,
        seed=settings.seed,
        heldout_fraction=HELDOUT_FRACTION,
    )


def trained_config(settings: Settings, out: Path, stage: str) -> ml_collections.ConfigDict:
    """The config of a trained stage, as train.py would take it: the model's fields are None."""
    c = stage_config(stage)
    c.num_steps = settings.steps[stage]
    shorten_warmup(c)
    c.checkpoint.every = min(c.checkpoint.every, max(1, c.num_steps // 10))  # so much is lost at most
    c.init_from = str(stage_directory(out, settings.stages[settings.stages.index(stage) - 1]))
    c.distill.workdir = settings.workdir
    c.sequence_length = settings.context_of(stage)
    c.batch_size = c.eval.batch_size = settings.rows_of(stage)
    c.seed = settings.seed
    c.model.lora_rank, c.model.dtype = settings.lora, settings.dtype
    c.data.source, c.data.files, c.data.text_field = "text", settings.text, settings.text_field
    c.data.heldout_fraction = HELDOUT_FRACTION
    return c


def planned_config(settings: Settings, out: Path, stage: str) -> ml_collections.ConfigDict:
    """`trained_config` with the model of `transfer`. Before that is there, no layer or head is exact in the plan."""
    transferred = Workdir(stage_directory(out, TRANSFER))
    written = transferred.read_config() if transferred.has_begun else None
    model = dict(flat_fields(written or calibrated_config(transfer_options(settings)).to_dict()))
    c = trained_config(settings, out, stage)
    missing = [name for name, value in flat_fields(c.to_dict()) if value is None]
    c.update_from_flattened_dict({name: model[name] for name in missing})
    return c


def is_done(settings: Settings, out: Path, stage: str) -> bool:
    """Whether the stage needs no more work."""
    directory = stage_directory(out, stage)
    if stage == TRANSFER:
        return (directory / CALIBRATION_FILE).is_file()
    if not Workdir(directory).has_begun:
        return False
    with contextlib.closing(Checkpoints(Workdir(directory))) as checkpoints:
        return checkpoints.latest_good_step() == settings.steps[stage]


def run_stage(
    settings: Settings, out: Path, stage: str, note: Note, progress_of: ProgressOf, progress_bar: ProgressBar
) -> None:
    """Runs a stage to its end, from where an earlier command left it.

    Attention transfer writes its directory whole or not at all, and keeps beside it what it has found until then. It
    notes what `calibrate` prints.

    Raises:
      Stopped: a signal came; the finished step is saved.
      UserError: as `calibrate` or `train` do.
    """
    directory = stage_directory(out, stage)
    if stage == TRANSFER:
        for killed in out.glob(f".{directory.name}.*.partial"):  # by an earlier command
            shutil.rmtree(killed, ignore_errors=True)
        options = transfer_options(settings)
        note(summary(options, str(directory), calibrate(options, str(directory), progress_bar)))
        return
    config = trained_config(settings, out, stage)
    train(config, Workdir(directory), progress_of(config))
