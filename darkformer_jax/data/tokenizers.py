"""Text to token ids and back: raw bytes, a Hugging Face tokenizer.json, a SentencePiece model, or a BPE trained here.

`encode` never adds special ids and never reads one out of the text: a document that spells "<|doc|>" stays text. The
token stream adds the ids that mark documents (`bos_id`, `eos_id`); `encode_prompt` adds those of a prompt.

Families differ in how a document begins: Llama, Mistral and Gemma put a BOS there, Qwen2, GPT-2 and SmolLM2 put
nothing. The post-processor of the tokenizer.json decides, as in transformers 5. For a SentencePiece model, the field
`add_bos_token` of its tokenizer_config.json decides.
"""

import contextlib
import hashlib
import json
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers as hf

from darkformer_jax.data.added_tokens import with_added_tokens
from darkformer_jax.data.byte_definition import byte_definition, is_byte_definition
from darkformer_jax.data.files import local_path, read_file, read_json_object, write_file, write_json
from darkformer_jax.data.progress import ProgressBar, no_progress, time_shown, with_progress
from darkformer_jax.data.tokenizer_config import (
    CONFIG_FILE,
    chat_template,
    new_hf_config,
    read_hf_config,
    read_settings,
    token_names,
)
from darkformer_jax.data.tokens_in_text import AddedToken, AddedTokens, Encoded, SentencePieceAddedTokens, encoded_bytes
from darkformer_jax.errors import UserError, one_line

DOCUMENT_SEPARATOR = "<|doc|>"

_BYTES_FILE = "tokenizer.bytes"
_JSON_FILE = "tokenizer.json"
_MODEL_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
_TOKENIZER_FILES = (_BYTES_FILE, _JSON_FILE, _MODEL_FILE)
_ALLOWED_SPECS = "bytes, bpe:<vocabulary size>, or the path of a tokenizer.json, a .model or a directory with one"

# Training reads longer words in pieces of this many bytes. Its time grows with the square of a word, and a genome or a
# Chinese text may be a single one. Where there are spaces, none is as long: 98 signs of a drawn table have 294 bytes.
_LONGEST_WORD = 1024
READING_WORDS = "reading words for the tokenizer"  # what comes before its training, for progress bars

_CONTEXT_OF_TEXT = 8  # ids to decode before new ones: SentencePiece drops the space of a text's first word

# (begin, end) of a document, by the names that published models use. For a tokenizer.json without a config.
_KNOWN_DOCUMENT_TOKENS = (
    (DOCUMENT_SEPARATOR, DOCUMENT_SEPARATOR),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class Tokenizer(Protocol):
    """What the rest of the library needs from a tokenizer.

    Attributes:
      spec: the `data.tokenizer` value it stands for: "bytes", "bpe:<n>", or "" if it was read from a file.
      vocab_size: ids are 0 .. vocab_size - 1.
      adds_bos: whether the family puts `bos_id` before a text that nothing precedes.
      bos_id, eos_id: begin and end of a document in a stream. They are equal if one separator does both, which is so
        wherever `adds_bos` is False: such a model has seen no other token between its documents.
      fingerprint: SHA-256 (hexadecimal) of everything that defines the mapping.
      chat_template: the Jinja template that turns a conversation into text; None if the model has none. It is the
        `chat_template` of the tokenizer_config.json that `save` writes. The fingerprint does not cover it.
      token_names: the tokens that the template may call by name, such as "bos_token".
      added_tokens: the tokens that `encode_with_added` reads out of a text, by their text.
    """

    spec: str
    vocab_size: int
    adds_bos: bool
    bos_id: int
    eos_id: int
    fingerprint: str
    chat_template: str | None

    @property
    def token_names(self) -> Mapping[str, str]: ...

    @property
    def added_tokens(self) -> Mapping[str, AddedToken]: ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special ones."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, as integer arrays."""

    def encode_with_added(self, pieces: Sequence[str]) -> list[Encoded]:
        """The tokens of every piece of a text, with each added token that it spells read as that token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special ids are skipped, and bytes that are not UTF-8 become U+FFFD."""

    def save(self, directory: str) -> None:
        """Writes the files from which `load_tokenizer(directory)` makes this tokenizer again."""


class BytesTokenizer:
    """The 256 byte values of UTF-8, and id 256 as the separator of documents."""

    spec = "bytes"
    vocab_size = 257
    adds_bos = True
    bos_id = 256
    eos_id = 256
    fingerprint = hashlib.sha256(b"UTF-8 bytes, separator 256").hexdigest()
    chat_template: str | None = None
    token_names: Mapping[str, str] = types.MappingProxyType({})
    added_tokens: Mapping[str, AddedToken] = types.MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_with_added(self, pieces: Sequence[str]) -> list[Encoded]:
        return [encoded_bytes(piece) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def save(self, directory: str) -> None:
        write_file(os.path.join(directory, _BYTES_FILE), b"one id per byte of UTF-8; 256 separates documents\n")


class _DefinedByFile:
    """The common part of tokenizers that are read from a file and the tokenizer_config.json beside it."""

    _file: str  # its name
    _added: AddedTokens | SentencePieceAddedTokens

    def __init__(self, definition: bytes, config: dict[str, Any] | None, marks: Sequence[Any]) -> None:
        self._definition = definition
        self._config = config
        self.token_names: Mapping[str, str] = token_names(config or {})
        self.chat_template = chat_template(config or {})
        marked = hashlib.sha256(definition).digest() + json.dumps(marks).encode("utf-8")
        self.fingerprint = hashlib.sha256(marked).hexdigest()

    @property
    def added_tokens(self) -> Mapping[str, AddedToken]:
        return self._added.tokens

    def encode_with_added(self, pieces: Sequence[str]) -> list[Encoded]:
        with _unknown_words():
            return self._added.encode(pieces)

    def save(self, directory: str) -> None:
        if self._config is not None:
            write_json(os.path.join(directory, CONFIG_FILE), self._config)
        write_file(os.path.join(directory, self._file), self._definition)


class HuggingFaceTokenizer(_DefinedByFile):
    """A tokenizer of the `tokenizers` library.

    Args:
      definition: the bytes of a tokenizer.json. If it asks for truncation or padding, they are switched off.
      bos_token: its token before a document; None where the family puts none.
      eos_token: its token after a document.
      spec: "bpe:<n>" if it was trained here.
      config: the tokenizer_config.json it was read with, which `save` writes unchanged. None: one is made.
    """

    _file = _JSON_FILE

    def __init__(
        self,
        definition: bytes,
        bos_token: str | None,
        eos_token: str,
        spec: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        first = eos_token if bos_token is None else bos_token
        config = new_hf_config(bos_token, eos_token, spec) if config is None else config
        super().__init__(definition, config, [first, eos_token])
        self._tokenizer = hf.Tokenizer.from_str(definition.decode("utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = None  # what it adds is not wanted here, and some count no space in offsets
        self._tokenizer.encode_special_tokens = True  # the text's "<|doc|>" is text
        self._added = AddedTokens(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for token in (first, eos_token):
            if token not in vocabulary:
                raise UserError(f"the tokenizer has no token {token!r}, which should mark documents")
        self.spec = spec
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.adds_bos = bos_token is not None
        self.bos_id = vocabulary[first]
        self.eos_id = vocabulary[eos_token]

    def encode(self, text: str) -> list[int]:
        with _unknown_words():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The fast form skips character offsets, which nobody reads, and takes half the time.
        with _unknown_words():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [i for i in map(int, ids) if i not in (self.bos_id, self.eos_id)]
        return self._tokenizer.decode(ids, skip_special_tokens=True)


@contextlib.contextmanager
def _unknown_words() -> Iterator[None]:
    """What the library raises for a text is a UserError: a list of words without an unknown one may lack a word."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # the library raises bare Exception; all else is not about words
            raise
        raise UserError(f"the tokenizer has no ids for a word of the text: {one_line(error)}") from error


class SentencePieceTokenizer(_DefinedByFile):
    """A SentencePiece model. Decoding is as exact as the model's own normalisation of text.

    Args:
      definition: the bytes of a .model file, which must define an end-of-document id.
      config: the tokenizer_config.json beside it. It may name other tokens than the model for the ends of a document,
        and may say that no BOS precedes a text. Otherwise a BOS that the model defines precedes it.
    """

    _file = _MODEL_FILE
    spec = ""

    def __init__(self, definition: bytes, config: dict[str, Any] | None = None) -> None:
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=definition)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model: {error}") from error
        settings = read_settings(config or {})
        bos_id = self._id_of(settings.bos_token, self._processor.bos_id())
        self.eos_id = self._id_of(settings.eos_token, self._processor.eos_id())
        if self.eos_id < 0:
            raise UserError("the SentencePiece model defines no end-of-sentence id, which should mark documents")
        self.vocab_size = self._processor.vocab_size()
        self.adds_bos = bos_id >= 0 and settings.add_bos_token is not False
        self.bos_id = bos_id if self.adds_bos else self.eos_id
        super().__init__(definition, config, [self.bos_id, self.eos_id])
        self._added = SentencePieceAddedTokens(definition)
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id} if self.adds_bos else {"eos_token": self.eos_id}
        own = {name: self._processor.id_to_piece(end) for name, end in ends.items()}
        self.token_names = {**own, **self.token_names}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [i for i in map(int, ids) if i not in (self.bos_id, self.eos_id) and not self._processor.is_control(i)]
        return self._processor.decode(ids)

    def _id_of(self, token: str | None, default: int) -> int:
        if token is None:
            return default
        found = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(found) != token:  # an absent piece gets the unknown piece's id
            raise UserError(f"the SentencePiece model has no piece {token!r}, which {CONFIG_FILE} names")
        return found


def encode_prompt(tokenizer: Tokenizer, text: str, special_tokens: bool = False) -> list[int]:
    """The ids that a model continues, at least one: BOS if the family has one, then those of `text`.

    Without a BOS, an empty text becomes the end-of-document id: a new document follows it.

    special_tokens: read <|im_start|> and the like as tokens; a BOS that the text begins with is not added once more.
    """
    ids = tokenizer.encode_with_added([text])[0].ids.tolist() if special_tokens else tokenizer.encode(text)
    if tokenizer.adds_bos and not (special_tokens and ids[:1] == [tokenizer.bos_id]):
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eos_id]


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that the ids `new` add to the prompt's.

    It is not `decode(new)`: SentencePiece models drop the space that a text's first word begins with.
    """
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


def stream_continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int]) -> Iterator[str]:
    """`decode_continuation` in pieces, as the ids come. The cost per token does not grow with the text."""
    ids, begin, end = list(prompt), max(0, len(prompt) - _CONTEXT_OF_TEXT), len(prompt)
    for token in new:
        ids.append(token)
        known, text = tokenizer.decode(ids[begin:end]), tokenizer.decode(ids[begin:])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            yield text[len(known) :]
            begin, end = max(0, end - _CONTEXT_OF_TEXT), len(ids)
    yield tokenizer.decode(ids[begin:])[len(tokenizer.decode(ids[begin:end])) :]


def make_tokenizer(
    spec: str, training_texts: Callable[[], Iterable[str]], progress_bar: ProgressBar = no_progress
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      spec: bytes | bpe:<vocabulary size> | a path.
      training_texts: gives the texts to train on; called only if `spec` asks for training.
      progress_bar: shows the training.

    Raises:
      UserError: an unknown spec, a path that does not exist or is no tokenizer, a vocabulary too small for bytes.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec.startswith("bpe:"):
        return train_bpe(bpe_vocab_size(spec), training_texts(), progress_bar)
    return read_tokenizer(spec)


def saved_or_new_tokenizer(
    spec: str, directory: str | None, texts: Sequence[str], progress_bar: ProgressBar = no_progress
) -> Tokenizer:
    """The tokenizer saved in `directory`, which must be the one of `spec`. If there is none, `make_tokenizer`'s.

    Raises:
      UserError: what `make_tokenizer` raises, or the saved tokenizer is another one.
    """
    if directory is None or not has_tokenizer(directory):
        return make_tokenizer(spec, lambda: with_progress(texts, "text", progress_bar, READING_WORDS), progress_bar)
    saved = load_tokenizer(directory)
    check_tokenizer_is(spec, saved, directory)
    return saved


def bpe_vocab_size(spec: str) -> int:
    """The <n> of `bpe:<n>`. Raises UserError if it is not a number, is too small for all bytes, or too large."""
    size = spec.removeprefix("bpe:")
    smallest = 256 + 1  # every byte and the separator
    largest = 10_000_000  # the library allocates memory for all of them at once
    if not size.isdecimal() or len(size) > len(str(largest)) or not smallest <= int(size) <= largest:
        allowed = f"bpe:<vocabulary size of at least {smallest} and at most {largest}>"
        raise UserError(f"tokenizer {spec!r} is not possible; allowed: {allowed}")
    return int(size)


def train_bpe(vocab_size: int, texts: Iterable[str], progress_bar: ProgressBar = no_progress) -> HuggingFaceTokenizer:
    """Trains byte-level BPE (Sennrich et al., 2016, on bytes as in GPT-2) with id 0 as separator.

    The same texts give the same tokenizer. Its tokens have at most 1024 bytes.
    """
    tokenizer = hf.Tokenizer(hf.models.BPE())
    words = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([words, hf.pre_tokenizers.FixedLength(_LONGEST_WORD)])
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_SEPARATOR],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with contextlib.ExitStack() as stack:

        def texts_then_time() -> Iterator[str]:
            yield from texts
            stack.enter_context(time_shown(progress_bar, "training the tokenizer"))

        tokenizer.train_from_iterator(texts_then_time(), trainer)
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{DOCUMENT_SEPARATOR} $A",
        special_tokens=[(DOCUMENT_SEPARATOR, tokenizer.token_to_id(DOCUMENT_SEPARATOR))],
    )
    definition = tokenizer.to_str().encode("utf-8")
    return HuggingFaceTokenizer(definition, DOCUMENT_SEPARATOR, DOCUMENT_SEPARATOR, spec=f"bpe:{vocab_size}")


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json, a SentencePiece .model, or a directory that holds one of them.

    The tokenizer_config.json beside it names the tokens that mark documents. Without one, the .model does, or the
    post-processor and the usual names in the tokenizer.json do.
    """
    path = local_path(path)
    if os.path.isdir(path):
        return load_tokenizer(path)
    if not os.path.isfile(path):
        raise UserError(f"tokenizer {path!r} is not a file; allowed: {_ALLOWED_SPECS}")
    data = read_file(path)
    try:
        config = read_hf_config(os.path.dirname(path))
        if path.endswith(".model"):
            added = os.path.join(os.path.dirname(path), _ADDED_FILE)
            listed = read_json_object(added) if os.path.isfile(added) else {}
            return SentencePieceTokenizer(with_added_tokens(data, listed, config or {}), config)
        if path.endswith(".json"):
            return _read_hf_tokenizer(data, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"tokenizer {path!r} is of an unknown kind; allowed: {_ALLOWED_SPECS}")


def load_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer saved in `directory`. Raises UserError unless it holds exactly one.

    Published models may have two forms of one tokenizer, tokenizer.json and tokenizer.model: then the first is read.
    """
    directory = local_path(directory)
    present = [name for name in _TOKENIZER_FILES if os.path.isfile(os.path.join(directory, name))]
    if present == [_JSON_FILE, _MODEL_FILE]:
        present.remove(_MODEL_FILE)
    if len(present) != 1:
        found = ", ".join(present) or "none"
        raise UserError(f"{directory!r} must hold exactly one of {', '.join(_TOKENIZER_FILES)}; found: {found}")
    if present[0] == _BYTES_FILE:
        return BytesTokenizer()
    return read_tokenizer(os.path.join(directory, present[0]))


def save_for_transformers(tokenizer: Tokenizer, directory: str) -> None:
    """Writes the files from which transformers' AutoTokenizer makes this tokenizer, and `load_tokenizer`, too.

    Its tokenizer of bytes also leaves a text that spells "<|doc|>" as it is.
    """
    if not isinstance(tokenizer, BytesTokenizer):
        tokenizer.save(directory)
        return
    config = new_hf_config(DOCUMENT_SEPARATOR, DOCUMENT_SEPARATOR, tokenizer.spec) | {"split_special_tokens": True}
    write_json(os.path.join(directory, CONFIG_FILE), config)
    write_file(os.path.join(directory, _JSON_FILE), byte_definition(DOCUMENT_SEPARATOR))


def has_tokenizer(directory: str) -> bool:
    """Whether a tokenizer was saved in `directory`."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in _TOKENIZER_FILES)


def check_tokenizer_is(spec: str, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError unless `tokenizer`, found in `where`, is the one that `spec` asks for."""
    if spec == "bytes" or spec.startswith("bpe:"):
        if tokenizer.spec != spec:
            raise UserError(
                f"tokenizer {spec!r} does not match the one in {where}: {tokenizer.spec or 'read from a file'}"
                f" with {tokenizer.vocab_size} ids"
            )
        return
    wanted = read_tokenizer(spec)
    if wanted.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer {spec!r} ({wanted.vocab_size} ids, fingerprint {wanted.fingerprint[:12]}) does not match the"
            f" one in {where} ({tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]})"
        )


def _read_hf_tokenizer(data: bytes, config: dict[str, Any] | None) -> HuggingFaceTokenizer | BytesTokenizer:
    try:
        tokenizer = hf.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"not a tokenizer.json: {error}") from error
    settings = read_settings(config or {})
    trained_as = settings.trained_as
    if trained_as == BytesTokenizer.spec:
        if is_byte_definition(data, DOCUMENT_SEPARATOR) and not chat_template(config or {}):
            return BytesTokenizer()
        trained_as = ""  # it has become another since
    try:
        bos, eos = _first_token(tokenizer), settings.eos_token
    except Exception as error:  # likewise
        raise UserError(f"a tokenizer.json that cannot encode: {error}") from error
    if not eos:
        eos = _usual_eos(tokenizer.get_vocab(with_added_tokens=True), bos)
        config = config and {**config, "eos_token": eos}
    return HuggingFaceTokenizer(data, bos, eos, trained_as, config)


def _first_token(tokenizer: hf.Tokenizer) -> str | None:
    """The token that the post-processor puts before every text, or None."""
    text = "a"
    if isinstance(tokenizer.model, hf.models.WordLevel):  # which may not know it
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        text = max(vocabulary, key=vocabulary.__getitem__)
    bare = tokenizer.encode(text, add_special_tokens=False).ids
    ids = tokenizer.encode(text, add_special_tokens=True).ids
    begins = len(ids) > len(bare) and ids[: len(bare)] != bare
    return tokenizer.id_to_token(ids[0]) if begins else None


def _usual_eos(vocabulary: dict[str, int], bos: str | None) -> str:
    for usual_bos, eos in _KNOWN_DOCUMENT_TOKENS:
        if usual_bos in vocabulary and eos in vocabulary and bos in (None, usual_bos):
            return eos
    raise UserError(
        f'no token marks the end of a document; put {{"bos_token": ..., "eos_token": ...}} into {CONFIG_FILE} beside it'
    )
