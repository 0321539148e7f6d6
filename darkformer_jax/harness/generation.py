"""Texts until a stop string: what the harness' tasks ask a model to write."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import WorkdirModel

DEFAULT_TOKENS = 256  # the harness' own where a task does not say how many

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness' names of one thing
_ALLOWED = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
_WITHOUT_EFFECT = {
    "num_beams": 1,
    "repetition_penalty": 1,
    "num_return_sequences": 1,
}  # what tasks may say all the same


class Options(NamedTuple):
    """How a text is written.

    Attributes:
      until: strings before which it ends.
      max_tokens: the most new tokens.
      temperature: 0 takes the likeliest token.
      top_k, top_p: see `Sampler`.
    """

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float


def read_options(gen_kwargs: Mapping[str, Any], task: str | None) -> Options:
    """The options that a task's `generation_kwargs` ask for, as the harness normalises them.

    Without `do_sample`, a temperature above 0 samples; `do_sample: false` takes the likeliest token at any temperature.

    Raises UserError, which names the task, for options that there are not and values that they cannot have.
    """
    where = f"generation_kwargs of {task}"
    rest = {name: value for name, value in gen_kwargs.items() if _WITHOUT_EFFECT.get(name) != value}
    unknown = sorted(set(rest) - set(_ALLOWED))
    if unknown:
        raise UserError(
            f"{where}: {unknown[0]} = {rest[unknown[0]]!r} is not supported; allowed: {', '.join(_ALLOWED)}"
        )
    until = rest.get("until")
    until = [until] if isinstance(until, str) else until or []
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise UserError(f"{where}: until = {rest['until']!r}; allowed: a string or a list of strings")
    try:
        known = normalize_gen_kwargs({name: value for name, value in rest.items() if value is not None}, DEFAULT_TOKENS)
        numbers = float(known.get("temperature", 0.0)), int(known.get("top_k", 0)), float(known.get("top_p", 1.0))
        options = Options(tuple(filter(None, until)), int(known["max_gen_toks"]), *numbers)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {dict(gen_kwargs)}: {error}") from error
    if options.max_tokens < 1:
        raise UserError(f"{where}: max_gen_toks = {options.max_tokens}: must be at least 1")
    if known.get("do_sample") and not options.temperature > 0:
        raise UserError(f"{where}: do_sample with temperature = {options.temperature}: must be above 0 to sample")
    return options


class StopWriter:
    """Continues batches of prompts until a stop string, or an id that ends a text.

    Args:
      model: a language model.
      seed: of the draws.
    """

    def __init__(self, model: WorkdirModel, seed: int) -> None:
        self._model, self._next_seed = model, seed
        self._sampler = functools.lru_cache(maxsize=8)(self._make_sampler)  # each compiles programs of its own

    def write(self, prompts: Sequence[Sequence[int]], options: Options, num_rows: int) -> list[str]:
        """The texts that continue the prompts, without the stop string. They are a batch of at least `num_rows` rows.

        Each call draws other numbers.
        """
        tokenizer = self._model.tokenizer
        ends = self._model.ends | _ids_of_stops(tokenizer, options.until)
        padded = [*prompts, *[prompts[-1]] * (num_rows - len(prompts))]  # another number of rows would be compiled anew
        new: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        sampler = self._sampler(options.temperature, options.top_k, options.top_p)
        for tokens in sampler.stream(padded, options.max_tokens, self._next_seed):
            for row, token in enumerate(tokens[: len(prompts)].tolist()):
                if running[row] and token not in ends:
                    new[row].append(token)
                    text = tokenizer.decode(new[row])
                    running[row] = not any(stop in text for stop in options.until)
                else:
                    running[row] = False
            if not any(running):
                break
        self._next_seed = (self._next_seed + 1) % 2**32
        return [postprocess_generated_text(tokenizer.decode(ids), list(options.until), None) for ids in new]

    def _make_sampler(self, temperature: float, top_k: int, top_p: float) -> Sampler:
        model = self._model
        return Sampler(
            model.network,
            model.params,
            model.projections,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            vocab_size=model.tokenizer.vocab_size,
        )


def _ids_of_stops(tokenizer: Tokenizer, until: Sequence[str]) -> set[int]:
    """The ids of stop strings that are special tokens, which no decoded text shows."""
    return {tokenizer.added_tokens[stop].id for stop in until if stop in tokenizer.added_tokens}
