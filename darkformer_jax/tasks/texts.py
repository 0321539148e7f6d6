"""Texts from a trained language model: what it writes after the tokens of a prompt."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from darkformer_jax.data.tokenizers import Tokenizer, decode_continuation, stream_continuation
from darkformer_jax.model.sampling import Sampler, continue_prompts


class Writer(NamedTuple):
    """Continues prompts until the model ends its text.

    A prompt is its ids: `data.tokenizers.encode_prompt` gives those of a text, `data.chat.Chat.prompt` those of a
    conversation.

    Attributes:
      sampler: the model's.
      tokenizer: the model's.
      ends: ids at which a text ends.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    ends: frozenset[int]

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """The continuation of the prompt, piece by piece as the model writes it."""
        tokens = (int(token[0]) for token in self.sampler.stream([prompt], max_new_tokens))
        until_end = itertools.takewhile(lambda token: token not in self.ends, tokens)
        yield from stream_continuation(self.tokenizer, prompt, until_end)

    def continue_all(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """The continuations of the prompts, written as one batch."""
        continued = continue_prompts(self.sampler, prompts, max_new_tokens, self.ends)
        return [
            decode_continuation(self.tokenizer, prompt, new) for prompt, new in zip(prompts, continued, strict=True)
        ]


def headed(prompt: str, text: str) -> str:
    """One of several texts: a line `--- 'prompt'`, then the text."""
    return f"--- {prompt!r}\n{text}\n"
