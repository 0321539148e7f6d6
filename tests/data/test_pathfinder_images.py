"""Pathfinder's published layout: PNG images, metadata that are text, and the image that was published empty."""

import hashlib
import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest

from darkformer_jax.data import pathfinder_images
from darkformer_jax.data.labelled import Columns, read_examples
from darkformer_jax.data.pathfinder_images import write_pathfinder_release
from darkformer_jax.data.tokenizers import load_tokenizer
from darkformer_jax.errors import UserError
from tests.data.test_lra_release import run

LEVEL = "pathfinder32/curv_contour_length_14"
random = np.random.default_rng(0)


def write_level(root, level=LEVEL, batches=3, per_batch=20):
    """{image file: (pixels, label)}, written as the published generator does."""
    side = int(level.partition("/")[0].removeprefix("pathfinder"))
    images = {}
    for batch in range(batches):
        own = root / level / "imgs" / str(batch)
        own.mkdir(parents=True)
        lines = []
        for number in range(per_batch):
            pixels = random.integers(0, 256, (side, side), np.uint8)
            label = int(random.integers(2))
            path = own / f"sample_{number}.png"
            PIL.Image.fromarray(pixels).save(path)
            images[path] = (pixels, label)
            lines.append(f"imgs/{batch} {path.name} {number} {label} 1.0 14 4 2 0.5 1 2\n")
        metadata = root / level / "metadata"
        metadata.mkdir(exist_ok=True)
        (metadata / f"{batch}.npy").write_text("".join(lines))
    return images


def read_split(out, split):
    """[(pixels, label)] of a split."""
    examples = read_examples(f"{out}/{split}.tsv", Columns("pixels", "label"))
    ids = load_tokenizer(str(out)).encode_batch([example.text for example in examples])
    return [(np.array(one) - 1, int(example.label)) for one, example in zip(ids, examples, strict=True)]


@pytest.mark.parametrize("nesting", ["lra_release", "lra_release/lra_release"])
def test_every_image_is_in_one_split_with_its_label_and_its_copies_are_beside_it(tmp_path, capsys, nesting):
    images = write_level(tmp_path / nesting, batches=12)
    first, *others = list(images)[::12]
    for copy in others:
        copy.write_bytes(first.read_bytes())
        images[copy] = (images[first][0], images[copy][1])
    flags = ("--source=lra_release", "--task=pathfinder32", f"--files={tmp_path}/lra_release", f"--out={tmp_path}/out")
    status, said, _ = run(capsys, *flags)
    assert status == 0 and f"pathfinder32, hard, from {tmp_path}/{nesting}/{LEVEL}, 1,024 pixels per image" in said
    assert "the most frequent class has" in said and "left out" not in said
    splits = {split: read_split(tmp_path / "out", split) for split in ("train", "val", "test")}
    found = sorted((pixels.tolist(), label) for split in splits.values() for pixels, label in split)
    assert found == sorted((pixels.reshape(-1).tolist(), label) for pixels, label in images.values())
    keys = {split: {pixels.tobytes() for pixels, _ in rows} for split, rows in splits.items()}
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]
    sizes = [len(splits[split]) for split in ("train", "val", "test")]
    assert abs(sizes[1] - 24) < 4 * 4.7 and abs(sizes[2] - 24) < 4 * 4.7  # a tenth each, four standard deviations
    saved = json.loads((tmp_path / "out" / "statistics.json").read_text())
    text = "".join((tmp_path / nesting / LEVEL / f"metadata/{number}.npy").read_text() for number in range(12))
    assert saved["source"] == {
        "level": "hard",
        "directory": f"{tmp_path}/{nesting}/{LEVEL}",
        "metadata_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "left_out": [],
    }
    ones = sum(label for _, label in splits["train"])
    assert saved["train"] == {
        "images": sizes[0],
        "pixels": 1024,
        "shares": {"0": (sizes[0] - ones) / sizes[0], "1": ones / sizes[0]},
    }


@pytest.mark.parametrize("side", [64, 128])
def test_larger_images_and_other_levels_are_read(tmp_path, side):
    images = write_level(tmp_path, f"pathfinder{side}/curv_contour_length_9")
    result = write_pathfinder_release(str(tmp_path / "out"), str(tmp_path), f"pathfinder{side}", "intermediate")
    assert sum(result[split]["images"] for split in ("train", "val", "test")) == len(images)
    assert result["test"]["pixels"] == side**2


def test_the_image_that_was_published_empty_is_left_out_counted_and_named(tmp_path, capsys):
    images = write_level(tmp_path, "pathfinder32/curv_baseline", batches=1, per_batch=173)
    empty = "pathfinder32/curv_baseline/imgs/0/sample_172.png"
    (tmp_path / empty).write_bytes(b"")
    flags = ("--source=lra_release", "--task=pathfinder32", "--level=easy", f"--files={tmp_path}")
    status, said, _ = run(capsys, *flags, f"--out={tmp_path}/out")
    assert status == 0 and f"left out, because it is empty: {empty}" in said
    saved = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert saved["source"]["left_out"] == [empty] and saved["source"]["level"] == "easy"
    assert sum(saved[split]["images"] for split in ("train", "val", "test")) == len(images) - 1


def truncated(level):
    path = level / "imgs/1/sample_3.png"
    path.write_bytes(path.read_bytes()[:-400])
    return r"imgs/1/sample_3.png is no whole PNG image, which .*metadata/1.npy:4 names: Truncated File Read"


def empty(level):
    (level / "imgs/1/sample_3.png").write_bytes(b"")
    return r"imgs/1/sample_3.png is empty, which .*metadata/1.npy:4 names; only pathfinder32/curv_baseline/imgs/0/"


def no_image(level):
    (level / "imgs/1/sample_3.png").write_bytes(b"GIF89a" + bytes(20))
    return r"imgs/1/sample_3.png is no whole PNG image, which .*metadata/1.npy:4 names: cannot identify image file"


def missing(level):
    (level / "imgs/2/sample_0.png").unlink()
    return r"imgs/2/sample_0.png is missing, which .*metadata/2.npy:1 names"


def other_size(level):
    PIL.Image.new("L", (64, 64)).save(level / "imgs/0/sample_1.png")
    return r"imgs/0/sample_1.png has 64 x 64 pixels of mode L; allowed: 32 x 32, grey with 8 bits"


def coloured(level):
    PIL.Image.new("RGB", (32, 32)).save(level / "imgs/0/sample_1.png")
    return r"imgs/0/sample_1.png has 32 x 32 pixels of mode RGB; allowed: 32 x 32, grey with 8 bits"


def label(level):
    path = level / "metadata/0.npy"
    path.write_text(path.read_text() + "imgs/0 sample_0.png 0 2 1.0\n")
    return r"metadata/0.npy:21: the label '2'; allowed: 0, 1"


def column(level):
    path = level / "metadata/0.npy"
    path.write_text(path.read_text() + "imgs/0 sample_0.png 0\n")
    return r"metadata/0.npy:21: 3 fields; the label is field 4"


def real_npy(level):
    np.save(level / "metadata/0.npy", np.zeros(3))
    return r"metadata/0.npy is not UTF-8 text"


def no_metadata(level):
    for path in (level / "metadata").iterdir():
        path.unlink()
    return r"metadata has no .npy file; a level has metadata/<n>.npy and imgs/<n>/\*.png"


def images_without_metadata(level):
    (level / "metadata/1.npy").unlink()
    return r"imgs/1 is there without .*metadata/1.npy; allowed: a level in which each has the other"


def metadata_without_images(level):
    (level / "metadata/10.npy").write_text("")
    return r"metadata/10.npy is there without .*imgs/10; allowed: a level in which each has the other"


def few(level):
    for number in (1, 2):
        (level / f"metadata/{number}.npy").unlink()
        shutil.rmtree(level / f"imgs/{number}")
    path = level / "metadata/0.npy"
    path.write_text(path.read_text().splitlines()[0])
    return r"curv_contour_length_14: its 1 images are too few: none is in (train|val)"


@pytest.mark.parametrize(
    "damage",
    [
        *(truncated, empty, no_image, missing, other_size, coloured, label, column, real_npy, no_metadata, few),
        *(images_without_metadata, metadata_without_images),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_a_line_and_nothing_is_written(tmp_path, capsys, damage):
    write_level(tmp_path / "lra_release")
    message = damage(tmp_path / "lra_release" / LEVEL)
    flags = ("--source=lra_release", "--task=pathfinder32", f"--files={tmp_path}", f"--out={tmp_path}/out")
    status, said, error = run(capsys, *flags)
    assert status == 2 and not said and error.startswith("error: ")
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["lra_release"]


def test_an_image_that_is_cut_anywhere_is_refused_or_has_all_its_pixels(tmp_path):
    images = write_level(tmp_path)
    path, (pixels, _) = next(iter(images.items()))
    whole = path.read_bytes()
    refused = []
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            write_pathfinder_release(str(tmp_path / f"out{length}"), str(tmp_path), "pathfinder32", "hard")
        except UserError as refusal:
            refused.append(str(refusal))
            continue
        rows = [row for split in ("train", "val", "test") for row, _ in read_split(tmp_path / f"out{length}", split)]
        assert any((row == pixels.reshape(-1)).all() for row in rows)
    assert len(refused) > 100 and all(f"{path} is no whole PNG image" in error for error in refused)


def test_an_image_with_a_flipped_bit_is_refused_or_has_its_pixels(tmp_path):
    images = write_level(tmp_path)
    path, (pixels, _) = next(iter(images.items()))
    whole = path.read_bytes()
    listed = pathfinder_images._Listed(path, 0, "metadata/1.npy:1")
    num_refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert (pathfinder_images._read_png(listed, 32) == pixels).all(), place
        except UserError:
            num_refused += 1
    assert num_refused > 200
