"""Prompts from the held-out text of a run, so that samples continue the sort of text that the model has learned."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from darkformer_jax.data import Conversation, Split, Tokenizer
from darkformer_jax.data.chat import ANSWERS
from darkformer_jax.data.chat_template import Message

_TOKENS = 64  # are read for a prompt
_CHARACTERS = 40  # a prompt has at most


class Prompt(NamedTuple):
    """A piece of held-out text.

    Attributes:
      text: at least one character.
      place: where it was read, as a share of the tokens.
    """

    text: str
    place: float


def heldout_prompts(heldout: Split, tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """Pieces of held-out text from `count` places, evenly spaced from the beginning; fewer if there is little text.

    A piece begins with a document if one begins within 64 tokens, else with a word, and ends after a word, within 40
    characters. Text without spaces is cut anywhere.
    """
    places: dict[str, float] = {}
    for index in range(count):
        place = index * heldout.num_tokens // count
        places.setdefault(_piece(heldout, tokenizer, place), place / heldout.num_tokens)
    return [Prompt(text, place) for text, place in places.items() if text]


def heldout_questions(conversations: Sequence[Conversation], count: int) -> list[list[Message]]:
    """What comes before the first answer of `count` conversations, evenly spaced; fewer if there are few."""
    places = dict.fromkeys(index * len(conversations) // count for index in range(count))
    found = [conversations[place].messages for place in places]
    return [messages[: [message["role"] for message in messages].index(ANSWERS)] for messages in found]


def _piece(heldout: Split, tokenizer: Tokenizer, place: int) -> str:
    length = min(2 * _TOKENS, heldout.num_tokens - place)
    (tokens,), (is_start,) = heldout.read(np.array([place]), length)
    begin = next(iter(np.flatnonzero(is_start[:_TOKENS])), 0)
    end = next((stop for stop in np.flatnonzero(is_start) if stop > begin), begin + _TOKENS)
    separators = {tokenizer.bos_id, tokenizer.eos_id}
    text = tokenizer.decode(int(token) for token in tokens[begin:end] if int(token) not in separators)
    text = text.strip("\N{REPLACEMENT CHARACTER}")  # parts of a character at both ends
    if not is_start[begin]:
        text = text[_first_space(text) :]
    text = text.strip()
    if len(text) <= _CHARACTERS:
        return text
    words = text[: _CHARACTERS + 1].rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else text[:_CHARACTERS]


def _first_space(text: str) -> int:
    """The place of the first space or line end; 0 if there is none."""
    return next((place for place, character in enumerate(text) if character.isspace()), 0)
