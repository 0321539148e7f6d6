"""CIFAR-10's Python version: dictionaries with an array and a list, pickled by Python 2.

Nothing that a file names is imported or called: a pickle can run any program. The three names that an array's pickle
needs stand for a record of their arguments, from which the array is made here; any other name is refused.
"""

import io
import pickle
from typing import Any

import numpy as np

from darkformer_jax.data.files import read_file
from darkformer_jax.errors import UserError, one_line, printable

_NUM_VALUES = 3 * 32 * 32
_ARRAY_NAMES = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
_BYTE_TYPES = (b"u1", b"uint8")
# What pickle raises for damaged bytes. A changed byte may ask for more memory than there is.
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError),
    MemoryError,
)


class _Recorded:
    """What stands for an object: the arguments it would have been made with, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, dictionaries and records of arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_NAMES:
            raise UserError(f"it names {printable(module)}.{printable(name)}, and only arrays of numpy are read")
        return _Recorded


def read_cifar_pickle(path: str) -> tuple[np.ndarray, list[int]]:
    """(values [n, 3072] uint8, classes) of a batch.

    Raises UserError, which names the file, if it is damaged, names anything but an array, or holds something else.
    """
    data = read_file(path)
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except _DAMAGED as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{path} is damaged, or no pickle: {reason}") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise UserError(f"{path} holds no dictionary with 'data' and 'labels'")
    values, labels = _array(batch[b"data"], path), batch[b"labels"]
    if not isinstance(labels, list) or len(labels) != len(values) or not labels:
        raise UserError(f"{path}: 'labels' is no list of {len(values):,} classes, one per image")
    for number, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            shown = label if type(label) is int and abs(label) < 1000 else f"({type(label).__name__})"
            raise UserError(f"{path}: image {number} has the class {shown}; allowed: 0 to 9")
    return values, labels


def _array(recorded: Any, path: str) -> np.ndarray:
    """The array [n, 3072] that a record stands for."""
    try:
        _, shape, kind, is_fortran, content = recorded.state
        fits = kind.arguments[0] in _BYTE_TYPES
        values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    except (AttributeError, BufferError, LookupError, OverflowError, TypeError, ValueError):
        fits = False
    if not fits or values.ndim != 2 or values.shape[1] != _NUM_VALUES:
        raise UserError(f"{path}: 'data' is no array of bytes with {_NUM_VALUES:,} values per image")
    return values
