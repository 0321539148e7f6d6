"""CIFAR-10's Python version, written byte by byte as Python 2 pickled it, and pickles that are none of it."""

import pickle
import re
import struct

import numpy as np
import pytest

from darkformer_jax.data.cifar_pickles import read_cifar_pickle
from darkformer_jax.data.images import read_cifar10
from darkformer_jax.errors import UserError
from tests.data.test_images import write_cifar
from tests.data.test_lra_release import run

random = np.random.default_rng(0)
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def string(text):
    """SHORT_BINSTRING, or BINSTRING: a str of Python 2."""
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<I", len(text)) + text


def whole(number):
    """BININT1, BININT2 or BININT, of one, two and four bytes."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    return b"M" + struct.pack("<H", number) if 0 <= number < 65536 else b"J" + struct.pack("<i", number)


def array(values, kind=b"u1", is_fortran=False):
    """The pickle of an array: _reconstruct, and its state."""
    dtype = b"cnumpy\ndtype\nq\x05" + string(kind) + b"K\x00K\x01\x87Rq\x06"
    dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
    shape = b"".join(map(whole, values.shape)) + bytes([0x84 + values.ndim])  # TUPLE1 is 0x85
    content = values.tobytes(order="F" if is_fortran else "C")
    return made + b"(K\x01" + shape + dtype + (b"\x88" if is_fortran else b"\x89") + string(content) + b"tb"


def batch(values, labels, **options):
    """A released file: batch_label, labels, data and filenames, in a dictionary of Python 2."""
    names = b"".join(string(b"sample_s_%06d.png" % number) for number in range(len(labels)))
    return (
        b"\x80\x02}q\x01("
        + (string(b"batch_label") + string(b"training batch 1 of 5"))
        + (string(b"labels") + b"](" + b"".join(map(whole, labels)) + b"e")
        + (string(b"data") + array(values, **options))
        + (string(b"filenames") + b"](" + names + b"eu.")
    )


def write_release(directory, count=4):
    directory.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        values = random.integers(0, 256, (count, 3072), np.uint8)
        (directory / name).write_bytes(batch(values, [(number + image) % 10 for image in range(count)]))
    (directory / "batches.meta").write_bytes(b"\x80\x02}.")
    return directory


@pytest.mark.parametrize("is_fortran", [False, True])
def test_a_batch_is_what_the_pickle_module_reads(tmp_path, is_fortran):
    values = random.integers(0, 256, (300, 3072), np.uint8)
    labels = random.integers(0, 10, 300).tolist()
    path = tmp_path / "data_batch_1"
    path.write_bytes(batch(values, labels, is_fortran=is_fortran))
    wanted = pickle.loads(path.read_bytes(), encoding="bytes")
    found, classes = read_cifar_pickle(str(path))
    np.testing.assert_array_equal(found, wanted[b"data"])
    np.testing.assert_array_equal(found, values)
    assert classes == wanted[b"labels"] == labels and found.dtype == np.uint8


def test_both_versions_have_the_same_images(tmp_path):
    colours = write_cifar(tmp_path / "bin")
    (tmp_path / "py").mkdir()
    for number, name in enumerate(NAMES):
        values = colours[number].reshape(len(colours[number]), -1)
        (tmp_path / "py" / name).write_bytes(batch(values, [number] * len(values)))
    for binary, pickled in zip(*(read_cifar10(str(tmp_path / name)) for name in ("bin", "py")), strict=True):
        np.testing.assert_array_equal(binary.pixels, pickled.pixels)
        np.testing.assert_array_equal(binary.labels, pickled.labels)
        assert binary.labels.dtype == pickled.labels.dtype and binary.pixels.dtype == pickled.pixels.dtype


def test_the_command_reads_it_and_says_how_many_images_there_are(tmp_path, capsys):
    files = write_release(tmp_path / "cifar-10-batches-py")
    status, said, _ = run(capsys, "--source=cifar10", f"--files={files}", f"--out={tmp_path}/out")
    assert status == 0 and re.search(r"train +18 images; .*\n +val +2 images; .*\n +test +4 images", said)


class _Program:
    """An object whose pickle runs a program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def program(path):
    path.write_bytes(pickle.dumps(_Program(path.with_name("ran")), protocol=2))
    return r"data_batch_2 is refused: it names io.open, and only arrays of numpy are read"


def other_function(path):
    path.write_bytes(b"\x80\x02cnumpy\nfromfile\nU\x01x\x85R.")
    return r"data_batch_2 is refused: it names numpy.fromfile, and only arrays"


def attribute(path):
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.")
    return r"data_batch_2 is refused: it names numpy.ndarray.__init__, and only arrays"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3000])
    return r"data_batch_2 is damaged, or no pickle: "


def archive(path):
    path.write_bytes(b"\x1f\x8b\x08\x00 no pickle")
    return r"data_batch_2 is damaged, or no pickle: "


def empty(path):
    path.write_bytes(b"")
    return r"data_batch_2 is damaged, or no pickle: "


def other_dictionary(path):
    path.write_bytes(pickle.dumps({b"data": 1, b"fine_labels": []}, protocol=2))
    return r"data_batch_2 is refused: it names _codecs.encode"  # bytes of Python 3 in the protocol of Python 2


def cifar100(path):
    path.write_bytes(b"\x80\x02}(" + string(b"fine_labels") + b"]" + string(b"data") + b"Nu.")
    return r"data_batch_2 holds no dictionary with 'data' and 'labels'"


def other_width(path):
    path.write_bytes(batch(random.integers(0, 256, (2, 784), np.uint8), [1, 2]))
    return r"data_batch_2: 'data' is no array of bytes with 3,072 values per image"


def other_type(path):
    path.write_bytes(batch(np.zeros((2, 3072), np.float32), [1, 2], kind=b"f4"))
    return r"data_batch_2: 'data' is no array of bytes with 3,072 values per image"


def no_array(path):
    path.write_bytes(b"\x80\x02}(" + string(b"labels") + b"]" + string(b"data") + b"Nu.")
    return r"data_batch_2: 'data' is no array of bytes with 3,072 values per image"


def fewer_labels(path):
    path.write_bytes(batch(random.integers(0, 256, (3, 3072), np.uint8), [1, 2]))
    return r"data_batch_2: 'labels' is no list of 3 classes, one per image"


def label(path):
    path.write_bytes(batch(random.integers(0, 256, (3, 3072), np.uint8), [1, 2, 10]))
    return r"data_batch_2: image 2 has the class 10; allowed: 0 to 9"


def missing(path):
    path.unlink()
    return r"data_batch_2 is missing; --files is the directory of the binary version of CIFAR-10 .*-batches-py\)"


@pytest.mark.parametrize(
    "damage",
    [
        *(program, other_function, attribute, truncated, archive, empty, other_dictionary, cifar100, other_width),
        *(other_type, no_array, fewer_labels, label, missing),
    ],
)
def test_what_is_no_batch_is_named_in_a_line_and_nothing_is_run_or_written(tmp_path, capsys, damage):
    files = write_release(tmp_path / "files")
    message = damage(files / "data_batch_2")
    status, said, error = run(capsys, "--source=cifar10", f"--files={files}", f"--out={tmp_path}/out")
    assert status == 2 and not said and error.startswith("error: ")
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["files"] and not (files / "ran").exists()


def test_a_batch_that_is_cut_anywhere_is_refused(tmp_path):
    data = batch(random.integers(0, 256, (1, 3072), np.uint8), [3])
    path = tmp_path / "data_batch_1"
    for length in [*range(0, len(data) - 3000, 1), *range(len(data) - 3000, len(data), 50)]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"data_batch_1 is damaged, or no pickle"):
            read_cifar_pickle(str(path))


def test_a_batch_with_any_byte_changed_is_read_or_refused_in_words(tmp_path):
    data = batch(random.integers(0, 256, (1, 3072), np.uint8), [3])
    begin = data.index(b"data") + 200  # past the head of the array
    path = tmp_path / "data_batch_1"
    for place in [*range(begin), *range(len(data) - 80, len(data))]:
        for value in (0, 40, 82, 98, 255):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                values, labels = read_cifar_pickle(str(path))
            except UserError as refusal:
                message = str(refusal)
            else:
                message = f"{path}"
                assert values.shape == (1, 3072) and len(labels) == 1
            assert message.startswith(str(path))
