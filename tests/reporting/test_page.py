from html.parser import HTMLParser

import pytest

from darkformer_jax.reporting.page import as_html, escape


class Text(HTMLParser):
    """The text of the innermost elements, by their tag, and all tags."""

    def __init__(self):
        super().__init__()
        self.texts, self.tags = {}, []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.texts[self.tags[-1]] = self.texts.get(self.tags[-1], "") + data


NAMES = (
    "runs/dark-m64_lr0.001",
    "a_b *c* __init__ _x_ a_",
    "<b>bold</b> <!-- --> &amp; <script>",
    "a|b \\| c\\",
    "[x](http://example.com) ![y](z) <http://example.com>",
    "`code` ~~struck~~ ```",
    *("- x", "+ x", "1. x", "2) x", "-", "# x", "> x", "---", "===", "~~~", "* * *", "| --- |", "-0.39 ± 0.1"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_wherever_it_stands(tmp_path, name):
    e = escape(name)
    page = Text()
    page.feed(as_html(name, f"# {e}\n\n{e}\n\n* {e}\n\n| head |\n| ---: |\n| {e} |\n", tmp_path).split("</style>")[1])
    assert page.tags == [
        "body",
        "main",
        "h1",
        "p",
        "ul",
        "li",
        "div",
        "table",
        "thead",
        "tr",
        "th",
        "tbody",
        "tr",
        "td",
    ]
    assert [page.texts[tag] for tag in ("h1", "p", "li", "td")] == [name] * 4


def test_what_cannot_be_printed_is_shown_as_its_code():
    assert escape("a\nb\udcff\x1b") == r"a\\nb\\udcff\\x1b"


def test_pictures_are_inside_and_numbers_are_aligned_to_the_right(tmp_path):
    (tmp_path / "a_1.png").write_bytes(b"picture")
    html = as_html("<i>", "![a 1](a_1.png)\n\n| name | n |\n| --- | ---: |\n| a | 1 |\n", tmp_path)
    assert '<img src="data:image/png;base64,cGljdHVyZQ==" alt="a 1">' in html and "<title>&lt;i&gt;</title>" in html
    assert '<td style="text-align:right">1</td>' in html and "<td>a</td>" in html
