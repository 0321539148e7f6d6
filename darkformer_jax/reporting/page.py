"""Writes the page of a set of runs: report.md from a template, and report.html from report.md."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from darkformer_jax.errors import printable
from darkformer_jax.reporting.findings import Findings
from darkformer_jax.reporting.rows import columns, common_settings, figure_columns, label


def as_markdown(found: Findings, pictures: Sequence[str]) -> str:
    """The page in GitHub's Markdown; `pictures` are the names of the files beside it."""
    template = _environment(finalize=escape).get_template("page.md.jinja")
    functions = {
        "columns": columns,
        "common_settings": common_settings,
        "figure_columns": figure_columns,
        "label": label,
    }
    stages = list(dict.fromkeys(stage for one in found.calibrations for stage in one.errors))
    text = template.render(vars(found), **functions, pictures=pictures, stages=stages)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def as_html(title: str, markdown: str, directory: Path) -> str:
    """The same page as one HTML file, with the pictures of `directory` inside.

    It loads nothing, and its content-security policy forbids loading. HTML in the Markdown is shown as text.
    """
    parser = MarkdownIt("js-default")
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        content = base64.b64encode((directory / Path(str(image.attrs["src"])).name).read_bytes())
        image.attrs["src"] = f"data:image/png;base64,{content.decode('ascii')}"
    body = Markup(parser.renderer.render(tokens, parser.options, {}))
    return _environment().get_template("page.html.jinja").render(title=printable(title), body=body)


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
