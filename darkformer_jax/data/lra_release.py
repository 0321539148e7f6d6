"""The archive lra_release of Long Range Arena (Tay et al., arXiv 2011.04006), and the ListOps in it.

The archive unpacks to lra_release, which holds some of the data sets, and again lra_release with all of them. The inner
one is read, as others do. ListOps is listops-1000/basic_train.tsv, basic_val.tsv and basic_test.tsv there.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.data.images import SPLITS
from darkformer_jax.data.labelled import table_records
from darkformer_jax.data.listops import LABEL_COLUMN, OPERATIONS, SYMBOLS, TEXT_COLUMN, listops_tokenizer, statistics_of
from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.errors import UserError, printable

LISTOPS_LENGTH = 2000  # tokens, the first of which begins the text: the official limit, and that of configs/lra.py
_RELEASE, _LISTOPS = "lra_release", "listops-1000"
_DIGITS = tuple("0123456789")


def released(files: str, name: str, otherwise: str = "") -> Path:
    """The directory `name` of the archive: of several, the innermost.

    files: lra_release, the one inside it, or the directory that has it. otherwise: what else `files` may be, for the
    error. Raises UserError if there is none.
    """
    for place in (Path(files, _RELEASE, _RELEASE), Path(files, _RELEASE), Path(files)):
        if (place / name).is_dir():
            return place / name
    allowed = f"{_RELEASE}, with {name} in it or in its inner {_RELEASE}{otherwise}"
    raise UserError(f"{files} has no directory {name}; --files is {allowed}")


def write_listops_release(directory: str, files: str, progress_bar: ProgressBar = no_progress) -> dict[str, Any]:
    """Writes what `listops.write_listops` does, of the published expressions.

    Returns what statistics.json has: as there, and per split the share of the expressions that LISTOPS_LENGTH cuts.

    Raises UserError, which names file and line, for what is missing, a value that is no digit or an unknown symbol.
    """
    source = released(files, _LISTOPS)
    paths = {split: source / f"basic_{split}.tsv" for split in SPLITS}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path} is missing; ListOps needs {', '.join(p.name for p in paths.values())}")
    result = {}
    with whole_directory(directory) as out:
        for split in with_progress(SPLITS, "file", progress_bar):
            lengths, values = [], []
            with open(out / paths[split].name, "w", encoding="utf-8") as file:
                file.write(f"{TEXT_COLUMN}\t{LABEL_COLUMN}\n")
                for text, length, value in _expressions(str(paths[split])):
                    file.write(f"{text}\t{value}\n")
                    lengths.append(length)
                    values.append(value)
            if not lengths:
                raise UserError(f"{paths[split]} has no expression")
            cut = sum(length >= LISTOPS_LENGTH for length in lengths)
            result[split] = statistics_of(lengths, values) | {"cut_share": cut / len(lengths)}
        listops_tokenizer().save(str(out))
        write_json(out / "statistics.json", result)
    return result


def _is_one_expression(symbols: Sequence[str]) -> bool:
    """Whether the brackets close in order, and nothing follows the one that closes the first."""
    depth = 0
    for number, symbol in enumerate(symbols):
        if number and depth <= 0:
            return False
        depth += (symbol in OPERATIONS) - (symbol == "]")
    return bool(symbols) and not depth


def _expressions(path: str) -> Iterator[tuple[str, int, int]]:
    """(the text, its symbols without parentheses, its value) of each expression."""
    columns = (TEXT_COLUMN, LABEL_COLUMN)
    for line, record in table_records(path, columns):
        text, value = (record.get(column, "").strip() for column in columns)
        symbols = text.translate({ord("("): None, ord(")"): None}).split()
        if unknown := set(symbols).difference(SYMBOLS):
            shown = " ".join(SYMBOLS)
            raise UserError(f"{path}:{line}: the symbol {printable(min(unknown))!r}; allowed: {shown}, and parentheses")
        if not _is_one_expression(symbols):
            num_open = sum(symbol in OPERATIONS for symbol in symbols)
            raise UserError(
                f"{path}:{line}: no single expression: {num_open} operations, {symbols.count(']')} closing brackets"
            )
        if value not in _DIGITS:
            raise UserError(f"{path}:{line}: the value {printable(value)!r}; allowed: a digit")
        yield text, len(symbols), int(value)
