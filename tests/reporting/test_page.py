import base64
import io
import re
from html.parser import HTMLParser

import PIL.Image
import pytest

from darkformer_jax.reporting.page import Image, as_html, escape, fenced
from darkformer_jax.reporting.themes import DARK, LIGHT


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
def test_a_name_is_shown_as_it_is_wherever_it_stands(name):
    e = escape(name)
    page = Text()
    page.feed(as_html(name, f"# {e}\n\n{e}\n\n* {e}\n\n| head |\n| ---: |\n| {e} |\n", {}).split("</style>")[1])
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


class Tags(HTMLParser):
    """Every element with its attributes, in the order of the page."""

    def __init__(self, html):
        super().__init__()
        self.all = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))

    def named(self, tag):
        return [attributes for name, attributes in self.all if name == tag]


def png(width, colour):
    content = io.BytesIO()
    PIL.Image.new("RGB", (width, 10), colour).save(content, "png")
    return content.getvalue()


def test_pictures_of_both_themes_are_inside_and_the_browser_takes_the_one_that_its_user_prefers():
    image = Image(png(640, "white"), png(640, "black"))
    alt = 'a "1" <b> [x] _y_'
    tags = Tags(as_html("t", f"![{escape(alt)}](a_1.png)\n", {"a_1.png": image}))
    (picture,) = [i for i, (tag, _) in enumerate(tags.all) if tag == "picture"]
    (source, of_dark), (img, of_light) = tags.all[picture + 1 : picture + 3]
    data = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in image]
    assert (source, of_dark) == ("source", {"media": "(prefers-color-scheme: dark)", "srcset": data[1]})
    assert (img, of_light) == ("img", {"src": data[0], "alt": alt, "width": "320"})


def test_numbers_are_aligned_to_the_right_and_titles_are_escaped():
    html = as_html("<i>", "| name | n |\n| --- | ---: |\n| a | 1 |\n", {})
    assert "<title>&lt;i&gt;</title>" in html
    assert '<td style="text-align:right">1</td>' in html and "<td>a</td>" in html


def test_nothing_is_wider_than_a_small_window():
    """Tables scroll in a box that the keyboard reaches, pictures shrink, and samples and long names wrap."""
    html = as_html("t", "| a |\n| --- |\n| 1 |\n\n| b |\n| --- |\n| 2 |\n", {})
    tags = Tags(html)
    boxes = [tags.all[i - 1] for i, (tag, _) in enumerate(tags.all) if tag == "table"]
    assert boxes == [("div", {"class": "wide", "tabindex": "0"})] * 2
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tags.named("meta")
    for rule in (
        r"\.wide { overflow-x: auto;",
        r"img { max-width: 100%; height: auto; }",
        r"pre { [^}]*white-space: pre-wrap;",
        r"body { [^}]*overflow-wrap: anywhere;",
    ):
        assert re.search(rule, html), rule


def test_the_page_has_the_colours_of_both_themes():
    html = as_html("t", "x", {})
    light, dark = html.split("@media (prefers-color-scheme: dark)")
    for theme, style in ((LIGHT, light), (DARK, dark)):
        for name in ("ink", "soft", "ground", "rule"):
            assert f"--{name}: {getattr(theme, name)};" in style
    assert "color-scheme: light dark" in light


SAMPLES = ("a\n\n\n\nb", "```\n<script>\n````\n", "~~~", "    indented\n\n- x", "# x\n| a |", "&amp; \\* _", "`", "")


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_is_shown_line_by_line_as_it_is(sample):
    page = Text()
    page.feed(as_html("t", f"x\n\n{fenced(sample)}\n\ny\n", {}).split("</style>")[1])
    assert page.tags == ["body", "main", "p", "pre", "code", "p"]
    assert page.texts.get("code", "") == (f"{sample}\n" if sample.strip() else "")


def test_control_characters_of_a_sample_are_shown_as_their_codes():
    assert fenced("a\x1b[31m\r\n\tb") == "```\na\\x1b[31m\\r\n    b\n```"
