"""Texts from a trained language model: prompts and their continuations."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from darkformer_jax.data.tokenizers import Tokenizer, decode_continuation, encode_prompt, stream_continuation
from darkformer_jax.model.sampling import Sampler, continue_prompts


class Writer(NamedTuple):
    """Continues texts until the model ends them.

    Attributes:
      sampler: the model's.
      tokenizer: the model's.
      ends: ids at which a text ends.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    ends: frozenset[int]

    def stream(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """The continuation of the prompt, piece by piece as the model writes it."""
        ids = encode_prompt(self.tokenizer, prompt)
        tokens = (int(token[0]) for token in self.sampler.stream([ids], max_new_tokens))
        until_end = itertools.takewhile(lambda token: token not in self.ends, tokens)
        yield from stream_continuation(self.tokenizer, ids, until_end)

    def continue_all(self, prompts: Sequence[str], max_new_tokens: int) -> str:
        """The prompts, continued as one batch: for each a line `--- 'prompt'`, then the prompt and its continuation."""
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        continued = continue_prompts(self.sampler, ids, max_new_tokens, self.ends)
        return "".join(
            f"--- {prompt!r}\n{prompt}{decode_continuation(self.tokenizer, prompt_ids, new)}\n"
            for prompt, prompt_ids, new in zip(prompts, ids, continued, strict=True)
        )
