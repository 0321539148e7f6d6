"""What a linearisation will do and need, before it begins; and what keeps it from beginning."""

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax

from darkformer_jax.calibration.fitting import EXACT_KINDS, calibrated_config, checked_wishes
from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import validate
from darkformer_jax.data.tokenizers import load_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.linearisation.settings import LONG, TRANSFER, Settings, stage_directory
from darkformer_jax.linearisation.stages import is_done, planned_config, transfer_options
from darkformer_jax.linearisation.text import Text
from darkformer_jax.model.flops import train_step_flops
from darkformer_jax.model.network import Network
from darkformer_jax.runs.load import language_model_network
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.tasks.table import table_lines
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.init_from import check_init_from

DONE = "done"  # the state of a stage
_FREE_BYTES = 64 * 2**20  # left over, for logs and pictures


class StagePlan(NamedTuple):
    """One stage of the plan.

    Attributes:
      stage: its name.
      directory: of its run.
      steps: of the optimizer; of transfer, per layer.
      tokens: that the model reads, those of all steps together.
      flops: of the model and its teacher; None = of transfer, which is not counted.
      num_bytes: that its directory will take.
      state: whether it is done, begun or neither, in words.
    """

    stage: str
    directory: Path
    steps: int
    tokens: int
    flops: float | None
    num_bytes: int
    state: str


def exact_network(settings: Settings) -> Network:
    """The model of --workdir, without its arrays.

    Raises UserError if it is no language model, not exact or without a checkpoint, and for a context that is longer
    than the one it was made for.
    """
    workdir = Workdir(settings.workdir)
    network = language_model_network(workdir)
    others = sorted(set(network.spec.layer_kinds) - set(EXACT_KINDS))
    if others:
        raise UserError(
            f"--workdir={workdir}: its layers are {', '.join(others)}; allowed: an exact model, of "
            f"{', '.join(EXACT_KINDS)} layers"
        )
    check_init_from(workdir)
    made_for = workdir.read_config()["sequence_length"]
    if settings.longest > made_for:
        flag = "long_context" if settings.context <= made_for else "context"
        or_without = f", or --stages without {LONG}" if flag == "long_context" else ""
        raise UserError(
            f"--{flag}={settings.longest}: {workdir} was made for {made_for} tokens; allowed: at most that{or_without}"
        )
    return network


def make_plan(settings: Settings, out: Path, exact: Network) -> list[StagePlan]:
    """The stages in order. Raises UserError for settings that contradict each other or the model."""
    plans = []
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(exact.abstract_params))
    for stage in settings.stages:
        directory, steps = stage_directory(out, stage), settings.steps[stage]
        state = DONE if is_done(settings, out, stage) else "begun" if directory.exists() else ""
        if stage == TRANSFER:
            if state != DONE:  # of an older version, it may have allowed more
                _check_transfer(settings, exact)
            tokens, flops, num_bytes = settings.passages * settings.context, None, 4 * params
        else:
            config = planned_config(settings, out, stage)
            validate(config)
            experiment = Experiment.of(config, NextToken.of(config, exact.spec.vocab_size))
            tokens, num_bytes = steps * experiment.tokens_per_step, experiment.state_bytes
            teacher_flops = train_step_flops(exact.spec, config.sequence_length, experiment.tokens_per_step) / 3
            flops = steps * (experiment.step_flops + teacher_flops)
        plans.append(StagePlan(stage, directory, steps, tokens, flops, num_bytes, state))
    return plans


def _check_transfer(settings: Settings, exact: Network) -> None:
    """Raises UserError for what `calibrate` would refuse after it has read the text."""
    options = transfer_options(settings)
    replaced = model_spec(calibrated_config(options), exact.spec.vocab_size)
    begin = int(load_tokenizer(str(Workdir(settings.workdir).local)).adds_bos)
    checked_wishes(options, exact.spec, replaced, begin)


def describe(plans: list[StagePlan], text: Text) -> str:
    """The plan for people: a line per stage."""
    rows = [("stage", "steps", "tokens", "of the text", "FLOPs", "disk", "")]
    for plan in plans:
        steps = f"{plan.steps:,} per layer" if plan.stage == TRANSFER else f"{plan.steps:,}"
        flops = "not counted" if plan.flops is None else f"{plan.flops:.1e}"
        share = f"{100 * plan.tokens / text.num_tokens:.3g}%"
        rows.append((plan.directory.name, steps, f"{plan.tokens:,}", share, flops, _size(plan.num_bytes), plan.state))
    learned, held_out = f"{text.num_tokens:,} tokens to learn from", f"{text.heldout.num_bytes:,} bytes held out"
    head = f"{plans[0].directory.parent}: {learned}, {held_out}"
    return "\n".join([head, *(line.rstrip() for line in table_lines(rows))])


def require_room(plans: list[StagePlan], out: Path) -> None:
    """Raises UserError if the disk has too little room, or `out` cannot be made.

    While a checkpoint is written, the one before it is kept.
    """
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "Permission denied" if place.is_dir() else "Not a directory"
        raise UserError(f"--out={out} cannot be written: {why}")
    left = [plan.num_bytes for plan in plans if plan.state != DONE]
    if not left:
        return
    needed = sum(left) + max(left) + _FREE_BYTES
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"--out={out}: the stages need {_size(needed)} of disk, and {_size(free)} are free")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
