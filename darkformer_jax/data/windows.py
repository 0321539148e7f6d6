"""Text of any length as windows of a model's context, each token scored once.

A document's targets are its tokens; the first one is a target only where the family puts a BOS before a document.
Window k holds the `context` targets from number k * stride on. Its inputs are those targets moved by one place. The
first input is BOS if the family has one (as in a prompt), else the document's token before the first target.

The first window scores all its targets, and a later window those that no earlier one held. With stride = context the
windows are separate. With a smaller stride, every token scored after the first window has at least context - stride
tokens before it, as in the sliding windows of Hugging Face's perplexity guide.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from darkformer_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]


class Window(NamedTuple):
    """One row of a batch.

    Attributes:
      inputs, targets: [n] ids, 1 <= n <= context.
      num_skipped: targets at the window's beginning that an earlier window scored.
    """

    inputs: np.ndarray
    targets: np.ndarray
    num_skipped: int

    @property
    def num_scored(self) -> int:
        """The number of targets that are scored."""
        return len(self.targets) - self.num_skipped


@dataclasses.dataclass(frozen=True)
class ScoredDocument:
    """The part of a document that is scored.

    Attributes:
      before: the id before the first target: BOS, or the document's own first token.
      begins_with_bos: whether `before` is BOS; if so, every window begins with it.
      targets: [n] ids.
      num_bytes: UTF-8 bytes of the targets' text.
    """

    before: int
    begins_with_bos: bool
    targets: np.ndarray
    num_bytes: int

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, max_tokens: int | None = None) -> "ScoredDocument":
        """The targets of `text`, at most `max_tokens`.

        `num_bytes` counts the whole text if all its tokens are targets. Otherwise it counts the text that the targets
        decode to; a character that the cut splits belongs to the token that completes it.
        """
        ids = np.asarray(tokenizer.encode_batch([text])[0], np.int32)
        first = 0 if tokenizer.adds_bos else 1
        last = len(ids) if max_tokens is None else min(first + max_tokens, len(ids))
        end = len(text.encode("utf-8")) if last == len(ids) else _num_bytes(tokenizer, ids[:last])
        begin = _num_bytes(tokenizer, ids[:first])
        before = tokenizer.bos_id if tokenizer.adds_bos else int(ids[0]) if len(ids) else 0
        return cls(before, tokenizer.adds_bos, ids[first:last], max(end - begin, 0))

    def windows(self, context: int, stride: int) -> Iterator[Window]:
        """The windows of `context` targets in order; see the module."""
        start, done = 0, 0
        while done < len(self.targets):
            targets = self.targets[start : start + context]
            before = self.before if self.begins_with_bos or not start else self.targets[start - 1]
            inputs = np.concatenate([np.array([before], np.int32), targets[:-1]])
            yield Window(inputs, targets, done - start)
            done = start + len(targets)
            start += stride


def window_batch(windows: Iterable[Window], batch_size: int, context: int) -> Batch:
    """A batch of at most `batch_size` windows. The rest is padding, so the shape is always the same.

    Returns:
      Arrays [batch_size, context]: inputs, targets, segment_ids (1, 0 = padding) and positions, int32; weights, float32
      (1 = the target is scored).
    """
    shape = (batch_size, context)
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, window in enumerate(windows):
        length = len(window.targets)
        batch["inputs"][row, :length] = window.inputs
        batch["targets"][row, :length] = window.targets
        batch["segment_ids"][row, :length] = 1
        batch["positions"][row, :length] = np.arange(length)
        batch["weights"][row, window.num_skipped : length] = 1
    return batch


def _num_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """UTF-8 bytes of the whole characters that `ids` spell."""
    return len(tokenizer.decode(ids.tolist()).rstrip("\N{REPLACEMENT CHARACTER}").encode("utf-8"))
