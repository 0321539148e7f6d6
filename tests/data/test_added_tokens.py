"""Tokens added beside a SentencePiece model are ids of the tokenizer."""

import io
import json

import pytest
import sentencepiece

from darkformer_jax.data.tokenizers import encode_prompt, load_tokenizer, read_tokenizer
from darkformer_jax.errors import UserError

TEXTS = ("one two<think>three</think> two", "<|im_start|>one two<|im_end|>", "<s> one </s>", "")
DECODER = {
    "{0}": {"content": "<|im_start|>", "special": True},
    "{1}": {"content": "<|im_end|>", "special": True},
    "{2}": {"content": "<think>", "special": False},
    "{3}": {"content": "</think>", "special": False},
}


@pytest.fixture
def directory(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "two three four"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.model").write_bytes(model.getvalue())
    return tmp_path / "hf"


def size_of(directory):
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()


def write(directory, config=None, listed=None, **names):
    """`config`'s added tokens have ids from the model's end on, by the number in braces; and those of `listed`."""
    size = size_of(directory)
    decoder = {name.format(*range(size, size + 9)): entry for name, entry in (config or {}).items()}
    fields = {"eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "legacy": False} | names
    (directory / "tokenizer_config.json").write_text(json.dumps(fields | {"added_tokens_decoder": decoder}))
    if listed is not None:
        (directory / "added_tokens.json").write_text(json.dumps({t: size + n for t, n in listed.items()}))


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens.json"])
def test_they_follow_the_models_ids(directory, tmp_path, form):
    size, plain = size_of(directory), read_tokenizer(str(directory / "tokenizer.model"))
    names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    listed = {"<|im_start|>": 0, "<|im_end|>": 1, "<think>": 2, "</think>": 3}
    write(directory, *((None, listed) if form == "added_tokens.json" else (DECODER,)), **names)
    tokenizer = read_tokenizer(str(directory))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 4, size + 1)
    ids = tokenizer.encode("one <think>two")
    assert size + 2 in ids and tokenizer.decode(ids) == "one <think>two"
    assert tokenizer.encode("<|im_start|>one") == plain.encode("<|im_start|>one")  # the text's special tokens are text
    assert tokenizer.decode([size, *tokenizer.encode("one"), size + 1]) == "one"
    tokenizer.save(str(tmp_path / "saved"))
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, size + 4)


def test_transformers_reads_an_export_of_them_the_same(directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(directory, DECODER, eos_token="<|im_end|>", bos_token="<s>", add_bos_token=True)
    tokenizer = read_tokenizer(str(directory))
    tokenizer.save(str(tmp_path / "saved"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>"]) == [
        size_of(directory) + n for n in range(3)
    ]
    for text in ("one two three", "one<think>two"):
        assert encode_prompt(tokenizer, text) == theirs(text)["input_ids"]


def test_ids_between_the_model_and_an_added_token_stay_unused(directory):
    plain = read_tokenizer(str(directory / "tokenizer.model"))
    write(directory, listed={"<pad>": 3})
    tokenizer = read_tokenizer(str(directory))
    assert tokenizer.vocab_size == plain.vocab_size + 4
    for text in TEXTS:
        assert tokenizer.encode(text) == plain.encode(text)


def test_tokens_that_the_model_has_change_nothing(directory):
    plain = read_tokenizer(str(directory / "tokenizer.model"))
    write(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(str(directory)).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("config", "listed", "message"),
    [
        (DECODER, {"<other>": 0}, "the id .* has two added tokens, '<other>' and '<|im_start|>'"),
        (None, {"<s>": 0}, "the added token '<s>' has id .*, but 1 in the model"),
        ({"x": {"content": "<a>"}}, None, "the added token '<a>' has id 'x'; allowed: a string with a whole number"),
    ],
)
def test_contradictions_are_refused(directory, config, listed, message):
    write(directory, config, listed)
    with pytest.raises(UserError, match=f"tokenizer.model: {message}".replace("|", r"\|")):
        read_tokenizer(str(directory))
