"""Warnings of too little data: a run on a few lines of text trains, learns them by heart, and says nothing."""

MANY_TIMES = 100  # a run that sees its data more often learns it by heart
_FEW_EXAMPLES = 20


def too_little_text(
    name: str, tokens: int, sequence_length: int, drawn: float, batch_size: float, num_steps: int
) -> str:
    """What to say of training text that fills no batch or is seen very often; "" = it is enough.

    Args:
      name: of a source of a mixture; "" = the only one.
      tokens: of the text that are predicted.
      sequence_length: tokens per row.
      drawn: rows that the run reads of this text.
      batch_size: rows of this text in a batch.
      num_steps: of the run.
    """
    rows = tokens / sequence_length
    if rows >= batch_size and drawn <= MANY_TIMES * rows:
        return ""
    of = f" of {name}" if name else ""
    times = _times(drawn / max(rows, 1.0))  # a row that is not full is read as it is
    size = _rows(tokens, sequence_length)
    return f"{tokens:,} training tokens{of}, {size}: each is seen {times} in {num_steps:,} steps"


def too_little_heldout_text(tokens: int, sequence_length: int) -> str:
    """What to say of held-out text that fills no row; "" = it is enough."""
    if tokens >= sequence_length:
        return ""
    return f"{tokens:,} held-out tokens, {_rows(tokens, sequence_length)}: figures on them say little"


def too_few_examples(training: int, heldout: int, drawn: int, num_steps: int) -> list[str]:
    """What to say of labelled examples that are seen very often, or are too few to measure with."""
    said = []
    if drawn > MANY_TIMES * training:
        seen = _times(drawn / training)
        said.append(f"{training:,} training examples: each is seen {seen} in {num_steps:,} steps")
    if heldout < _FEW_EXAMPLES:
        said.append(f"{heldout:,} held-out examples: figures on them say little")
    return said


def _rows(tokens: int, sequence_length: int) -> str:
    rows = tokens / sequence_length
    return f"{100 * rows:.2g}% of one row" if rows < 1 else f"{rows:,.1f} rows"


def _times(number: float) -> str:
    return f"about {number:,.0f} times" if number >= 2 else "about once"
