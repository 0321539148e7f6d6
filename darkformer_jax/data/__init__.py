"""Text on disk to batches of tokens: sources, tokenizers, streams, batches. Knows nothing of models or configs."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

from darkformer_jax.data.batches import Batch, heldout_batches, num_rows, train_batches
from darkformer_jax.data.chat import Chat
from darkformer_jax.data.conversations import (
    CHAT_SOURCE,
    ChatStream,
    Conversation,
    find_chat_files,
    read_conversations,
    split,
    tokenise,
)
from darkformer_jax.data.files import local_path
from darkformer_jax.data.heldout import DEFAULT_HELDOUT_FRACTION, HeldoutSplit
from darkformer_jax.data.matching import Entry, weighted_entries
from darkformer_jax.data.mixture import Mixture, Split, whole_weights
from darkformer_jax.data.prepared import SPLITS, load_prepared, read_manifest
from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.data.sources import CORPUS_SOURCES, Corpus, open_corpus, open_text_sources
from darkformer_jax.data.stream import TokenStream, memory_stream
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.data.tokenizers import (
    Tokenizer,
    check_tokenizer_is,
    has_tokenizer,
    load_tokenizer,
    saved_or_new_tokenizer,
)
from darkformer_jax.errors import UserError

__all__ = [
    "Batch",
    "Chat",
    "ChatStream",
    "Conversation",
    "Data",
    "Mixture",
    "Split",
    "TokenStream",
    "Tokenizer",
    "data_of_texts",
    "find_data",
    "heldout_batches",
    "load_data",
    "load_tokenizer",
    "num_rows",
    "train_batches",
]

PREPARED_SOURCE = "array_record"


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready to train on: both splits as tokens, and their tokenizer.

    Attributes:
      train, heldout: the splits: each a token stream, or a mixture of one per source.
      tokenizer: of both splits.
      heldout_documents: the held-out texts if they are in memory, else None.
      chat: of conversations, the tokenizer's template; else None.
      heldout_conversations: empty if there are none.
    """

    train: Split
    heldout: Split
    tokenizer: Tokenizer
    heldout_documents: tuple[str, ...] | None
    chat: Chat | None = None
    heldout_conversations: tuple[Conversation, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of both splits' tokens, which decide all batches and held-out figures."""
        return hashlib.sha256((self.train.fingerprint + self.heldout.fingerprint).encode()).hexdigest()

    def heldout_text(self) -> bytes | None:
        """The held-out documents as UTF-8, end to end: `heldout.num_bytes` bytes. None for prepared data."""
        return None if self.heldout_documents is None else "".join(self.heldout_documents).encode("utf-8")


def load_data(
    source: str,
    files: str,
    tokenizer: str,
    heldout_fraction: float,
    tokenizer_dir: str | None = None,
    *,
    text_field: str = TEXT_FIELD,
    verify: tuple[int, int] = (0, 1),
    progress_bar: ProgressBar = no_progress,
) -> Data:
    """The data that a config's `data` section names.

    Args:
      source: stdlib | text | news | chat, read into memory; array_record, read from a prepared directory during
        training.
      files: globs or directories of the source; for array_record the prepared directory. With weights, a mixture:
        books:0.7,code:0.3 for text, or prepared directories.
      tokenizer: bytes | bpe:<n> | a path. For array_record: the one the data was prepared with, or "".
      heldout_fraction: share of each source's documents or conversations; 0 = 0.05. For array_record: the one of its
        preparation, or 0.
      tokenizer_dir: a workdir; a tokenizer saved there is used and must match.
      text_field: for text, the field of a JSON object that holds the text.
      verify: for array_record, (i, n): read shards i, i + n, ... once and compare their hashes.
      progress_bar: shows a tokenizer's training.

    Raises:
      UserError: arguments or files that do not fit.
    """
    if source == PREPARED_SOURCE:
        return _load_prepared_data(files, tokenizer, heldout_fraction, tokenizer_dir, verify)
    if source == CHAT_SOURCE:
        return _load_chat(files, tokenizer, heldout_fraction or DEFAULT_HELDOUT_FRACTION, tokenizer_dir, progress_bar)
    if source not in CORPUS_SOURCES:
        allowed = ", ".join((*CORPUS_SOURCES, CHAT_SOURCE, PREPARED_SOURCE))
        raise UserError(f"data source {source!r} is unknown; allowed: {allowed}")
    fraction = heldout_fraction or DEFAULT_HELDOUT_FRACTION
    sources = weighted_entries(files) if source == "text" else []
    if _is_mixture(sources):
        corpora = open_text_sources(sources, text_field)
        splits = [_split_texts(corpus, fraction, entry.name) for corpus, entry in zip(corpora, sources, strict=True)]
    else:
        sources = []
        splits = [_split_texts(open_corpus(source, files, text_field), fraction)]
    training = [text for train, _ in splits for text in train]
    used = saved_or_new_tokenizer(tokenizer, tokenizer_dir, training, progress_bar)
    train, heldout = (_as_split(sources, [memory_stream(texts[side], used) for texts in splits]) for side in (0, 1))
    return Data(train, heldout, used, tuple(text for _, held_out in splits for text in held_out))


def data_of_texts(
    training: Sequence[str],
    heldout: Sequence[str],
    tokenizer: str,
    tokenizer_dir: str | None = None,
    progress_bar: ProgressBar = no_progress,
) -> Data:
    """The data of two splits that are in memory, a document per text; other arguments as in `load_data`."""
    used = saved_or_new_tokenizer(tokenizer, tokenizer_dir, training, progress_bar)
    return Data(memory_stream(training, used), memory_stream(heldout, used), used, tuple(heldout))


def find_data(source: str, files: str) -> str:
    """What a config's `data.source` and `data.files` name, in words and without reading it.

    Raises UserError if there is nothing, or no file of the source.
    """
    if source == PREPARED_SOURCE:
        manifests = [read_manifest(local_path(entry.name)) for entry in prepared_directories(files)]
        tokens = [sum(manifest["splits"][side]["num_tokens"] for manifest in manifests) for side in SPLITS]
        return f"{tokens[0]:,} training tokens, {tokens[1]:,} held out, in {len(manifests)} prepared director" + (
            "y" if len(manifests) == 1 else "ies"
        )
    if source == CHAT_SOURCE:
        size = sum(os.path.getsize(path) for path in find_chat_files(files)) / 2**20
        return f"{size:,.1f} MiB of conversations"
    sources = weighted_entries(files) if source == "text" else []
    corpora = open_text_sources(sources, TEXT_FIELD) if _is_mixture(sources) else [open_corpus(source, files)]
    size = sum(corpus.num_bytes for corpus in corpora) / 2**20
    return f"{size:,.1f} MiB of {source}" + (f" in {len(sources)} sources" if len(corpora) > 1 else "")


def prepared_directories(files: str) -> list[Entry]:
    """The prepared directories that data.files names: one, or several with weights.

    Raises UserError for several without weights, and for one that is there twice.
    """
    found = weighted_entries(files)
    if not _is_mixture(found):
        if len(found) > 1:
            raise UserError(
                f"{files}: array_record reads one prepared directory, or several with weights: "
                f"{found[0].name}:0.5,{found[1].name}:0.5"
            )
        return found or [Entry(files, None)]
    seen: dict[str, str] = {}
    for name, _ in found:
        other = seen.setdefault(os.path.realpath(name), name)
        if other is not name:
            raise UserError(f"{files}: {other!r} and {name!r} are the same directory; allowed: each of them once")
    return found


def _is_mixture(sources: Sequence[Entry]) -> bool:
    return bool(sources) and sources[0].weight is not None


def _split_texts(corpus: Corpus, fraction: float, name: str = "") -> tuple[list[str], list[str]]:
    """(training, held-out) texts of a corpus. name: what errors about a source of a mixture begin with."""
    texts: tuple[list[str], list[str]] = ([], [])
    try:
        split = HeldoutSplit(corpus, fraction)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from error
    for is_heldout, document in split.documents():
        texts[is_heldout].append(document.text)
    return texts


def _as_split(sources: Sequence[Entry], streams: Sequence[TokenStream]) -> Split:
    """The mixture of the sources' streams, or the only stream if there are no weights."""
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return streams[0]
    return Mixture(tuple(source.name for source in sources), tuple(streams), whole_weights(weights))


def _load_chat(
    files: str, tokenizer: str, heldout_fraction: float, tokenizer_dir: str | None, progress_bar: ProgressBar
) -> Data:
    is_saved = tokenizer_dir is not None and has_tokenizer(tokenizer_dir)
    used = saved_or_new_tokenizer(tokenizer, tokenizer_dir, ())  # a tokenizer trained here has no template anyway
    chat = Chat(used, tokenizer_dir if tokenizer_dir is not None and is_saved else f"data.tokenizer = {tokenizer!r}")
    sides = split(list(read_conversations(files)), heldout_fraction)
    train, heldout = (
        ChatStream(
            list(tokenise(with_progress(side, "conversation", progress_bar, "tokenising"), chat)), used.vocab_size
        )
        for side in sides
    )
    return Data(train, heldout, used, None, chat, tuple(sides[1]))


def _load_prepared_data(
    files: str, tokenizer: str, heldout_fraction: float, tokenizer_dir: str | None, verify: tuple[int, int]
) -> Data:
    sources = prepared_directories(files)
    if tokenizer:
        _require_prepared_with(tokenizer, sources[0].name)  # now: hashing the shards may take long
    loaded = [load_prepared(source.name, heldout_fraction, verify=verify) for source in sources]
    train = _as_split(sources, [stream for stream, _, _ in loaded])
    heldout = _as_split(sources, [stream for _, stream, _ in loaded])
    prepared_with = loaded[0][2]
    for source, (_, _, other) in zip(sources, loaded, strict=True):
        if other.fingerprint != prepared_with.fingerprint:
            raise UserError(
                f"{source.name} was prepared with another tokenizer (fingerprint {other.fingerprint[:12]}) than "
                f"{sources[0].name} ({prepared_with.fingerprint[:12]}); allowed: one tokenizer for all sources "
                f"(prepare_data --tokenizer={sources[0].name})"
            )
    saved = load_tokenizer(tokenizer_dir) if tokenizer_dir and has_tokenizer(tokenizer_dir) else None
    if saved and saved.fingerprint != prepared_with.fingerprint:
        raise UserError(
            f"the tokenizer in {tokenizer_dir} (fingerprint {saved.fingerprint[:12]}) is not the one of the data in"
            f" {files} (fingerprint {prepared_with.fingerprint[:12]})"
        )
    return Data(train, heldout, prepared_with, None)


def _require_prepared_with(tokenizer: str, directory: str) -> None:
    directory = local_path(directory)
    read_manifest(directory)  # says that there is none
    try:
        check_tokenizer_is(tokenizer, load_tokenizer(directory), directory)
    except UserError as error:
        raise UserError(f"{error}; add --config.data.tokenizer= for the one that prepared the data") from error
