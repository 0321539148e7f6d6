import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from darkformer_jax.data import load_data, memory_stream, train_batches
from darkformer_jax.data.prepared import load_prepared, prepare
from darkformer_jax.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    """A JSON-lines file of documents from one byte to several records."""
    random = np.random.default_rng(0)
    sizes = [1, 10, 100, 2047, 2048, 5000, *random.integers(1, 400, 200)]
    texts = ["".join(random.choice(list("abcdefgh \n\u00e9"), size)) for size in sizes]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def arguments(corpus):
    return {
        "source": "text",
        "files": corpus,
        "tokenizer_spec": "bytes",
        "heldout_fraction": 0.1,
        "shard_tokens": 3 * 2048,
    }


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_prepared_data_equals_data_in_memory(spec, corpus, arguments, tmp_path):
    out = str(tmp_path / "out")
    manifest = prepare(out, **{**arguments, "tokenizer_spec": spec})
    in_memory = load_data("text", corpus, spec, 0.1)
    from_disk = load_data("array_record", out, spec, 0.1)
    assert from_disk.tokenizer.fingerprint == in_memory.tokenizer.fingerprint
    assert from_disk.heldout_text() is None
    assert load_data("array_record", out, "", 0).fingerprint == from_disk.fingerprint
    with pytest.raises(UserError, match=r"heldout_fraction = 0.2, but .* was prepared with 0.1; allowed"):
        load_data("array_record", out, spec, 0.2)
    assert len(in_memory.heldout_text()) == in_memory.heldout.num_bytes
    for name in ("train", "heldout"):
        stream, expected = getattr(from_disk, name), getattr(in_memory, name)
        for count in ("num_tokens", "num_documents", "num_bytes"):
            assert getattr(stream, count) == getattr(expected, count) == manifest["splits"][name][count]
        assert stream.starts_are_targets == expected.starts_are_targets
        starts = np.random.default_rng(1).integers(0, stream.num_tokens + 100, 50)
        for length in (1, 17, 2048, 7000):
            for found, wanted in zip(stream.read(starts, length), expected.read(starts, length), strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert len(manifest["splits"]["train"]["shards"]) > 2


def test_a_prepared_stream_can_be_sent_to_workers(arguments, tmp_path):
    prepare(str(tmp_path / "out"), **arguments)
    train, _, _ = load_prepared(str(tmp_path / "out"))
    train.read(np.array([0]), 10)
    copy = pickle.loads(pickle.dumps(train))
    one, other = (next(train_batches(stream, seed=0, batch_size=4, sequence_length=64)) for stream in (train, copy))
    np.testing.assert_array_equal(one["inputs"], other["inputs"])


def test_preparing_twice_gives_the_same_tokens_and_never_overwrites(arguments, tmp_path):
    outs = [str(tmp_path / name) for name in "ab"]
    for out in outs:
        prepare(out, **{**arguments, "tokenizer_spec": "bpe:280"})
    first, second = (load_prepared(out)[0] for out in outs)
    for one, other in zip(first.read(np.array([0]), 9999), second.read(np.array([0]), 9999), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="is there already; give a new or an empty directory"):
        prepare(outs[0], **arguments)
    with pytest.raises(UserError, match="is there already; give a new or an empty directory"):
        prepare(arguments["files"], **arguments)
    load_prepared(outs[0])


def test_damage_is_found_and_named(arguments, tmp_path):
    out = tmp_path / "out"
    prepare(str(out), **arguments)
    shard = out / "train-00001.array_record"
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (bytes(flipped), good[:-1], b""):
        shard.write_bytes(bad)
        with pytest.raises(UserError, match="train-00001.array_record is damaged"):
            load_prepared(str(out))
    shard.unlink()
    with pytest.raises(UserError, match="cannot read shard .*train-00001"):
        load_data("array_record", str(out), "bytes", 0.1)
    shard.write_bytes(good)
    load_prepared(str(out))


def test_the_tokenizer_must_be_the_one_of_the_data(arguments, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(str(out), **{**arguments, "tokenizer_spec": "bpe:280"})
    fingerprint = manifest["tokenizer"]["fingerprint"][:12]
    load_data("array_record", str(out), "", 0.1)
    load_data("array_record", str(out), str(out / "tokenizer.json"), 0.1, tokenizer_dir=str(out))
    for spec in ("bytes", "bpe:281"):
        with pytest.raises(
            UserError, match=f"{spec}.*does not match.*; add --config.data.tokenizer= for the one that pr"
        ):
            load_data("array_record", str(out), spec, 0.1)
    other = tmp_path / "workdir"
    load_data("stdlib", "", "bytes", 0.5).tokenizer.save(str(other))
    with pytest.raises(UserError, match=f"workdir.*fingerprint.*out.*{fingerprint}"):
        load_data("array_record", str(out), "", 0.1, tokenizer_dir=str(other))
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match=f"fingerprint.*is not the one its shards.*{fingerprint}"):
        load_prepared(str(out))


def test_another_tokenizer_is_refused_before_the_shards_are_read(arguments, tmp_path):
    prepare(str(tmp_path / "out"), **arguments)
    for shard in (tmp_path / "out").glob("*.array_record"):
        shard.unlink()
    with pytest.raises(UserError, match="tokenizer 'bpe:281' does not match the one in .*out: bytes with 257 ids; add"):
        load_data("array_record", str(tmp_path / "out"), "bpe:281", 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"splits": {}}, "manifest.json is damaged"),
        ({"record_tokens": 7}, "manifest.json is damaged"),
    ],
)
def test_a_bad_manifest(change, message, arguments, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(str(out), **arguments)
    (out / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=message):
        load_prepared(str(out))
    (out / "manifest.json").write_text(json.dumps(manifest)[:-20])
    with pytest.raises(UserError, match="manifest.json is not JSON"):
        load_prepared(str(out))


def test_a_directory_that_is_no_prepared_data(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_data("array_record", str(tmp_path / "none"), "", 0.1)
    with pytest.raises(UserError, match="holds no manifest.json"):
        load_data("array_record", str(tmp_path), "", 0.1)


def test_a_failed_preparation_leaves_nothing(arguments, tmp_path):
    with open(arguments["files"], "a") as file:
        file.write('{"no text": 1}\n')
    with pytest.raises(UserError, match='corpus.jsonl:207: no "text"'):
        prepare(str(tmp_path / "out"), **arguments)
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


def test_a_killed_preparation_does_not_load(arguments, tmp_path):
    """Killed at the worst moment: all but the manifest is on disk."""
    out = str(tmp_path / "out")
    program = f"""
import os, signal
from darkformer_jax.data import files, prepared
replace = os.replace
def kill_before_manifest(source, target):
    if str(target).endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_before_manifest
prepared.prepare({out!r}, **{arguments!r})
"""
    finished = subprocess.run([sys.executable, "-c", program], check=False)
    assert finished.returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob(".out.*")
    assert (partial / "train-00000.array_record").exists()
    with pytest.raises(UserError, match="did not finish"):
        load_prepared(str(partial))
    with pytest.raises(UserError, match="does not exist"):
        load_prepared(out)
    prepare(out, **arguments)
    load_prepared(out)


def test_a_tokenizer_saved_in_the_workdir_is_used(corpus, tmp_path):
    workdir = str(tmp_path / "workdir")
    first = load_data("text", corpus, "bpe:280", 0.1, tokenizer_dir=workdir)
    first.tokenizer.save(workdir)
    again = load_data("text", corpus, "bpe:280", 0.1, tokenizer_dir=workdir)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(UserError, match="'bytes' does not match the one in .*workdir"):
        load_data("text", corpus, "bytes", 0.1, tokenizer_dir=workdir)


def test_train_and_heldout_are_disjoint_and_complete(corpus):
    data = load_data("text", corpus, "bytes", 0.1)
    with open(corpus) as file:
        texts = [json.loads(line)["text"] for line in file]
    heldout = set(data.heldout_documents)
    assert heldout
    assert data.train.num_documents + data.heldout.num_documents == len(texts)
    train = memory_stream([text for text in texts if text not in heldout], data.tokenizer)
    assert (train.num_tokens, train.num_bytes) == (data.train.num_tokens, data.train.num_bytes)
    everything = (np.array([0]), train.num_tokens)
    np.testing.assert_array_equal(data.train.read(*everything)[0], train.read(*everything)[0])


def test_unknown_source():
    with pytest.raises(UserError, match="'web' is unknown; allowed: stdlib, text, news, chat, array_record"):
        load_data("web", "", "bytes", 0.1)
