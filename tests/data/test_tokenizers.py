import io
import json

import pytest

from darkformer_jax.data import tokenizers
from darkformer_jax.data.tokenizers import BytesTokenizer, load_tokenizer, make_tokenizer, read_tokenizer, train_bpe
from darkformer_jax.errors import UserError

TEXTS = ["def f(x):\n    return x  # caf\u00e9\r\n", "\u4f60\u597d <|doc|> <s> \U0001f600\tend ", "\n\n  two\n" * 30]


def no_texts():
    raise AssertionError("nothing to train")


@pytest.fixture
def bpe():
    return train_bpe(300, TEXTS)


@pytest.fixture
def sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "two three four"] * 20),
        model_writer=model,
        vocab_size=18,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "spm" / "small.model"
    path.parent.mkdir()
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_decode_inverts_encode(spec):
    tokenizer = make_tokenizer(spec, lambda: TEXTS)
    for text, batched in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert batched.tolist() == ids
        assert tokenizer.bos_id not in ids and max(ids) < tokenizer.vocab_size
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_ids_that_are_not_utf8_decode_to_the_replacement_character():
    assert BytesTokenizer().decode([0xC3, 256, 0x28]) == "\ufffd("


def test_bpe_training_is_a_function_of_the_texts(bpe, tmp_path):
    again = train_bpe(300, iter(TEXTS))
    assert again.fingerprint == bpe.fingerprint
    assert train_bpe(300, TEXTS[:1]).fingerprint != bpe.fingerprint
    for name, tokenizer in (("a", bpe), ("b", again)):
        tokenizer.save(str(tmp_path / name))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_save_and_load_give_the_same_tokenizer(bpe, sentencepiece_model, tmp_path):
    for index, tokenizer in enumerate((BytesTokenizer(), bpe, read_tokenizer(sentencepiece_model))):
        directory = str(tmp_path / str(index))
        tokenizer.save(directory)
        loaded = load_tokenizer(directory)
        for name in ("spec", "vocab_size", "bos_id", "eos_id", "fingerprint"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
        assert loaded.encode("two three") == tokenizer.encode("two three")
        assert read_tokenizer(directory).fingerprint == tokenizer.fingerprint


def test_sentencepiece(sentencepiece_model):
    tokenizer = make_tokenizer(sentencepiece_model, no_texts)
    assert tokenizer.bos_id != tokenizer.eos_id
    ids = tokenizer.encode("two three")
    assert tokenizer.encode_batch(["two three"])[0].tolist() == ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "two three"


def test_document_tokens_of_a_tokenizer_json(bpe, tmp_path):
    bpe.save(str(tmp_path / "trained"))
    definition = json.loads((tmp_path / "trained/tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    plain = definition["added_tokens"][0]
    del definition["model"]["vocab"][plain["content"]]

    def written(name, *contents, config=None):
        (tmp_path / name).mkdir()
        definition["added_tokens"] = [{**plain, "content": c, "id": 1000 + i} for i, c in enumerate(contents)]
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(definition))
        if config:
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        return str(tmp_path / name / "tokenizer.json")

    llama = read_tokenizer(written("llama", "<s>", "</s>"))
    assert (llama.bos_id, llama.eos_id) == (id_of(llama, "<s>"), id_of(llama, "</s>"))
    assert llama.bos_id != llama.eos_id
    assert llama.vocab_size > max(llama.bos_id, llama.eos_id)
    assert len(llama.encode("a long text, not truncated")) > 2
    named = read_tokenizer(written("named", "X", "Y", config={"bos_token": None, "eos_token": {"content": "Y"}}))
    assert named.bos_id == named.eos_id == id_of(named, "Y")
    with pytest.raises(UserError, match="no token .<none>."):
        read_tokenizer(written("unknown", "X", config={"eos_token": "<none>"}))


def id_of(tokenizer, token):
    return tokenizer._tokenizer.token_to_id(token)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:256", "bpe:256.*at least 257"),
        ("bpe:many", "bpe:many"),
        ("word", "word.*bytes, bpe"),
        ("{dir}/none.json", "none.json.*is no file"),
        ("{dir}/bad.json", "bad.json: not a tokenizer.json"),
        ("{dir}/bad.model", "bad.model: not a SentencePiece model"),
        ("{dir}/bad.txt", "bad.txt.*unknown kind"),
        ("{dir}", "exactly one of.*found: none"),
    ],
)
def test_bad_specs(spec, message, tmp_path):
    for name in ("bad.json", "bad.model", "bad.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        make_tokenizer(spec.format(dir=tmp_path), no_texts)


def test_a_found_tokenizer_must_be_the_one_asked_for(bpe, tmp_path):
    bpe.save(str(tmp_path))
    tokenizers.check_tokenizer_is("bpe:300", bpe, "here")
    tokenizers.check_tokenizer_is(str(tmp_path / "tokenizer.json"), bpe, "here")
    for spec, tokenizer in (("bytes", bpe), ("bpe:301", bpe), (str(tmp_path), BytesTokenizer())):
        with pytest.raises(UserError, match="does not match the one in here"):
            tokenizers.check_tokenizer_is(spec, tokenizer, "here")
