"""What averages over text hide: what a language model finds again in its context, by distance.

  copy       [x, text, x]: nats per token of a passage of 128 tokens that comes again, and of its first copy
  repeat     [x, x]: the same of a passage as long as the distance
  lookup     facts in the text that the end asks for: right answers, and nats per token of the answers
  classes    a rule shown by examples: right labels among four
  positions  bits per token by octave of the position

Each figure is a mean over rows with its standard error.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from darkformer_jax.data.probe_rows import (
    CUE,
    ProbeRow,
    ProbeText,
    RowsTooLong,
    copy_rows,
    fingerprint,
    octaves,
    position_rows,
    repeat_rows,
)
from darkformer_jax.data.probe_words import MOST_DISTANCES, class_rows, lookup_rows
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.sources import open_corpus
from darkformer_jax.data.text_files import TEXT_FIELD, ignore_read
from darkformer_jax.errors import UserError
from darkformer_jax.runs.load import load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.probe_figures import Reader, answers, bits, copied, estimate, right_label
from darkformer_jax.tasks.probe_tables import PROBES, tables
from darkformer_jax.tasks.row_scores import RowScores, Scorer, make_scorer
from darkformer_jax.tasks.task import Scores

DISTANCES = (512, 1024, 4096)  # tokens, by default
LONGEST = 16_384  # tokens of a row, by default
_SMALLEST_DISTANCE = 2 * CUE
_BY_DISTANCE: Mapping[str, Any] = {
    "copy": (copy_rows, copied),
    "repeat": (repeat_rows, copied),
    "classes": (class_rows, right_label),
}


class ProbeRequest(NamedTuple):
    """What to ask of a model.

    Attributes:
      probes: names in PROBES, separated by commas.
      files: comma-separated globs, or directories.
      text_field: of a JSON object; None = the default.
      rows: per probe and distance.
      distances: in tokens, separated by commas; None = those of 512, 1,024 and 4,096 that fit.
      context: the most tokens in a row; None = the model's, at most 16,384.
      dtype: what the model computes in; None = what its run did.
    """

    probes: str
    files: str
    text_field: str | None
    rows: int
    distances: str | None
    context: int | None
    batch_size: int
    seed: int
    dtype: str | None = None


class Asked(NamedTuple):
    """One line of a probe's table: rows that share a distance.

    Attributes:
      probe: its name.
      at: the distance, or the positions, as text.
      place: the distance, or the last position.
      rows: that are scored.
      read: their scores -> the figures of each row.
    """

    probe: str
    at: str
    place: int
    rows: Sequence[ProbeRow]
    read: Reader


def ask_probes(workdir: Workdir, step: int | None, request: ProbeRequest, progress_bar: ProgressBar) -> Scores:
    """The figures of a workdir's language model.

    Raises:
      UserError: an unknown probe, rows that do not fit the model, too little text, or no language model.
    """
    names, distances = parse_probes(request.probes), parse_distances(request.distances)
    corpus = open_corpus("text", request.files, TEXT_FIELD if request.text_field is None else request.text_field)
    texts = [document.text for document in corpus.documents(ignore_read)]
    model = load_language_model(workdir, step, dtype=request.dtype)
    longest = model.config.sequence_length
    context = request.context or min(LONGEST, longest)
    if context > longest:
        _note(f"--context={context} is more than the {longest} tokens this model was made for")
    elif context < LONGEST and request.context is None and "positions" in names:
        _note(f"positions end at {context:,}, the tokens this model was made for; --context reads further")
    text = ProbeText.of(texts, model.tokenizer, context, request.seed)
    asked = [each for name in names for each in ask(name, text, distances, request.rows)]
    num_tokens = sum(len(row.tokens) for rows in {id(one.rows): one.rows for one in asked}.values() for row in rows)
    with progress_bar(num_tokens, "token", "probes") as bar:
        entries = measure(asked, make_scorer(model, request.batch_size, bar.update))
    result = {
        "workdir": str(workdir),
        "step": model.step,
        "dtype": model.config.model.dtype,
        "text": request.files,
        "context": context,
        "rows": request.rows,
        "seed": request.seed,
        "probes": entries,
    }
    return Scores(result, tables(result))


def parse_probes(names: str) -> list[str]:
    """The probes of a comma-separated list. Raises UserError for one that does not exist."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        if name not in PROBES:
            raise UserError(f"--probes={names}: {name!r} is no probe; allowed: {', '.join(PROBES)}")
    return found


def parse_distances(distances: str | None) -> list[int] | None:
    """The distances of a comma-separated list, sorted; None = the default. Raises UserError if one is not allowed."""
    if distances is None:
        return None
    try:
        found = sorted({int(part) for part in distances.split(",")})
    except ValueError as error:
        raise UserError(f"--distances={distances}: must be whole numbers, separated by commas") from error
    if found[0] < _SMALLEST_DISTANCE or len(found) > MOST_DISTANCES:
        raise UserError(
            f"--distances={distances}: must be at most {MOST_DISTANCES} numbers of tokens, and none below "
            f"{_SMALLEST_DISTANCE}"
        )
    return found


def ask(name: str, text: ProbeText, distances: Sequence[int] | None, count: int) -> list[Asked]:
    """The lines of a probe's table, not scored yet. distances: None = the default ones that fit, which it says.

    Raises UserError if rows do not fit the context, or the text is too short.
    """
    if name == "positions":
        rows = position_rows(text, count)
        return [
            Asked(name, f"{first:,}-{last:,}", last, rows, bits(f"{first}-{last}"))
            for first, last in octaves(text.context)
        ]
    if name == "lookup":
        return _ask_lookup(text, distances, count)
    asked = [Asked(name, "0", 0, class_rows(text, 0, count), right_label)] if name == "classes" else []
    make, read = _BY_DISTANCE[name]
    for distance in distances or DISTANCES:
        try:
            asked.append(Asked(name, f"{distance:,}", distance, make(text, distance, count), read))
        except RowsTooLong as error:
            if distances or distance == DISTANCES[0]:
                raise
            _note(f"{name} at {distance:,} is left out: {error}")
    return asked


def _ask_lookup(text: ProbeText, distances: Sequence[int] | None, count: int) -> list[Asked]:
    """One set of rows has the facts of all distances."""
    chosen = list(distances or DISTANCES)
    while True:
        try:
            rows = lookup_rows(text, chosen, count)
            return [Asked("lookup", f"{distance:,}", distance, rows, answers(str(distance))) for distance in chosen]
        except RowsTooLong as error:
            if distances or len(chosen) == 1:
                raise
            _note(f"lookup at {chosen.pop():,} is left out: {error}")


def measure(asked: Sequence[Asked], score: Scorer) -> list[dict[str, Any]]:
    """The lines with their figures, as JSON values. Rows that several lines share are scored once."""
    scored: dict[int, list[RowScores]] = {}
    entries = []
    for one in asked:
        if id(one.rows) not in scored:
            scored[id(one.rows)] = score(one.rows)
        figures = one.read(one.rows, scored[id(one.rows)])
        entries.append(
            {
                "probe": one.probe,
                "at": one.at,
                "place": one.place,
                "rows": len(one.rows),
                "fingerprint": fingerprint(one.rows),
                "figures": {name: estimate(values) for name, values in figures.items()},
            }
        )
    return entries


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
