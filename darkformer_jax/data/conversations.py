"""Conversations in .jsonl and .parquet files, and both splits of them as token streams.

A record has `messages`, a list of {"role": ..., "content": ...}, or the strings `prompt` and `completion`. Other fields
of a record are not read; other fields of a message are refused, because they could change what it means.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from darkformer_jax.data import parquet_files
from darkformer_jax.data.chat import ANSWERS, ROLES, Chat, ChatTokens
from darkformer_jax.data.chat_template import Message
from darkformer_jax.data.heldout import hash_fraction
from darkformer_jax.data.sources import find_files
from darkformer_jax.data.stream import MemoryStream, token_dtype
from darkformer_jax.data.text_files import kind_of, read_json_records, shown_names
from darkformer_jax.errors import UserError, printable

CHAT_SOURCE = "chat"
SUFFIXES = (".jsonl", ".jsonl.gz", parquet_files.SUFFIX)

_MESSAGES, _PROMPT, _COMPLETION = "messages", "prompt", "completion"
_FORMS = f'"{_MESSAGES}", or "{_PROMPT}" and "{_COMPLETION}"'


class Conversation(NamedTuple):
    """A conversation and where it was found, a path with a line or row."""

    place: str
    messages: list[Message]


class ChatStream(MemoryStream):
    """Conversations end to end. Nothing is between them: the template writes what begins and ends one.

    Args:
      conversations: at least one.
      vocab_size: decides the width of a token.
    """

    def __init__(self, conversations: Sequence[ChatTokens], vocab_size: int) -> None:
        sizes = [len(conversation.ids) for conversation in conversations]
        tokens = np.concatenate([conversation.ids for conversation in conversations]).astype(token_dtype(vocab_size))
        is_start = np.zeros(len(tokens), np.bool_)
        is_start[np.cumsum([0, *sizes[:-1]])] = True
        self._is_learned = np.concatenate([conversation.is_learned for conversation in conversations]) & ~is_start
        num_bytes = sum(conversation.num_bytes for conversation in conversations)
        super().__init__(tokens, is_start, num_bytes, starts_are_targets=False)
        learned = np.packbits(self._is_learned).tobytes()
        self.fingerprint = hashlib.sha256(self.fingerprint.encode() + learned).hexdigest()

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss: those of answers."""
        return int(self._is_learned.sum())

    def are_targets(self, starts: np.ndarray, is_start: np.ndarray) -> np.ndarray:
        """Whether tokens belong to answers."""
        positions = starts[:, None] + np.arange(is_start.shape[1])
        return self._is_learned[np.minimum(positions, self.num_tokens - 1)] & (positions < self.num_tokens)

    def num_cut(self, row_length: int) -> int:
        """Conversations that go on in another row, where what was before the cut is not seen."""
        begins = np.flatnonzero(self._is_start)
        ends = np.append(begins[1:], self.num_tokens)
        # Token i is an input of row i // row_length; the last one of a conversation only has to be predicted.
        return int((begins // row_length < (ends - 2) // row_length).sum())


def find_chat_files(files: str) -> list[str]:
    """Sorted paths of the files that comma-separated globs and directories name.

    Raises UserError if there is none, or one of another kind.
    """
    paths = find_files(files, SUFFIXES, CHAT_SOURCE)
    for path in paths:
        if path.endswith(parquet_files.SUFFIX):
            parquet_files.require_pyarrow(path)
    return paths


def read_conversations(files: str) -> Iterator[Conversation]:
    """The conversations of all files, in order.

    Raises UserError, which names the file and the line or row, for the first that is none.
    """
    for path in find_chat_files(files):
        for number, record in _records(path):
            place = f"{path}:{number}"
            try:
                messages = _messages(record)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            yield Conversation(place, messages)


def tokenise(conversations: Iterable[Conversation], chat: Chat) -> Iterator[ChatTokens]:
    """The tokens of each. Raises UserError, which names the place, for one that the template does not write."""
    for place, messages in conversations:
        try:
            yield chat.conversation(messages)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def split(conversations: Sequence[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations. A hash of the messages decides, so that copies fall on the same side.

    The one with the smallest hash is always held out, the one with the largest never.

    Raises UserError for a fraction outside (0, 1), or less than two different conversations.
    """
    if not 0 < fraction < 1:
        raise UserError(f"heldout_fraction={fraction} is out of range; allowed: more than 0 and less than 1")
    hashes = [hash_fraction(json.dumps(c.messages, ensure_ascii=False), "heldout") for c in conversations]
    if len(set(hashes)) < 2:
        raise UserError(
            "the data holds too few conversations to train on some and hold another out; allowed: two different ones "
            "or more"
        )
    first, last = min(hashes), max(hashes)
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation, value in zip(conversations, hashes, strict=True):
        sides[value == first or (value < fraction and value != last)].append(conversation)
    return sides


def _records(path: str) -> Iterator[tuple[int, Any]]:
    if not path.endswith(parquet_files.SUFFIX):
        return read_json_records(path)
    columns = parquet_files.column_names(path)
    wanted = [_MESSAGES] if _MESSAGES in columns else [_PROMPT, _COMPLETION]
    if missing := [name for name in wanted if name not in columns]:
        raise UserError(f'{path}: no column "{missing[0]}"; allowed: {_FORMS}; it has: {shown_names(columns)}')
    return parquet_files.read_parquet_values(path, wanted)


def _messages(record: Any) -> list[Message]:
    """The messages of a record, checked."""
    if not isinstance(record, dict):
        raise UserError(f"the line is {kind_of(record)}, not an object")
    if record.get(_MESSAGES) is not None:
        messages = record[_MESSAGES]
        if not isinstance(messages, list) or not messages:
            raise UserError(f'"{_MESSAGES}" is {kind_of(messages)}; allowed: a list of at least one message')
    elif _PROMPT in record and _COMPLETION in record:
        for name in (_PROMPT, _COMPLETION):
            if not isinstance(record[name], str):
                raise UserError(f'"{name}" is {kind_of(record[name])}; allowed: a string (or "{_MESSAGES}", a list)')
        roles = {_PROMPT: "user", _COMPLETION: ANSWERS}
        messages = [{"role": role, "content": record[name]} for name, role in roles.items()]
    else:
        raise UserError(f"no conversation; allowed: {_FORMS}; it has: {shown_names(record)}")
    checked = [_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    first = next((message["role"] for message in checked if message["role"] != "system"), "")
    if ANSWERS not in [message["role"] for message in checked]:
        raise UserError(f'no message has the role "{ANSWERS}": there is no answer to learn')
    if first == ANSWERS:
        raise UserError("an answer comes before any question; allowed: a message of the user before it")
    return checked


def _message(message: Any, which: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{which} is {kind_of(message)}; allowed: an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        shown = f'the role "{printable(role)}"' if isinstance(role, str) else "no role"
        raise UserError(f"{which} has {shown}; allowed: {', '.join(ROLES)}")
    others = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
    if others:
        raise UserError(f"{which} has {shown_names(others)}; allowed: role and content alone")
    if not isinstance(content, str):
        raise UserError(f"{which}: its content is {kind_of(content)}; allowed: a string")
    if role == ANSWERS and not content.strip():
        raise UserError(f"{which} is an answer without text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{which} holds a lone surrogate at character {error.start}") from error
    return {"role": role, "content": content}
