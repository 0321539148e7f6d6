"""Pictures on light and dark pages, and the words that stand for them."""

import io
import json
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from darkformer_jax.reporting import findings
from darkformer_jax.reporting.findings import collect
from darkformer_jax.reporting.plots import PIXELS_PER_INCH, pictures_of
from darkformer_jax.reporting.spectra import Spectra
from darkformer_jax.reporting.themes import DARK, LIGHT
from tests.test_report import write_calibration, write_run

THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One of every kind, with as many lines as a plot has."""
    root = tmp_path_factory.mktemp("runs")
    for i, m in enumerate((8, 16, 32, 64, 128)):
        for seed in (0, 1):
            write_run(root / f"dark-{m}-{seed}", 3 - i / 8 + seed / 4, f"attention=dark,m={m},seed={seed}")
    write_run(root / "fast", 2.5, "attention=dark,lr=0.01")
    write_run(root / "broken", 2.5, "attention=dark,lr=0.1", last_step=12, broken=True)
    write_run(root / "exact", 2.0, "attention=softmax")
    write_run(root / "other", 3.5, "attention=performer")
    for m in (64, 128):
        (root / f"calibrated-{m}").mkdir()
        (root / f"calibrated-{m}" / "config.json").write_bytes((root / "exact" / "config.json").read_bytes())
        write_calibration(root / f"calibrated-{m}", 6.4 / m, m)
    with pytest.MonkeyPatch.context() as patch:
        sizes = iter((2, 24, 6, 7, 1))
        patch.setattr(findings, "read_spectra", lambda workdir: spectra_of(workdir, next(sizes)))
        return pictures_of(collect(f"{root}/*"))


def spectra_of(workdir, num_layers):
    """Layer i: from 2 (i + 1) to (i + 1) / 2, in each of two heads."""
    eigenvalues = np.geomspace(2, 0.5, 8) * np.arange(1, num_layers + 1)[:, None, None] * np.ones((1, 2, 1))
    return Spectra(workdir, 20, 1.0, list(range(num_layers)), eigenvalues)


def named(pictures, start):
    return [picture for picture in pictures if picture.name.startswith(start)]


def luminance(colour):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b):
    """WCAG's."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@THEMES
def test_every_line_and_word_stands_out_from_the_ground(pictures, theme):
    kinds = {re.sub(r"_\d.*|\.png", "", picture.name) for picture in pictures}
    assert kinds == {"loss_curves", "learning_rates", "features", "calibration_features", "attention_error", "spectra"}
    for picture in pictures:
        with matplotlib.rc_context(theme.settings):
            figure = picture.draw(theme)
            figure.draw_without_rendering()
            for axes in figure.axes:
                assert axes.get_facecolor() == figure.get_facecolor() == (*to_rgb(theme.ground), 1)
                for line in axes.get_lines():
                    assert contrast(line.get_color(), theme.ground) >= 3, picture.name
            words = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
            assert len(words) > 4 and all(contrast(text.get_color(), theme.ground) >= 4.5 for text in words)


def test_text_of_a_page_stands_out_from_its_ground():
    for theme in (LIGHT, DARK):
        assert min(contrast(colour, theme.ground) for colour in (theme.ink, theme.soft)) >= 4.5
    assert luminance(LIGHT.ground) > 0.9 and luminance(DARK.ground) < 0.02


def test_a_picture_is_drawn_in_the_colours_of_its_theme_and_leaves_matplotlib_as_it_was(pictures):
    before = matplotlib.rcParams.copy()
    for theme in (LIGHT, DARK):
        corner = imread(io.BytesIO(pictures[0].png(theme)))[0, 0, :3]
        np.testing.assert_allclose(corner, to_rgb(theme.ground), atol=1 / 255)
    assert matplotlib.rcParams == before


def test_letters_stay_legible_on_a_telephone(pictures):
    """Where 360 pixels are left for a picture, letters are 9 pixels high or more."""
    for picture in pictures:
        with matplotlib.rc_context(LIGHT.settings):
            figure = picture.draw(LIGHT)
            width = figure.get_figwidth() * PIXELS_PER_INCH / 2  # of CSS
            texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
            smallest = min(text.get_fontsize() for text in texts) * PIXELS_PER_INCH / 2 / 72
            assert smallest * min(1, 360 / width) >= 8.9, picture.name


@THEMES
def test_few_layers_have_a_legend_and_many_a_colour_bar(pictures, theme):
    for picture, num_layers in zip(named(pictures, "spectra"), (2, 24, 6, 7, 1), strict=True):
        figure = picture.draw(theme)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[-1] == "initial: 1"
        has_bar = len(figure.axes) == 2
        assert has_bar is (num_layers > 6)
        assert labels[:-1] == ([] if has_bar else [f"layer {i}" for i in range(num_layers)])
        colours = [to_rgb(line.get_color()) for line in figure.axes[0].get_lines()[:num_layers]]
        assert len(set(colours)) == num_layers


def test_every_picture_has_words_of_its_own_with_numbers(pictures):
    alts = [picture.alt for picture in pictures]
    assert len(set(alts)) == len(alts) > 8
    for alt in alts:
        assert len(re.findall(r"\d", alt)) >= 6 and not alt.lower().startswith(("plot", "picture", "image"))
        assert alt == " ".join(alt.split()) and alt.endswith(".")


def test_the_words_hold_what_the_pictures_show(pictures):
    alts = {picture.name: picture.alt for picture in pictures}
    assert "(training) in nats per token" in alts["loss_curves_1_training.png"]
    assert alts["loss_curves_1_training.png"].endswith("Diverged runs that end early: 1.")
    assert "Diverged" not in alts["loss_curves_1_held_out.png"]
    # seeds 0 and 1 of m = 8: 3 and 3.25 at the end, and 1 more at step 10
    assert (
        "dark, m 8, learning rate 0.003: 4.125 at step 10 and 3.125 at step 20." in alts["loss_curves_1_held_out.png"]
    )
    assert "dark: 3.125 at 8, lowest 2.5 at 64, 2.625 at 128." in alts["features.png"]
    assert "softmax (exact): 2 everywhere." in alts["features.png"] and "performer: lowest" not in alts["features.png"]
    assert "dark, m 64: 2.75 at 0.003, lowest 2.5 at 0.01, diverged at 0.1." in alts["learning_rates.png"]
    of_errors = "after: 0.0625 in the mean, from 0.05 (layer 0, head 0) to 0.1 (layer 1, head 0)."
    assert of_errors in alts["attention_error_1_after.png"]
    of_two, of_many = (picture.alt for picture in named(pictures, "spectra")[:2])
    assert "all began at 1. Layer 0 falls from 2 to 0.5. Layer 1 falls from 4 to 1." in of_two
    assert "Of 24 layers, layer 23 has the largest, 48, and layer 0 the smallest, 0.5." in of_many


def test_a_curve_that_turns_up_has_its_lowest_point_in_the_words(tmp_path):
    write_run(tmp_path / "a", 2.0)
    path = tmp_path / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines.insert(-1, {"step": 15, "heldout_loss": 1.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = pictures_of(collect(f"{tmp_path}/*"))[1]
    assert "3 at step 10, lowest 1.5 at step 15, and 2 at step 20." in held_out.alt
