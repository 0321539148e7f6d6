"""A page of sections, written as Markdown and as one self-contained HTML file; all text is escaped."""

import base64
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple


class Paragraph(NamedTuple):
    """Running text."""

    text: str


class Bullets(NamedTuple):
    """A list."""

    items: Sequence[str]


class Table(NamedTuple):
    """Cells of text; the columns from `first_number` on are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    first_number: int = 1


class Picture(NamedTuple):
    """A PNG beside the Markdown file, and what it shows."""

    file: str
    caption: str


Block = Paragraph | Bullets | Table | Picture


class Section(NamedTuple):
    """What stands under one title; "" = none, for what the page begins with."""

    title: str
    blocks: Sequence[Block]


class Page(NamedTuple):
    """All of it."""

    title: str
    sections: Sequence[Section]


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --line: #d0d7de; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --paper: #0d1117; --line: #30363d; --band: #161b22; }
}
body { margin: 2rem auto; max-width: 66rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } tbody tr:nth-child(odd) { background: var(--band); }
.number { text-align: right; } td.number { white-space: nowrap; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; }
"""


def as_html(page: Page, read_picture: Callable[[str], bytes]) -> str:
    """The page with its pictures inside. It asks for nothing from anywhere, and its policy forbids that it does."""
    body = "\n".join(_html_section(section, read_picture) for section in page.sections)
    title = escape(printable(page.title))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">\n"
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_section(section: Section, read_picture: Callable[[str], bytes]) -> str:
    blocks = "\n".join(_html_block(block, read_picture) for block in section.blocks)
    title = f"<h2>{escape(printable(section.title))}</h2>\n" if section.title else ""
    return f"<section>\n{title}{blocks}\n</section>"


def _html_block(block: Block, read_picture: Callable[[str], bytes]) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{escape(printable(block.text))}</p>"
    if isinstance(block, Bullets):
        return "<ul>\n" + "\n".join(f"<li>{escape(printable(item))}</li>" for item in block.items) + "\n</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode(read_picture(block.file)).decode("ascii")
        caption = escape(printable(block.caption))
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{_alt(block.file)}">\n'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    head = "".join(_cell("th", cell, i >= block.first_number) for i, cell in enumerate(block.head))
    rows = (
        "<tr>" + "".join(_cell("td", cell, i >= block.first_number) for i, cell in enumerate(row)) + "</tr>"
        for row in block.rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )


def _cell(tag: str, text: str, is_number: bool) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    align = ' class="number"' if is_number else ""
    return f"<{tag}{scope}{align}>{escape(printable(text))}</{tag}>"


def as_markdown(page: Page) -> str:
    """GitHub's Markdown; pictures are links to the files beside it."""
    parts = [f"# {_marked(page.title)}"]
    for section in page.sections:
        parts += [f"## {_marked(section.title)}"] if section.title else []
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _marked(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"* {_marked(item)}" for item in block.items)
    if isinstance(block, Picture):
        caption = _marked(block.caption)
        return f"![{_alt(block.file)}]({block.file})\n\n{caption}"
    rule = ["---" if i < block.first_number else "---:" for i in range(len(block.head))]
    lines = [[_marked(cell) for cell in block.head], rule, *([_marked(cell) for cell in row] for row in block.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _marked(text: str) -> str:
    """`text` without a meaning in Markdown. An underscore within a word has none."""
    escaped = re.sub(r"([\\`*\[\]<>|#~&])", r"\\\1", printable(text))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def _alt(file: str) -> str:
    """`loss curves 1`: the caption, which says more, stands below the picture."""
    return file.removesuffix(".png").replace("_", " ")


def printable(text: str) -> str:
    """Names of directories may hold line breaks and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
