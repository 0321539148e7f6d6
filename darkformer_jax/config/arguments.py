"""The arguments after the colon of --config=configs/<experiment>.py:name=value,name=value.

An experiment says which of `ARGUMENTS` it has. A name means the same field in all experiments: that is how
`cli.experiment_flags` knows which fields a command line sets.
"""

from collections.abc import Collection, Iterable

import ml_collections

from darkformer_jax.config.base import LANGUAGE_MODEL, fields
from darkformer_jax.config.names import meant
from darkformer_jax.config.pattern import ATTENTION, SHORT
from darkformer_jax.config.usage import reset_unused
from darkformer_jax.errors import UserError

ARGUMENTS = {short: ATTENTION + name for short, name in SHORT.items()} | {
    "attention": f"{ATTENTION}kind",
    "window": f"{ATTENTION}window",
    "positions": f"{ATTENTION}positions",
    "decay": f"{ATTENTION}decay",
    "causal": "model.causal",
    "lora": "model.lora_rank",
    "init_from": "init_from",
    "data": "data.source",
    "files": "data.files",
    "heldout": "task.heldout_files",
    "pooling": "task.pooling",
    "context": "sequence_length",
    "length": "sequence_length",
    "batch": "batch_size",
    "train": "optimizer.train",
    "lr": "optimizer.learning_rate",
    "geometry_lr": "optimizer.geometry_learning_rate",
    "steps": "num_steps",
    "seed": "seed",
}

WARMUP = "optimizer.warmup_steps"
# Of model.attention: the paper's layers have no gates and no convolution, and M starts at the identity.
PAPER_FORM = {"decay": "none", "conv_width": 0, "geometry_init": 1.0}
PRETRAINING = ("none", "next_token")


def set_arguments(
    c: ml_collections.ConfigDict,
    arguments: Iterable[str],
    allowed: Collection[str],
    file: str,
    taken: Collection[str] = (),
) -> None:
    """Sets the fields that `name=value` strings name. What `file` set for another mechanism is as by default again.

    A warm-up that is not shorter than the steps becomes a quarter of them.

    Whether a layer uses what the arguments set is asked later, of the config with all overrides (`require_new_uses`).

    taken: the names that `take_choice` has taken out, for the message.

    Raises UserError for an argument that is not allowed, is there twice or has no value of its field's type.
    """
    given = set()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in allowed:
            hint = f"; for other fields: {hint}" if (hint := meant(name)) else ""
            raise UserError(f"{file} has no argument {name!r}; allowed: {', '.join([*allowed, *taken])}{hint}")
        field = ARGUMENTS[name]
        if field in given:
            raise UserError(f"{file}: {argument!r}: {name} is there twice")
        given.add(field)
        try:
            c.update_from_flattened_dict({field: fields()[field].parse(value)})
        except ValueError as error:
            raise UserError(f"{file}: {argument!r}: {name} {error}") from error
    if "num_steps" in given:
        shorten_warmup(c)
    reset_unused(c, given)


def shorten_warmup(c: ml_collections.ConfigDict) -> bool:
    """Makes a warm-up that is not shorter than the run a quarter of it. Returns whether it was."""
    is_long = 0 < c.num_steps <= c.optimizer.warmup_steps
    if is_long:
        c.optimizer.warmup_steps = c.num_steps // 4
    return is_long


def fit_warmup(c: ml_collections.ConfigDict, overridden: Collection[str]) -> str:
    """Shortens the warm-up of a new run if the command line's num_steps asks for it; says so, or returns "".

    overridden: the fields that the command line sets.
    """
    if "num_steps" in overridden and WARMUP not in overridden and shorten_warmup(c):
        return f"{WARMUP} = {c.optimizer.warmup_steps}, because num_steps = {c.num_steps}"
    return ""


def keep_warmup(c: ml_collections.ConfigDict, overridden: Collection[str], warmup: int) -> str:
    """Gives a run that has begun the `warmup` that it began with, unless the command line sets another; says so, or "".

    The experiment's own may differ because num_steps, now or then, shortened one of them.
    """
    if WARMUP in overridden or c.optimizer.warmup_steps == warmup:
        return ""
    c.optimizer.warmup_steps = warmup
    return f"{WARMUP} = {warmup}, as the run began"


def require_end_after_warmup(c: ml_collections.ConfigDict) -> None:
    """Raises UserError if a run that has begun is to end within its warm-up."""
    warmup = c.optimizer.warmup_steps
    if 1 < c.num_steps <= warmup:
        raise UserError(f"num_steps = {c.num_steps}: the run began with a warm-up of {warmup} steps; allowed: more")


def take_choice(arguments: list[str], name: str, allowed: tuple[str, ...], file: str) -> str:
    """Takes `name=value`, which is no field, out of the arguments; without it, the value is the first that is allowed.

    Raises UserError for another value, or if it is there twice.
    """
    values = [argument.removeprefix(f"{name}=") for argument in arguments if argument.startswith(f"{name}=")]
    if len(values) > 1 or not set(values) <= set(allowed):
        raise UserError(f"{file}: {name}={','.join(values)}; allowed: one of {', '.join(allowed)}")
    arguments[:] = [argument for argument in arguments if not argument.startswith(f"{name}=")]
    return values[0] if values else allowed[0]


def take_pretraining(c: ml_collections.ConfigDict, arguments: list[str], file: str) -> None:
    """Takes `pretrain=...`, which is no field, out of the arguments of a classifier on labelled files.

    next_token makes it a language model of the same training texts, from which `init_from=` starts the classifier. That
    one is causal, too, unless an argument says otherwise.
    """
    if take_choice(arguments, "pretrain", PRETRAINING, file) == "next_token":
        c.task.name = LANGUAGE_MODEL
        c.task.pooling = fields()["task.pooling"].default  # a language model has no head
        c.model.causal = True
    elif "init_from" in argument_names(arguments):
        c.model.causal = True


def argument_names(arguments: Iterable[str]) -> list[str]:
    """The names of `name=value` strings."""
    return [argument.partition("=")[0] for argument in arguments]


def fields_of_arguments(text: str) -> list[str]:
    """The dotted names of the fields that the text after a config's colon sets."""
    return [ARGUMENTS[name] for name in argument_names(text.split(",")) if name in ARGUMENTS]
