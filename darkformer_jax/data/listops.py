"""ListOps: nested lists of operations on digits, whose value is a digit.

Nangia and Bowman (arXiv 1804.06028), with the grammar and the limits of Long Range Arena (Tay et al., arXiv
2011.04006). An expression is a digit, each as likely; or, with probability 1/4 above the largest depth, one of MIN,
MAX, MED (the median, rounded down) and SM (the sum modulo 10), with 2 to `max_args` expressions. It is kept if its
length is within the limits and it is new.

The files are laid out as the published ones are: basic_train.tsv, basic_val.tsv and basic_test.tsv, with the columns
Source and Target and an expression as nested pairs, `( ( ( [MAX 1 ) 4 ) ] )`. tokenizer.json beside them has an id per
symbol and drops the parentheses, which say nothing that the brackets do not.
"""

import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf

from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.tokenizers import DOCUMENT_SEPARATOR, HuggingFaceTokenizer

TEXT_COLUMN, LABEL_COLUMN = "Source", "Target"
OPERATIONS: Mapping[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SYMBOLS = (*OPERATIONS, "]", *map(str, range(10)))
_OPERATION_PROBABILITY = 0.25


class Scale(NamedTuple):
    """Limits of the expressions and sizes of the splits.

    Attributes:
      max_depth: of nesting; at this depth there are only digits.
      max_args: most arguments of an operation.
      min_length, max_length: an expression has more symbols than the first and fewer than the second, not counting
        parentheses.
      sizes: expressions per split.
    """

    max_depth: int
    max_args: int
    min_length: int
    max_length: int
    sizes: Mapping[str, int]


SCALES = {
    "paper": Scale(10, 10, 500, 2000, {"train": 96_000, "val": 2_000, "test": 2_000}),
    "small": Scale(6, 5, 30, 128, {"train": 20_000, "val": 2_000, "test": 2_000}),
}


class Expression(NamedTuple):
    """An expression with its value."""

    symbols: list[str]
    value: int

    @property
    def source(self) -> str:
        """The symbols in nested pairs: `( ( ( [MAX 1 ) 4 ) ] )`."""
        lists: list[list[str]] = [[]]  # the items of each list that is open
        for symbol in self.symbols:
            if symbol in OPERATIONS:
                lists.append([symbol])
            elif symbol == "]":
                operation, *items = [*lists.pop(), symbol]
                lists[-1].append("( " * len(items) + operation + "".join(f" {item} )" for item in items))
            else:
                lists[-1].append(symbol)
        return lists[0][0]


def draw_expressions(scale: Scale, seed: int) -> Iterator[Expression]:
    """Endless expressions within the limits, each new: a function of the scale and the seed alone."""
    # Of Python's generator only random() is the same in all versions.
    draw = random.Random(f"ListOps {seed}").random
    seen = set()
    while True:
        symbols: list[str] = []
        value = _draw(draw, scale, 1, symbols)
        if value is not None and len(symbols) > scale.min_length and (key := " ".join(symbols)) not in seen:
            seen.add(key)
            yield Expression(symbols, value)


def _draw(draw: Callable[[], float], scale: Scale, depth: int, symbols: list[str]) -> int | None:
    """Appends an expression to `symbols` and returns its value; None once there are too many symbols."""
    if depth == scale.max_depth or draw() >= _OPERATION_PROBABILITY:
        digit = int(10 * draw())
        symbols.append(str(digit))
        return digit
    name = list(OPERATIONS)[int(len(OPERATIONS) * draw())]
    symbols.append(name)
    values = []
    for _ in range(2 + int((scale.max_args - 1) * draw())):
        value = _draw(draw, scale, depth + 1, symbols)
        if value is None or len(symbols) >= scale.max_length - 1:  # its own bracket is still to come
            return None
        values.append(value)
    symbols.append("]")
    return OPERATIONS[name](values)


def write_listops(directory: str, scale: Scale, seed: int, progress_bar: ProgressBar = no_progress) -> dict[str, Any]:
    """Writes the splits, tokenizer.json and statistics.json; the directory appears whole or not at all.

    Returns:
      what statistics.json has: per split the number of expressions, the length of the shortest, the median and the
      longest without parentheses, the share of each value and the largest of these.

    Raises UserError if the directory exists and is not empty.
    """
    result: dict[str, Any] = {}
    with whole_directory(directory) as path, progress_bar(sum(scale.sizes.values()), "expression") as bar:
        expressions = draw_expressions(scale, seed)
        for split, size in scale.sizes.items():
            drawn = []
            for _ in range(size):
                drawn.append(next(expressions))
                bar.update()
            _write_split(path / f"basic_{split}.tsv", drawn)
            result[split] = statistics_of([len(e.symbols) for e in drawn], [e.value for e in drawn])
        listops_tokenizer().save(str(path))
        write_json(path / "statistics.json", result)
    return result


def listops_tokenizer() -> HuggingFaceTokenizer:
    """An id per symbol, after that of the separator; parentheses have none."""
    vocabulary = {symbol: number for number, symbol in enumerate((DOCUMENT_SEPARATOR, *SYMBOLS))}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token=None))
    tokenizer.normalizer = hf.normalizers.Replace(hf.Regex("[()]"), "")
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{DOCUMENT_SEPARATOR} $A", special_tokens=[(DOCUMENT_SEPARATOR, 0)]
    )
    return HuggingFaceTokenizer(tokenizer.to_str().encode("utf-8"), DOCUMENT_SEPARATOR, DOCUMENT_SEPARATOR)


def _write_split(path: Path, expressions: list[Expression]) -> None:
    rows = "".join(f"{expression.source}\t{expression.value}\n" for expression in expressions)
    path.write_text(f"{TEXT_COLUMN}\t{LABEL_COLUMN}\n{rows}", encoding="ascii")


def statistics_of(lengths: Sequence[int], values: Sequence[int]) -> dict[str, Any]:
    """What statistics.json has of a split. lengths: symbols of each expression."""
    ordered = sorted(lengths)
    counts = Counter(values)
    shares = {str(value): counts[value] / len(values) for value in range(10)}
    return {
        "expressions": len(values),
        "shortest": ordered[0],
        "median": int(statistics.median(ordered)),
        "longest": ordered[-1],
        "majority_class": max(shares.values()),
        "shares": shares,
    }
