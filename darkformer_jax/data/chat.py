"""Conversations as tokens, in the form that a model's chat template gives them, and which of them are answers.

The ids are those of the whole text, tokenised once, with the tokens that the template writes read as tokens: what
transformers' `apply_chat_template` gives. A token that a *message* spells, such as <|im_end|>, stays text: the text is
cut inside it, and what is on both sides is tokenised apart. Such tokens are all that the tokenizer calls special, and
those with which the template marks turns. Others, such as <think>, are an answer's own.

An answer begins where the template's generation prompt ends, so that a model learns what it will have to write, after
what it will have seen. It ends with the token that ends the turn. So the text of a conversation's beginning must be
the beginning of its text, or the template must mark its answers with `{% generation %}`.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from darkformer_jax.data.chat_template import BEGIN, CUT, END, MARKS, ChatTemplate, Message, cut_tokens, without_marks
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.data.tokens_in_text import any_of
from darkformer_jax.errors import UserError

ANSWERS = "assistant"  # the role whose messages are learned
ROLES = ("system", "user", ANSWERS)
# What templates are asked once, to see how they mark turns.
_QUESTION = {"role": "user", "content": "Which are the planets?"}
_ANSWER = {"role": ANSWERS, "content": "There are eight."}
_SYSTEM = {"role": "system", "content": "Be brief"}


class ChatTokens(NamedTuple):
    """A conversation as tokens.

    Attributes:
      ids: [n] int32.
      is_learned: [n] bool: the token belongs to an answer, or ends one.
      num_bytes: UTF-8 bytes of the answers' text, without the tokens that end them.
    """

    ids: np.ndarray
    is_learned: np.ndarray
    num_bytes: int


class Chat:
    """A tokenizer with its chat template.

    Args:
      tokenizer: the model's.
      where: the directory it is from, for errors.

    Attributes:
      ends: the id that ends an answer; empty if the template ends answers with no token.

    Raises:
      UserError: the tokenizer has no template, or one that does not write a question and its answer.
    """

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{where}: the tokenizer has no chat template; convert a model that has one (once more, if an earlier "
                "version converted it), or put a chat_template.jinja there"
            )
        self._tokenizer = tokenizer
        try:
            self._template = ChatTemplate(tokenizer.chat_template, tokenizer.token_names)
            control, after_answer = self._control_tokens()
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        self._pattern = re.compile(any_of(control))
        self._control_ids = np.array([tokenizer.added_tokens[token].id for token in control], np.int64)
        end = self._pattern.search(after_answer)
        self.ends = frozenset({tokenizer.added_tokens[end[0]].id} if end else ())

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model writes the next answer. Raises UserError, as `conversation` does."""
        text = self._template.render(self._as_text(messages), add_generation_prompt=True)
        return self._tokenise(text).ids.tolist()

    def conversation(self, messages: Sequence[Message]) -> ChatTokens:
        """The tokens of a conversation up to its last answer; what follows that has nothing to teach.

        Raises UserError: there is no answer; the template refuses the conversation, writes its beginning in another
        way once more follows, or ends an answer with no token.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == ANSWERS]
        if not answers:
            raise UserError(f'no message has the role "{ANSWERS}": there is no answer to learn')
        messages = self._as_text(messages[: answers[-1] + 1])
        marked = self._template.render(messages)
        text = self._tokenise(marked)
        has_tag = self._template.marks_answers
        is_learned, num_bytes = np.zeros(len(text.ids), np.bool_), 0
        for begin, end in _tagged(marked) if has_tag else self._turns(marked, messages, answers):
            first, last = text.answer(begin, end, may_end_behind=has_tag)
            is_learned[first : last + 1] = True
            num_bytes += len(text.text[begin : text.starts[last]].encode("utf-8"))
        if not is_learned.any():
            raise UserError("the chat template marks no answer with {% generation %}")
        return ChatTokens(text.ids, is_learned, num_bytes)

    def _as_text(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with every token that one of them spells cut. Raises UserError for a mark in one of them."""
        for message in messages:
            if found := next((mark for mark in MARKS if mark in message["content"]), None):
                raise UserError(f"a message has the character U+{ord(found):04X}, which no text may have")
        return [{**message, "content": cut_tokens(message["content"], self._pattern)} for message in messages]

    def _turns(self, marked: str, messages: Sequence[Message], answers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each answer begins and its turn ends, in the text of the conversation."""
        for number in answers:
            before = self._template.render(messages[:number], add_generation_prompt=True)
            until = self._template.render(messages[: number + 1])
            if not (marked.startswith(until) and until.startswith(before)):
                raise UserError(
                    f"the chat template writes the text before message {number + 1}, or that message, in another way "
                    "where more follows; allowed: a template whose text only grows, or one with {% generation %} "
                    "around answers"
                )
            yield len(without_marks(before)), len(without_marks(until))

    def _tokenise(self, marked: str) -> "_Text":
        """The tokens of what the template wrote."""
        pieces = [without_marks(piece) for piece in marked.split(CUT)]
        encoded = self._tokenizer.encode_with_added(pieces)
        begins = np.cumsum([0, *map(len, pieces)])
        ids = np.concatenate([piece.ids for piece in encoded]).astype(np.int32)
        starts = np.concatenate([piece.starts + begin for piece, begin in zip(encoded, begins, strict=False)])
        is_control = np.isin(ids, self._control_ids)
        if is_control.sum() != sum(len(self._pattern.findall(piece)) for piece in pieces):
            raise UserError("the tokenizer reads a special token out of a message that does not spell it exactly")
        return _Text("".join(pieces), ids, starts.astype(np.int64), is_control)

    def _control_tokens(self) -> tuple[list[str], str]:
        """The tokens that no message may inject, and what the template writes after an answer.

        They are the special ones, and those that the template writes around messages.
        """
        question = self._template.render([_QUESTION], add_generation_prompt=True)
        turn = self._template.render([_QUESTION, _ANSWER])
        for text, message in (question, _QUESTION), (turn, _ANSWER):
            if message["content"] not in text:
                raise UserError(
                    f"the chat template leaves out what the message {dict(message)} says; it may expect a list of "
                    "parts as content, which is not supported"
                )
        after_answer = turn.rpartition(_ANSWER["content"])[2]
        written = question + after_answer
        with contextlib.suppress(UserError):  # some templates have no system messages
            written += self._template.render([_SYSTEM, _QUESTION])
        added = self._tokenizer.added_tokens.items()
        tokens = [token for token, (_, is_special) in added if is_special or (token.strip() and token in written)]
        return tokens, after_answer


class _Text(NamedTuple):
    """A conversation's text, its tokens and where they begin, and which of them are the template's own."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    is_control: np.ndarray

    def answer(self, begin: int, end: int, may_end_behind: bool) -> tuple[int, int]:
        """The first and the last token of the answer whose turn is text[begin:end].

        The last one is the template's own, with nothing but space behind it.

        may_end_behind: it may also be the one that follows the turn.
        """
        inside = np.flatnonzero((self.starts >= begin) & (self.starts < end))
        ends = inside[self.is_control[inside]]
        if len(ends):
            last = int(ends[-1])
            if last == inside[-1] or not self.text[self.starts[last + 1] : end].strip():
                return int(inside[0]), last
        behind = int(np.searchsorted(self.starts, end))
        if may_end_behind and behind < len(self.ids) and self.is_control[behind]:
            return int(inside[0]) if len(inside) else behind, behind
        raise UserError("the chat template writes no token at the end of an answer, so none could be learned")


def _tagged(marked: str) -> Iterator[tuple[int, int]]:
    """Where `{% generation %}` begins and ends, in the text without marks."""
    begin = 0
    place = 0
    for piece in re.split(f"([{BEGIN}{END}])", marked.replace(CUT, "")):
        if piece == BEGIN:
            begin = place
        elif piece == END:
            yield begin, place
        else:
            place += len(piece)
