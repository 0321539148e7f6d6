import io
import itertools
import json
import os
import shutil

import pytest
import tokenizers as hf

from darkformer_jax.data import tokenizers
from darkformer_jax.data.tokenizers import (
    BytesTokenizer,
    decode_continuation,
    encode_prompt,
    load_tokenizer,
    make_tokenizer,
    read_tokenizer,
    save_for_transformers,
    stream_continuation,
    train_bpe,
)
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


UNSPACED = {  # more than one word of the training, and periodic: whatever is merged, longer pairs are left
    "genome": "ACGTTGCAA" * 2000,
    "chinese": "\u4f60\u597d\u4e16\u754c" * 2000,
    "minified": "var" + "aB" * 8000,
    "ruler": "=" * 20_000,
}


@pytest.mark.parametrize("text", UNSPACED.values(), ids=UNSPACED)
def test_tokens_of_text_without_spaces_have_at_most_1024_bytes(text):
    tokenizer = train_bpe(500, [text])
    ids = tokenizer.encode(text)
    assert 500 < max(len(tokenizer.decode([i]).encode()) for i in ids) <= 1024
    assert tokenizer.decode(ids) == text


def test_text_with_spaces_gives_the_tokenizer_that_it_gave_before_long_words_were_cut():
    texts = [
        *TEXTS,
        "| " + "\u2500" * 341 + " |\n",
        "#" + "=" * 1023 + "\n",
        " ".join("abracadabra" for _ in range(200)),
    ]
    plain = hf.Tokenizer(hf.models.BPE())
    plain.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|doc|>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(texts, trainer)
    ours = train_bpe(400, texts)
    wanted, found = json.loads(plain.to_str()), json.loads(ours._tokenizer.to_str())
    for part in ("model", "pre_tokenizer", "normalizer", "added_tokens"):
        assert found[part] == wanted[part], part


def test_save_and_load_give_the_same_tokenizer(bpe, sentencepiece_model, tmp_path):
    for index, tokenizer in enumerate((BytesTokenizer(), bpe, read_tokenizer(sentencepiece_model))):
        directory = str(tmp_path / str(index))
        tokenizer.save(directory)
        loaded = load_tokenizer(directory)
        for name in ("spec", "vocab_size", "adds_bos", "bos_id", "eos_id", "fingerprint"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
        assert loaded.encode("two three") == tokenizer.encode("two three")
        assert read_tokenizer(directory).fingerprint == tokenizer.fingerprint


def test_sentencepiece(sentencepiece_model):
    tokenizer = make_tokenizer(sentencepiece_model, no_texts)
    assert tokenizer.bos_id != tokenizer.eos_id
    ids = tokenizer.encode("two three")
    assert tokenizer.encode_batch(["two three"])[0].tolist() == ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "two three"


@pytest.fixture
def published(tmp_path):
    """Writes the files of a published model: a byte-level BPE with the given special tokens, and returns the path.

    `puts_first`: what its post-processor puts before a text.
    """
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())

    def write(name, *special, config=None, puts_first=None):
        trainer = hf.trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        byte_level = hf.processors.ByteLevel(trim_offsets=True)
        if puts_first:
            first = (puts_first, tokenizer.token_to_id(puts_first))
            template = hf.processors.TemplateProcessing(single=f"{puts_first} $A", special_tokens=[first])
            tokenizer.post_processor = hf.processors.Sequence([byte_level, template])
        else:
            tokenizer.post_processor = byte_level
        tokenizer.enable_truncation(2)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        if config is not None:
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return write


def as_object(token):
    return {"__type": "AddedToken", "content": token, "special": True}


END = "<|endoftext|>"
LLAMA_3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
GEMMA = {"bos_token": as_object("<bos>"), "eos_token": as_object("<eos>")}
CHAT = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
FAMILIES = {  # special tokens, tokenizer_config.json, what the post-processor puts first; BOS or None, EOS
    "llama 3": (LLAMA_3.values(), LLAMA_3, "<|begin_of_text|>", "<|begin_of_text|>", "<|end_of_text|>"),
    "llama 3 alone": (LLAMA_3.values(), None, "<|begin_of_text|>", "<|begin_of_text|>", "<|end_of_text|>"),
    "gemma": (("<pad>", "<eos>", "<bos>"), GEMMA | {"add_bos_token": True}, "<bos>", "<bos>", "<eos>"),
    "gemma, not switched off": (("<eos>", "<bos>"), GEMMA | {"add_bos_token": False}, "<bos>", "<bos>", "<eos>"),
    "add_bos_token alone": (("<eos>", "<bos>"), GEMMA | {"add_bos_token": True}, None, None, "<eos>"),
    "qwen2": ((END,), {"add_bos_token": False, "bos_token": None, "eos_token": END}, None, None, END),
    "gpt2": ((END,), {"add_bos_token": False, "bos_token": END, "eos_token": END}, None, None, END),
    "smollm2": ((END,), {"bos_token": END, "eos_token": as_object(END)}, None, None, END),
    "smollm2 instruct": ((END, *CHAT.values()), CHAT, None, None, "<|im_end|>"),
    "post-processor's own": (("<s>", "</s>"), {"bos_token": None, "eos_token": "</s>"}, "<s>", "<s>", "</s>"),
    "no config": ((END,), None, None, None, END),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bos_rule_of_a_family(family, published, tmp_path):
    special, config, puts_first, bos, eos = FAMILIES[family]
    directory = published("model", *special, config=config, puts_first=puts_first)
    tokenizer = read_tokenizer(directory)
    assert tokenizer.adds_bos == (bos is not None)
    assert tokenizer.eos_id == id_of(tokenizer, eos)
    assert tokenizer.bos_id == id_of(tokenizer, bos or eos)
    prompt = encode_prompt(tokenizer, "def f")
    assert prompt == ([tokenizer.bos_id] if bos else []) + tokenizer.encode("def f")
    assert encode_prompt(tokenizer, "") == [id_of(tokenizer, bos or eos)]
    assert len(tokenizer.encode("a long text")) > 2  # not truncated
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    tokenizer.save(str(tmp_path / "saved"))
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (again.adds_bos, again.bos_id, again.fingerprint) == (
        tokenizer.adds_bos,
        tokenizer.bos_id,
        tokenizer.fingerprint,
    )
    if config is not None:
        assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text()) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bos_rule_is_that_of_transformers(family, published):
    transformers = pytest.importorskip("transformers")
    special, config, puts_first, _, _ = FAMILIES[family]
    directory = published("model", *special, config=config, puts_first=puts_first)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = read_tokenizer(directory)
    for text in TEXTS:
        assert encode_prompt(ours, text) == theirs(text, split_special_tokens=True)["input_ids"]


def test_tokenizers_made_here_are_read_the_same_by_transformers(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert encode_prompt(bpe, "def f(x)") == theirs("def f(x)")["input_ids"]
    assert theirs.eos_token_id == bpe.eos_id


@pytest.fixture
def bytes_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_for_transformers(BytesTokenizer(), str(tmp_path))
    return transformers.AutoTokenizer.from_pretrained(str(tmp_path))


def test_bytes_are_the_same_in_transformers(bytes_in_transformers):
    every_sign = "".join(chr(sign) for sign in [*range(0x900), *range(0xE000, 0x110000, 1009)])
    for text in [*TEXTS, every_sign, "", "<|doc|>"]:
        ids = bytes_in_transformers(text)["input_ids"]
        assert ids == encode_prompt(BytesTokenizer(), text)
        assert bytes_in_transformers.decode(ids, skip_special_tokens=True) == text
    assert (len(bytes_in_transformers), bytes_in_transformers.eos_token_id) == (257, 256)


def test_bytes_that_are_no_text_are_decoded_the_same_by_transformers(bytes_in_transformers):
    edges = (0x41, 0x80, 0x9F, 0xBF, 0xC1, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF, 256)
    for ids in itertools.product(edges, repeat=3):
        decoded = bytes_in_transformers.decode(ids, skip_special_tokens=True)
        assert decoded == BytesTokenizer().decode(ids), ids


def test_bytes_come_back_as_bytes_unless_tokens_were_added(bytes_in_transformers, tmp_path):
    assert isinstance(load_tokenizer(str(tmp_path)), BytesTokenizer)
    bytes_in_transformers.save_pretrained(tmp_path / "saved")
    assert isinstance(load_tokenizer(str(tmp_path / "saved")), BytesTokenizer)
    bytes_in_transformers.add_tokens("<|new|>")
    bytes_in_transformers.save_pretrained(tmp_path / "more")
    more = load_tokenizer(str(tmp_path / "more"))
    assert (more.spec, more.vocab_size) == ("", 258)


def test_a_tokenizer_model_beside_a_tokenizer_json_is_the_same_one(published, tmp_path):
    directory = published("model", END, config={"eos_token": END})
    (tmp_path / "model/tokenizer.model").write_bytes(b"not read")
    assert load_tokenizer(directory).fingerprint == read_tokenizer(directory + "/tokenizer.json").fingerprint


def test_what_stands_in_files_beside_the_config_comes_along(published, tmp_path):
    directory = published("model", "<s>", "</s>", "<end>", config={"model_max_length": 77, "eos_token": None})
    assert read_tokenizer(directory).eos_id == id_of(read_tokenizer(directory), "</s>")
    (tmp_path / "model/special_tokens_map.json").write_text(json.dumps({"eos_token": as_object("<end>")}))
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}")
    tokenizer = read_tokenizer(directory)
    assert tokenizer.eos_id == id_of(tokenizer, "<end>")
    tokenizer.save(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert (saved["model_max_length"], saved["chat_template"]) == (77, "{{ messages }}")
    assert read_tokenizer(str(tmp_path / "saved")).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({}, None),
        ({"chat_template": None}, None),
        ({"chat_template": "{{ messages }}"}, "{{ messages }}"),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, None),
    ],
)
@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer.model"])
def test_the_chat_template_is_saved_with_the_tokenizer(
    form, config, template, published, sentencepiece_model, tmp_path
):
    published("source", "<s>", "</s>", config={"bos_token": "<s>", "eos_token": "</s>"} | config)
    if form == "tokenizer.model":
        os.remove(tmp_path / "source/tokenizer.json")
        shutil.copy(sentencepiece_model, tmp_path / "source/tokenizer.model")
    tokenizer = read_tokenizer(str(tmp_path / "source"))
    assert tokenizer.chat_template == template
    tokenizer.save(str(tmp_path / "saved"))
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == template


def test_the_chat_template_of_an_export_is_the_one_that_transformers_applies(published, tmp_path):
    transformers = pytest.importorskip("transformers")
    published("source", "<s>", "</s>", config={"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "source/chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    read_tokenizer(str(tmp_path / "source")).save(str(tmp_path / "saved"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert theirs.apply_chat_template([{"role": "user", "content": "two"}], tokenize=False) == "[two]"


def test_a_chat_template_that_is_not_text_is_refused(published, tmp_path):
    published("source", "<s>", "</s>", config={"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "source/chat_template.jinja").write_bytes("\u00e9{{ messages }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"source/chat_template.jinja is not UTF-8 text: .* byte 0xe9"):
        read_tokenizer(str(tmp_path / "source"))


def test_tokenizers_made_here_have_no_chat_template(bpe):
    assert (bpe.chat_template, BytesTokenizer().chat_template) == (None, None)


def test_the_config_beside_a_sentencepiece_model(sentencepiece_model, tmp_path):
    def read(**config):
        (tmp_path / "spm/tokenizer_config.json").write_text(json.dumps(config))
        return read_tokenizer(sentencepiece_model)

    plain = read()
    assert plain.adds_bos and encode_prompt(plain, "two") == [1, *plain.encode("two")]
    without = read(add_bos_token=False)
    assert not without.adds_bos and without.bos_id == without.eos_id == plain.eos_id
    assert encode_prompt(without, "two") == plain.encode("two")
    assert without.fingerprint != plain.fingerprint
    without.save(str(tmp_path / "saved"))
    assert not load_tokenizer(str(tmp_path / "saved")).adds_bos
    other = read(bos_token="<s>", eos_token={"content": "<unk>"})
    assert (other.bos_id, other.eos_id) == (1, 0)
    with pytest.raises(UserError, match="small.model: the SentencePiece model has no piece '<eos>'"):
        read(eos_token="<eos>")


def test_a_continuation_keeps_the_space_of_its_first_word(sentencepiece_model, bpe):
    tokenizer = read_tokenizer(sentencepiece_model)
    prompt, new = encode_prompt(tokenizer, "one two"), tokenizer.encode("three four")
    assert tokenizer.decode(new) == "three four"
    assert decode_continuation(tokenizer, prompt, new) == " three four"
    assert decode_continuation(bpe, encode_prompt(bpe, "one"), bpe.encode("two")) == "two"
    assert decode_continuation(bpe, encode_prompt(bpe, ""), bpe.encode(" two")) == " two"


def llama_json():
    """A tokenizer.json as Llama 2's: words begin with a sign for their space, unknown characters become bytes."""
    characters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokenizer = hf.Tokenizer(hf.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    )
    decoders = hf.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str().encode()


def llama_model():
    """A SentencePiece model that changes nothing in the text, as Llama's and Gemma's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "two three four"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize(("name", "definition"), [("tokenizer.json", llama_json), ("tokenizer.model", llama_model)])
def test_families_with_byte_fallback_are_exact(name, definition, tmp_path):
    (tmp_path / name).write_bytes(definition())
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.adds_bos and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in (*TEXTS, " one", "  two  ", "\n", ""):
        prompt, ids = encode_prompt(tokenizer, text), tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*prompt, tokenizer.eos_id]) == text
        for cut in range(1, len(prompt)):  # wherever a model takes over
            before = tokenizer.decode(prompt[:cut])
            if before.endswith("\ufffd"):  # no prompt ends inside a character
                continue
            assert before + decode_continuation(tokenizer, prompt[:cut], prompt[cut:]) == text
            pieces = list(stream_continuation(tokenizer, prompt[:cut], prompt[cut:]))
            assert before + "".join(pieces) == text
            assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_streaming_reads_few_ids_however_long_the_text_is(bpe, monkeypatch):
    lengths = []
    decode = bpe.decode
    monkeypatch.setattr(bpe, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    text = TEXTS[2] * 20
    assert "".join(stream_continuation(bpe, bpe.encode("two\n"), bpe.encode(text))) == text
    assert len(bpe.encode(text)) > 500 and max(lengths) < 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<none>"}, "model/tokenizer.json: the tokenizer has no token '<none>'"),
        ({"eos_token": 3}, "tokenizer_config.json has eos_token = 3; allowed: a string, or null"),
        ({"eos_token": "X", "add_bos_token": "yes"}, "tokenizer_config.json has add_bos_token = 'yes'; allowed: true"),
        ({"bos_token": "X"}, "no token marks the end of a document"),
        ({"eos_token": "X", "chat_template": 3}, "tokenizer_config.json has chat_template = '3'; allowed: a string"),
    ],
)
def test_configs_that_do_not_fit(config, message, published):
    directory = published("model", "X", config=config)
    with pytest.raises(UserError, match=message):
        read_tokenizer(directory)


def id_of(tokenizer, token):
    return tokenizer._tokenizer.token_to_id(token)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:256", "bpe:256.*at least 257"),
        ("bpe:99999999999999", "bpe:99999999999999.*at most 10000000"),
        ("bpe:" + "9" * 5000, "at most 10000000"),
        ("bpe:many", "bpe:many"),
        ("word", "word.*bytes, bpe"),
        ("{dir}/none.json", "none.json.*is not a file"),
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
