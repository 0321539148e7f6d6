"""The fixed held-out split: a document's hash decides, so the split does not depend on order, seed or machine."""

import hashlib
from collections.abc import Iterator

from darkformer_jax.data.sources import Corpus, Document
from darkformer_jax.data.text_files import OnRead, ignore_read
from darkformer_jax.errors import UserError

DEFAULT_HELDOUT_FRACTION = 0.05


def hash_fraction(identity: str, salt: str) -> float:
    """A number in [0, 1) from the SHA-256 of `identity`; another salt gives an independent number."""
    digest = hashlib.sha256(salt.encode("utf-8") + b"\0" + identity.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class HeldoutSplit:
    """A corpus split once and for all into training and held-out documents.

    A document is held out if the hash of its identity is below `fraction`. If this leaves one side empty (the corpus
    is one big file, say), each document is split instead: its last `fraction` is held out, from the beginning of a
    line if possible.

    Args:
      corpus: the documents.
      fraction: share of the documents to hold out, in (0, 1).

    Raises:
      UserError: a fraction outside (0, 1), or a corpus without text to split.
    """

    def __init__(self, corpus: Corpus, fraction: float) -> None:
        if not 0 < fraction < 1:
            raise UserError(f"heldout_fraction={fraction} is out of range; allowed: more than 0 and less than 1")
        self._corpus = corpus
        self._fraction = fraction
        self._inside_documents = False
        self._inside_documents = not self._has_both_sides()
        if self._inside_documents and not self._has_both_sides():
            raise UserError("the data holds too little text to train on one part and hold another out")

    def _has_both_sides(self) -> bool:
        seen = set()
        for is_heldout, _ in self.documents():
            seen.add(is_heldout)
            if len(seen) == 2:  # long before the end of any corpus that is not tiny
                return True
        return False

    def documents(self, on_read: OnRead = ignore_read) -> Iterator[tuple[bool, Document]]:
        """All documents of both sides in the corpus's order, as (is held out, document)."""
        for document in self._corpus.documents(on_read):
            if self._inside_documents:
                cut = _tail_start(document.text, self._fraction)
                for is_heldout, text in ((False, document.text[:cut]), (True, document.text[cut:])):
                    if text:
                        yield is_heldout, Document(document.name, text)
            else:
                yield hash_fraction(getattr(document, self._corpus.identity), "heldout") < self._fraction, document

    def training_sample(self, max_bytes: int, on_read: OnRead = ignore_read) -> Iterator[str]:
        """Texts of training documents, chosen by hash: about `max_bytes` in all, or every text if there are fewer."""
        rate = max_bytes / max(self._corpus.num_bytes, 1)
        for is_heldout, document in self.documents(on_read):
            if not is_heldout and (rate >= 1 or hash_fraction(document.text, "sample") < rate):
                yield document.text


def _tail_start(text: str, fraction: float) -> int:
    """Where the last `fraction` of the characters begins, moved on to the next line if there is one."""
    cut = len(text) - max(1, round(len(text) * fraction))
    newline = text.find("\n", cut)
    return newline + 1 if 0 <= newline < len(text) - 1 else cut
