"""From the scores of rows to the figures of a probe, one per row."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from darkformer_jax.data.probe_rows import ProbeRow
from darkformer_jax.tasks.row_scores import RowScores

Figures = dict[str, list[float]]  # name -> the figure of each row
Reader = Callable[[Sequence[ProbeRow], Sequence[RowScores]], Figures]


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over rows, and its standard error; one row has none."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}


def _parts(rows: Sequence[ProbeRow], scores: Sequence[RowScores], name: str) -> Iterator[list[RowScores]]:
    """The stretches of the part `name`, of each row."""
    for row, score in zip(rows, scores, strict=True):
        yield [
            RowScores(score.nll[begin:end], score.correct[begin:end], score.candidates)
            for begin, end in row.parts[name]
        ]


def _nats(rows: Sequence[ProbeRow], scores: Sequence[RowScores], name: str) -> list[float]:
    return [float(np.concatenate([one.nll for one in part]).mean()) for part in _parts(rows, scores, name)]


def copied(rows: Sequence[ProbeRow], scores: Sequence[RowScores]) -> Figures:
    """Nats per token of both copies, their difference, and the share of the second whose logits were largest."""
    first, second = (_nats(rows, scores, name) for name in ("first", "second"))
    return {
        "second_copy": second,
        "first_copy": first,
        "gain": [before - after for before, after in zip(first, second, strict=True)],
        "accuracy": [float(part[0].correct.mean()) for part in _parts(rows, scores, "second")],
    }


def answers(part: str) -> Reader:
    """Of the answers in a part: the share of those that are right to the last token, and nats per token."""

    def read(rows: Sequence[ProbeRow], scores: Sequence[RowScores]) -> Figures:
        right = [float(np.mean([one.correct.all() for one in own])) for own in _parts(rows, scores, part)]
        return {"right": right, "answer": _nats(rows, scores, part)}

    return read


def right_label(rows: Sequence[ProbeRow], scores: Sequence[RowScores]) -> Figures:
    """The share of rows whose likeliest candidate is right; of equally likely ones, each counts for its share."""
    right = []
    for row, score in zip(rows, scores, strict=True):
        best = np.flatnonzero(score.candidates == score.candidates.max())
        right.append(float(np.mean(best == row.answer)))
    return {"right": right}


def bits(part: str) -> Reader:
    """Bits per token of a part."""
    return lambda rows, scores: {"bits_per_token": [nats / math.log(2) for nats in _nats(rows, scores, part)]}
