"""Writes the page of a set of runs: report.md from a template, and report.html from report.md."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

from darkformer_jax.errors import printable
from darkformer_jax.reporting.benchmarks import shown
from darkformer_jax.reporting.facts import NOT_RECORDED, NUMBERS, common_facts
from darkformer_jax.reporting.findings import Findings
from darkformer_jax.reporting.rows import columns, common_settings, figure_columns, label
from darkformer_jax.reporting.themes import DARK, LIGHT


class Image(NamedTuple):
    """A picture as PNG files for the two themes."""

    light: bytes
    dark: bytes


def as_markdown(found: Findings, pictures: Mapping[str, str]) -> str:
    """The page in GitHub's Markdown. pictures: name of a file beside it -> what it shows, in words."""
    functions = {
        "columns": columns,
        "cell": shown,
        "common_settings": common_settings,
        "figure_columns": figure_columns,
        "label": label,
    }
    trained = [run for run in found.runs if run.lines]
    values = {
        "title": found.title,
        "conclusion": found.conclusion,
        "pictures": pictures,
        "stages": list(dict.fromkeys(stage for one in found.calibrations for stage in one.errors)),
        "trained": trained,
        "numbers": NUMBERS,
        "not_recorded": NOT_RECORDED,
        "facts": common_facts([run.facts for run in trained]),
    }
    environment = _environment(finalize=escape)
    text = environment.get_template("page.md.jinja").render(vars(found), **functions, **values)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    # Apart, because a sample's empty lines stay.
    return text + environment.get_template("samples.md.jinja").render(trained=trained, fenced=fenced)


def as_html(title: str, markdown: str, images: Mapping[str, Image]) -> str:
    """The same page as one HTML file, with the images inside, in the colours that the reader's system prefers.

    It loads nothing, and its content-security policy forbids loading. HTML in the Markdown is shown as text.
    """

    template = _environment().get_template("image.html.jinja")

    def image(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        found = images[str(token.attrs["src"])]
        alt = renderer.renderInlineAsText(token.children, options, env)
        return template.render(alt=alt, width=_width(found.light), light=_data(found.light), dark=_data(found.dark))

    parser = MarkdownIt("js-default")
    parser.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    parser.add_render_rule("image", image)
    page = _environment().get_template("page.html.jinja")
    return page.render(title=printable(title), body=Markup(parser.render(markdown)), light=LIGHT, dark=DARK)


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _width(png: bytes) -> int:
    """In pixels of CSS, of which one is two of the picture's."""
    return int.from_bytes(png[16:20], "big") // 2


def _environment(**options: Any) -> jinja2.Environment:
    loader = jinja2.PackageLoader("darkformer_jax.reporting", ".")
    strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict, **options)


def escape(value: Any) -> Markup:
    """Escapes a value so that Markdown shows it as it is; leaves the output of a macro, which is Markup, alone."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]<>|#~&])", r"\\\1", printable(str(value)).strip())
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # plain within a word
    return Markup(re.sub(r"^(\d*)([-+.)=])(?=\s|$|\2)", r"\1\\\2", text))  # would begin a list or draw a line


def fenced(text: str) -> Markup:
    """A block of code that shows the text line by line, with its empty lines, whatever else is in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    lines = [printable(line) for line in text.expandtabs(4).split("\n")]
    return Markup("\n".join([fence, *lines, fence]))
