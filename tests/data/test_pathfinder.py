"""Pathfinder: what is drawn, and whether a reader that knows only the pixels finds the label."""

import json
import re

import numpy as np
import pytest
from scipy import ndimage

from darkformer_jax import prepare_data
from darkformer_jax.data.images import pixel_tokenizer
from darkformer_jax.data.labelled import Columns, read_examples
from darkformer_jax.data.pathfinder import SCALES, draw_picture, write_pathfinder
from darkformer_jax.errors import UserError

DIM = 0.25  # of a dash's brightness: what is darker is background


def filled_label(pixels, scale):
    """The label by a fill of gaps: whether both circles are in one piece once bright parts are joined across them.

    It is told the sizes of dashes and gaps, and nothing of where they are.
    """
    finer = 256 // scale.side
    side = scale.side * finer
    per_pixel = (side - 1) / (scale.side - 1)
    brightness = 255 * scale.contrast * min(scale.thickness, 1)
    dark = ndimage.zoom(pixels.astype(float), finer, order=3) < DIM * brightness
    half_width = (max(scale.thickness, 1) + 1) / 2 - DIM  # of what is bright around a dash
    bridged = (2 * max(scale.margins) + scale.separation) / 2 - 2 * half_width
    is_joined = ndimage.distance_transform_edt(dark) <= per_pixel * bridged / 2 + 0.5  # to the middle of a cell
    pieces, _ = ndimage.label(is_joined, np.ones((3, 3)))
    circles, count = ndimage.label(pixels >= 250)
    assert count == 2  # only circles are that bright
    centres = ndimage.center_of_mass(pixels >= 250, circles, [1, 2])
    first, second = (pieces[tuple(np.rint(np.array(centre) * per_pixel).astype(int))] for centre in centres)
    return int(first == second)


@pytest.mark.parametrize(("name", "count"), [("32", 100), ("64", 20), ("128", 10)])
def test_a_fill_of_the_gaps_finds_the_labels(name, count):
    scale = SCALES[name]
    pictures = [draw_picture(scale, number % 2, f"test {number}") for number in range(count)]
    agreement = np.mean([filled_label(picture.pixels, scale) == picture.label for picture in pictures])
    print(f"Pathfinder-{name}: a fill of the gaps agrees with {100 * agreement:.1f}% of {count} labels")
    assert agreement >= 0.99


def test_the_distance_of_the_circles_does_not_give_the_label_away():
    pictures = [draw_picture(SCALES["32"], number % 2, f"test {number}") for number in range(200)]
    distances = np.array([abs(picture.circles[0] - picture.circles[1]) for picture in pictures])
    best = max(np.mean((distances < at) == [p.label for p in pictures]) for at in distances)
    assert best < 0.6  # the best threshold of 200 coin flips has 0.55 or so


def test_a_label_says_whose_end_is_marked():
    scale = SCALES["32"]
    same, other = (draw_picture(scale, label, "a") for label in (1, 0))
    assert same.circles[0] == other.circles[0] and same.circles[1] != other.circles[1]
    differs = same.pixels != other.pixels  # only around the two ends
    rows, columns = np.nonzero(differs)
    ends = (same.circles[1], other.circles[1])
    near = [min(abs(column + 1j * row - end) for end in ends) for row, column in zip(rows, columns, strict=True)]
    assert len(near) > 4 and max(near) < scale.marker + 1


def test_a_seed_gives_the_same_files_and_no_image_twice(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = write_pathfinder(str(tmp_path / name), "32", seed, 40)
    files = {name: (tmp_path / name / "test.tsv").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    texts = set()
    for split, count in (("train", 32), ("val", 4), ("test", 4)):
        examples = read_examples(str(tmp_path / "c" / f"{split}.tsv"), Columns("pixels", "label"))
        assert len(examples) == count and sum(example.label == "1" for example in examples) == count / 2
        assert result[split] == {"images": count, "pixels": 1024, "shares": {"0": 0.5, "1": 0.5}}
        texts |= {example.text for example in examples}
    assert len(texts) == 40
    ids = pixel_tokenizer().encode(texts.pop())
    assert len(ids) == 1024 and max(ids) == 256  # a circle is white
    assert json.loads((tmp_path / "c" / "statistics.json").read_text()) == result


def test_more_images_begin_with_the_same_ones(tmp_path):
    write_pathfinder(str(tmp_path / "few"), "32", 0, 20)
    write_pathfinder(str(tmp_path / "more"), "32", 0, 40)
    few, more = ((tmp_path / name / "train.tsv").read_text().splitlines() for name in ("few", "more"))
    assert more[:17] == few


def test_the_number_of_images_is_split_evenly(tmp_path):
    with pytest.raises(UserError, match=r"--images=30: must be a multiple of 20"):
        write_pathfinder(str(tmp_path / "out"), "32", 0, 30)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=pathfinder", "--scale=small"], "--scale=small: --source=pathfinder has: 32, 64, 128"),
        (["--source=listops", "--scale=32"], "--scale=32: --source=listops has: paper, small"),
        (["--source=listops", "--images=20"], "--images=20: --source=listops does not use it; allowed: pathfinder"),
        (["--source=pathfinder", "--images=10"], "--images=10: must be a multiple of 20"),
        (["--source=pathfinder", "--seed=-1"], "--seed=-1: must be from 0"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(prepare_data.parse_flags(["prepare_data", *flags, f"--out={tmp_path}/out"]))
    assert ended.value.code == 2 and re.search(re.escape(message), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
