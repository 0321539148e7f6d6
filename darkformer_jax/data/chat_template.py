"""A chat template: the Jinja program of a pretrained model that writes a conversation as text.

It runs as in transformers: in a sandbox, with `messages`, `add_generation_prompt`, the names of the tokenizer's tokens,
`raise_exception` and `tojson`. `strftime_now` is not defined: a text that changed from day to day would make another
run of the same files. Templates that ask whether it is defined write a date of their own.

What a template writes has marks, characters that no text may have. CUT stands inside every token that a message spells,
so that it stays text; `{% generation %}` puts BEGIN and END around an answer.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from darkformer_jax.errors import UserError, one_line

CUT, BEGIN, END = MARKS = ("\ufdd0", "\ufdd1", "\ufdd2")  # noncharacters of Unicode, for a program's own use

Message = Mapping[str, str]  # "role": system, user or assistant; "content"

_TAG = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """Writes conversations.

    Args:
      source: the Jinja program.
      names: tokens that it may call by name, such as "bos_token".

    Attributes:
      marks_answers: whether it has `{% generation %}` around answers.

    Raises:
      UserError: the source is not Jinja.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        import jinja2

        self.marks_answers = bool(_TAG.search(source))
        self._names = dict(names)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"the chat template cannot be read: {one_line(error)}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, with marks. With a generation prompt, an answer comes next.

        Raises UserError if the template refuses the conversation, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # the template is a program, which may raise anything
            reason = one_line(error) or type(error).__name__
            raise UserError(f"the chat template refuses the conversation: {reason}") from error


def without_marks(text: str) -> str:
    """What a template wrote, without marks."""
    return text.translate(dict.fromkeys(map(ord, MARKS)))


def cut_tokens(text: str, tokens: re.Pattern[str]) -> str:
    """The text with CUT after the first character of every token that it spells, also where two overlap.

    tokens: matches each of them. Raises UserError for one of a single character, which cannot be cut.
    """
    if not tokens.search(text):
        return text
    starts = f"(?=({tokens.pattern}))(.)"
    if single := next((match[1] for match in re.finditer(starts, text, re.DOTALL) if len(match[1]) == 1), None):
        raise UserError(f"a message has the character {single!r}, which is a special token")
    return re.sub(starts, rf"\2{CUT}", text, flags=re.DOTALL)


@functools.cache
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )  # jinja2's own escapes HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
