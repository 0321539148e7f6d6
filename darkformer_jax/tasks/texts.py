"""Texts from a trained language model: prompts, and how it continues them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from darkformer_jax.data.tokenizers import Tokenizer, decode_continuation, encode_prompt, stream_continuation
from darkformer_jax.model.sampling import Sampler, continue_prompts


class Writer(NamedTuple):
    """Continues texts until the model ends them.

    Attributes:
      sampler: of the model.
      tokenizer: of the model.
      ends: ids that end a text, which is not continued behind them.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    ends: frozenset[int]

    def stream(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """What follows the prompt, piece by piece as the model writes it."""
        ids = encode_prompt(self.tokenizer, prompt)
        tokens = (int(token[0]) for token in self.sampler.stream([ids], max_new_tokens))
        until_end = itertools.takewhile(lambda token: token not in self.ends, tokens)
        yield from stream_continuation(self.tokenizer, ids, until_end)

    def continue_all(self, prompts: Sequence[str], max_new_tokens: int) -> str:
        """All prompts as one batch: each in quotes behind dashes, then the prompt and its continuation."""
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        continued = continue_prompts(self.sampler, ids, max_new_tokens, self.ends)
        return "".join(
            f"--- {prompt!r}\n{prompt}{decode_continuation(self.tokenizer, prompt_ids, new)}\n"
            for prompt, prompt_ids, new in zip(prompts, ids, continued, strict=True)
        )
