import gzip
import json
import re
import struct

import numpy as np
import pytest

from darkformer_jax import prepare_data
from darkformer_jax.data.images import pixel_tokenizer, read_cifar10, read_fashion_mnist, smaller, write_images
from darkformer_jax.data.labelled import Columns, read_examples
from darkformer_jax.data.tokenizers import load_tokenizer
from darkformer_jax.errors import UserError

random = np.random.default_rng(0)


def write_idx(directory, name, count, side=4):
    """Images and labels in the IDX format."""
    pixels = random.integers(0, 256, (count, side, side), np.uint8)
    labels = (np.arange(count) % 3).astype(np.uint8)
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (directory / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return pixels, labels


@pytest.fixture
def mnist(tmp_path):
    directory = tmp_path / "mnist"
    directory.mkdir()
    return directory, write_idx(directory, "train", 30), write_idx(directory, "t10k", 5)


def write_cifar(directory, records=2):
    directory.mkdir()
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    colours = random.integers(0, 256, (len(names), records, 3, 32, 32), np.uint8)
    for number, name in enumerate(names):
        rows = [bytes([number]) + image.tobytes() for image in colours[number]]
        (directory / name).write_bytes(b"".join(rows))
    return colours


def test_pixels_come_back_from_the_files_in_their_order(mnist, tmp_path):
    directory, (pixels, labels), (test_pixels, test_labels) = mnist
    result = write_images(str(tmp_path / "out"), read_fashion_mnist(str(directory)), None)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.fingerprint == pixel_tokenizer().fingerprint and tokenizer.vocab_size == 257
    wanted = {
        "train": (pixels[:27], labels[:27]),
        "val": (pixels[27:], labels[27:]),
        "test": (test_pixels, test_labels),
    }
    for split, (images, classes) in wanted.items():
        examples = read_examples(str(tmp_path / "out" / f"{split}.tsv"), Columns("pixels", "label"))
        ids = np.stack(tokenizer.encode_batch([example.text for example in examples]))
        np.testing.assert_array_equal(ids.reshape(images.shape) - 1, images)  # id 0 is the separator
        assert [int(example.label) for example in examples] == classes.tolist()
        assert tokenizer.decode(ids[0]) == examples[0].text
        assert result[split]["images"] == len(images) and result[split]["pixels"] == 16
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == result


def test_a_black_image_is_no_empty_text(tmp_path):
    text = pixel_tokenizer().decode([1] * 9)
    (tmp_path / "a.tsv").write_text(f"pixels\tlabel\n{text}\t0\n")
    assert read_examples(str(tmp_path / "a.tsv"), Columns("pixels", "label"))[0].text == text


def test_a_smaller_image_has_the_means_of_squares():
    image = np.array([[[0, 2, 10, 10], [4, 6, 10, 10], [1, 1, 255, 255], [1, 2, 255, 254]]], np.uint8)
    np.testing.assert_array_equal(smaller(image, 2), [[[3, 10], [1, 255]]])
    np.testing.assert_array_equal(smaller(image, 4), image)
    for side in (3, 0, 8, -1):
        with pytest.raises(UserError, match=rf"--side={side}: must divide the images' 4 pixels per row"):
            smaller(image, side)


def test_cifar_is_read_in_grey_plane_by_plane(tmp_path):
    colours = write_cifar(tmp_path / "cifar")
    training, test = read_cifar10(str(tmp_path / "cifar"))
    assert training.pixels.shape == (10, 32, 32) and test.labels.tolist() == [5, 5]
    assert training.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    red, green, blue = colours[1, 0].astype(np.float64)
    np.testing.assert_allclose(training.pixels[2], 0.299 * red + 0.587 * green + 0.114 * blue, atol=0.5)


def missing(mnist, cifar):
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    return "fashion_mnist", r"t10k-labels-idx1-ubyte.gz is missing; --files is the directory that has it"


def truncated(mnist, cifar):
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return "fashion_mnist", r"cannot read .*train-images-idx3-ubyte.gz: .*end-of-stream"


def short(mnist, cifar):
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    return "fashion_mnist", r"its head says \[30, 4, 4\], but 479 bytes follow"


def no_idx(mnist, cifar):
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\x89PNG"))
    return "fashion_mnist", r"is no IDX file of bytes with 3 axes"


def fewer_labels(mnist, cifar):
    write_idx(mnist, "other", 29)
    (mnist / "other-labels-idx1-ubyte.gz").replace(mnist / "train-labels-idx1-ubyte.gz")
    return "fashion_mnist", r"train has images \[30, 4, 4\] and 29 labels"


def label_out_of_range(mnist, cifar):
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + bytes([10])))
    return "fashion_mnist", r"mnist: t10k has the class 10 at image 4; allowed: 0 to 9$"


def empty_images(mnist, cifar):
    write_idx(mnist, "train", 30, side=0)
    return (
        "fashion_mnist",
        r"train-images-idx3-ubyte.gz: its head says \[30, 0, 0\], which is empty; allowed: sizes of 1",
    )


def other_size(mnist, cifar):
    write_idx(mnist, "t10k", 5, side=2)
    return "fashion_mnist", r"mnist: train has images of 4 x 4 pixels, t10k of 2 x 2; allowed: one size"


def few_images(mnist, cifar):
    write_idx(mnist, "train", 9)
    return "fashion_mnist", r"error: 9 training images: must be at least 10, because one in 10 is for validation$"


def cifar_missing(mnist, cifar):
    (cifar / "data_batch_3.bin").unlink()
    return "cifar10", r"data_batch_3.bin is missing; --files is the directory of the binary version"


def cifar_torn(mnist, cifar):
    with open(cifar / "data_batch_3.bin", "ab") as file:
        file.write(b"x")
    return "cifar10", r"data_batch_3.bin: 6,147 bytes are no whole number of records of 3,073"


def cifar_label(mnist, cifar):
    data = bytearray((cifar / "test_batch.bin").read_bytes())
    data[3073] = 10
    (cifar / "test_batch.bin").write_bytes(data)
    return "cifar10", r"test_batch.bin: record 1 has the class 10; allowed: 0 to 9"


@pytest.mark.parametrize(
    "damage",
    [
        *(missing, truncated, short, no_idx, fewer_labels, label_out_of_range, empty_images, other_size, few_images),
        *(cifar_missing, cifar_torn, cifar_label),
    ],
)
def test_damaged_releases_are_named_in_a_line_and_nothing_is_written(mnist, tmp_path, capsys, damage):
    write_cifar(tmp_path / "cifar")
    source, message = damage(mnist[0], tmp_path / "cifar")
    files = mnist[0] if source == "fashion_mnist" else tmp_path / "cifar"
    flags = [f"--source={source}", f"--files={files}", f"--out={tmp_path}/out"]
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(prepare_data.parse_flags(["prepare_data", *flags]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
