"""A prepared directory: tokenised shards of both splits, their tokenizer, and the manifest that completes it."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from darkformer_jax.data.files import local_path, read_json_object, whole_directory, write_json
from darkformer_jax.data.heldout import HeldoutSplit
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.records import RECORD_TOKENS, RecordStream, RecordWriter, Shard, verify_shards
from darkformer_jax.data.sources import open_corpus
from darkformer_jax.data.stream import StreamBuilder
from darkformer_jax.data.text_files import TEXT_FIELD, OnRead
from darkformer_jax.data.tokenizers import READING_WORDS, Tokenizer, load_tokenizer, make_tokenizer
from darkformer_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
DEFAULT_SHARD_TOKENS = 1 << 26  # 128 MiB of 16-bit tokens before compression

_BPE_SAMPLE_BYTES = 512 << 20  # more text does not change a vocabulary much, and training keeps its words in memory


def prepare(
    out: str,
    *,
    source: str,
    files: str,
    tokenizer_spec: str,
    heldout_fraction: float,
    text_field: str = TEXT_FIELD,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    progress_bar: ProgressBar = no_progress,
) -> dict[str, Any]:
    """Tokenises a corpus into a new prepared directory. Memory holds one shard's buffers, never the corpus.

    Args:
      out: the directory to write, new or empty. It appears when it is complete.
      source: stdlib | text | news (see `open_corpus`).
      files: the source's files.
      tokenizer_spec: see `make_tokenizer`; bpe:<n> is trained on at most 512 MiB of the training documents.
      heldout_fraction: see `HeldoutSplit`.
      text_field: see `open_corpus`.
      shard_tokens: tokens per shard, rounded up to whole records.
      progress_bar: shows each pass over the data.

    Returns:
      The manifest.

    Raises:
      UserError: bad arguments or data, or a disk that cannot be written. All that was written is removed.
    """
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens} is out of range; allowed: 1 or more")
    corpus = open_corpus(source, files, text_field)
    split = HeldoutSplit(corpus, heldout_fraction)

    def training_texts() -> Iterator[str]:
        with progress_bar(corpus.num_bytes, "B", READING_WORDS) as bar:
            yield from split.training_sample(_BPE_SAMPLE_BYTES, bar.update)

    with whole_directory(out) as directory:
        tokenizer = make_tokenizer(tokenizer_spec, training_texts, progress_bar)
        tokenizer.save(str(directory))
        with progress_bar(corpus.num_bytes, "B", "tokenising") as bar:
            splits = _write_splits(str(directory), split, tokenizer, shard_tokens, bar.update)
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": source,
            "heldout_fraction": heldout_fraction,
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "record_tokens": RECORD_TOKENS,
            "splits": splits,
        }
        write_json(directory / MANIFEST, manifest)
    return manifest


def _write_splits(
    out: str, split: HeldoutSplit, tokenizer: Tokenizer, shard_tokens: int, on_read: OnRead
) -> dict[str, Any]:
    writers = [RecordWriter(out, name, tokenizer.vocab_size, shard_tokens) for name in SPLITS]
    builders = [StreamBuilder(tokenizer, writer.append) for writer in writers]
    for is_heldout, document in split.documents(on_read):
        builders[is_heldout].add(document.text)
    for builder, writer in zip(builders, writers, strict=True):
        builder.close()
        writer.close()
    return {
        name: builder.counts | {"shards": [dataclasses.asdict(shard) for shard in writer.shards]}
        for name, builder, writer in zip(SPLITS, builders, writers, strict=True)
    }


def load_prepared(
    directory: str, heldout_fraction: float = 0, *, verify: tuple[int, int] = (0, 1)
) -> tuple[RecordStream, RecordStream, Tokenizer]:
    """The training stream, the held-out stream and the tokenizer of a prepared directory.

    Args:
      directory: what `prepare` wrote.
      heldout_fraction: the one it must have been prepared with; 0 = any.
      verify: (i, n): read shards i, i + n, ... once and compare their SHA-256 with the manifest's. With n processes,
        each reads its own part of the corpus.

    Raises:
      UserError: there is no finished preparation, the format version or held-out fraction is another, the tokenizer is
        not the manifest's, or a shard is missing or (if verified) damaged.
    """
    directory = local_path(directory)
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(directory)
    try:
        expected = manifest["tokenizer"]["fingerprint"]
        if manifest["record_tokens"] != RECORD_TOKENS:
            raise ValueError(f"record_tokens is {manifest['record_tokens']}")
        if tokenizer.fingerprint != expected:
            raise UserError(
                f"the tokenizer in {directory} (fingerprint {tokenizer.fingerprint[:12]}) is not the one its shards"
                f" were made with (fingerprint {expected[:12]} in {MANIFEST})"
            )
        if heldout_fraction not in (0, manifest["heldout_fraction"]):
            raise UserError(
                f"data.heldout_fraction = {heldout_fraction}, but {directory} was prepared with "
                f"{manifest['heldout_fraction']}; allowed: that, or 0 for whatever it was prepared with"
            )
        train, heldout = (_open_stream(directory, manifest["splits"][name], tokenizer, verify) for name in SPLITS)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{os.path.join(directory, MANIFEST)} is damaged: {error!r}") from error
    return train, heldout, tokenizer


def read_manifest(directory: str) -> dict[str, Any]:
    """The manifest of a prepared directory. Raises UserError if there is none, or of another format."""
    path = os.path.join(directory, MANIFEST)
    if not os.path.isdir(directory):
        raise UserError(
            f"data directory {directory!r} does not exist; `python -m darkformer_jax.prepare_data` makes one"
        )
    if not os.path.isfile(path):
        raise UserError(f"{directory!r} holds no {MANIFEST}: it was not prepared, or its preparation did not finish")
    manifest = read_json_object(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version!r}; this program reads {FORMAT_VERSION}: prepare the data again"
        )
    return manifest


def _open_stream(directory: str, split: dict[str, Any], tokenizer: Tokenizer, verify: tuple[int, int]) -> RecordStream:
    shards = [Shard(**shard) for shard in split["shards"]]
    num_records = sum(shard.num_records for shard in shards)
    if num_records != -(-split["num_tokens"] // RECORD_TOKENS):
        raise ValueError(f"{num_records} records for {split['num_tokens']} tokens")
    verify_shards(directory, shards[verify[0] :: verify[1]])
    counts = {name: split[name] for name in ("num_tokens", "num_documents", "num_bytes")}
    one_separator = tokenizer.bos_id == tokenizer.eos_id
    return RecordStream(directory, shards, tokenizer.vocab_size, **counts, starts_are_targets=one_separator)
