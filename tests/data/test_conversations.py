"""Conversations in files, the split, and the batches that they give."""

import json

import numpy as np
import pytest

from darkformer_jax.data import find_data, load_data
from darkformer_jax.data.batches import heldout_batches, make_batch, train_batches
from darkformer_jax.data.chat import Chat, ChatTokens
from darkformer_jax.data.conversations import ChatStream, Conversation, read_conversations, split, tokenise
from darkformer_jax.data.stream import memory_stream
from darkformer_jax.errors import UserError
from tests.data.chats import BRACKETS, END, START, chat_tokenizer, many_talks, talk, write_talks
from tests.data.test_batches import assert_same, concatenated, take


def tokens_of(conversations, tokenizer=None):
    chat = Chat(tokenizer or chat_tokenizer(), "here")
    return list(tokenise([Conversation("here", messages) for messages in conversations], chat))


def stream_of(conversations):
    return ChatStream(tokens_of(conversations), 302)


def rows(stream, length):
    return make_batch(stream, length, np.arange(-(-stream.num_tokens // length)))


def test_a_batch_by_hand():
    one, two = (ChatTokens(np.array(ids), np.array(mask) > 0, 1) for ids, mask in (
        ([START, 7, END, 8, END, 9], [0, 0, 0, 1, 1, 0]), ([START, 5, END], [0, 1, 1])
    ))  # fmt: skip
    batch = make_batch(ChatStream([one, two], 302), 4, np.arange(3))
    assert batch["inputs"].tolist() == [[START, 7, END, 8], [END, 9, START, 5], [0] * 4]
    assert batch["targets"].tolist() == [[7, END, 8, END], [9, START, 5, END], [0] * 4]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [0] * 4]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0] * 4]
    assert batch["weights"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0] * 4]


def test_with_loss_on_everything_batches_are_those_of_the_rendered_text():
    tokenizer = chat_tokenizer(
        "{{ bos_token }}{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ eos_token }}", True
    )
    conversations, texts = many_talks(20), []
    for messages in conversations:
        texts.append("".join(message["content"] + " " for message in messages))
    chat = Chat(tokenizer, "here")
    learned = [ChatTokens(np.array(chat.prompt(m)), np.ones(len(chat.prompt(m)), np.bool_), 1) for m in conversations]
    as_chat, as_text = ChatStream(learned, tokenizer.vocab_size), memory_stream(texts, tokenizer)
    assert as_chat.num_tokens == as_text.num_tokens and as_chat.num_targets == as_text.num_targets
    for length in (7, 64):
        assert_same([rows(as_chat, length)], [rows(as_text, length)])


def test_where_loss_is_changes_nothing_but_weights():
    tokens, chance = tokens_of(many_talks(20)), np.random.default_rng(0)
    moved = [t._replace(is_learned=chance.random(len(t.ids)) < 0.5) for t in tokens]
    before, after = (rows(ChatStream(each, 302), 16) for each in (tokens, moved))
    assert not np.array_equal(before.pop("weights"), after.pop("weights"))
    assert_same([before], [after])


@pytest.mark.parametrize("length", [5, 16, 64, 1000])
def test_loss_goes_on_with_the_answer_in_the_next_row(length):
    tokens = tokens_of(many_talks(20))
    batch = rows(ChatStream(tokens, 302), length)
    learned = np.concatenate([t.ids[t.is_learned] for t in tokens])
    assert batch["targets"][batch["weights"] > 0].tolist() == learned.tolist()
    assert batch["weights"].sum() == ChatStream(tokens, 302).num_targets == len(learned)


def test_batches_are_a_function_of_seed_and_step_for_any_number_of_processes():
    stream, arguments = stream_of(many_talks(40)), {"seed": 3, "batch_size": 4, "sequence_length": 16}
    unbroken = take(train_batches(stream, **arguments), 30)
    for step in (1, 17):
        assert_same(take(train_batches(stream, start_step=step, **arguments), 30 - step), unbroken[step:])
    parts = [take(train_batches(stream, process_index=p, process_count=2, **arguments), 30) for p in range(2)]
    assert_same(concatenated(parts), unbroken)
    held_out = list(heldout_batches(stream, batch_size=4, sequence_length=16))
    assert sum(batch["weights"].sum() for batch in held_out) == stream.num_targets


def test_conversations_that_cross_rows_are_counted():
    tokens = [ChatTokens(np.arange(size), np.arange(size) > 1, 1) for size in (4, 5, 6, 9)]
    # Rows of 4 begin at tokens 0, 4, 8, ...; the last token of a conversation is only a target.
    assert ChatStream(tokens, 302).num_cut(4) == 2
    assert ChatStream(tokens, 302).num_cut(1000) == 0


def test_the_fingerprint_knows_what_is_learned():
    tokens = tokens_of(many_talks(2))
    moved = [t._replace(is_learned=~t.is_learned) for t in tokens]
    assert ChatStream(tokens, 302).fingerprint != ChatStream(moved, 302).fingerprint


def test_copies_stay_on_one_side_and_no_side_is_empty():
    conversations = [Conversation(f"{n}", talk(f"why {n % 50}?", "Because.")) for n in range(1000)]
    train, heldout = split(conversations, 0.2)
    assert len(train) + len(heldout) == 1000 and 100 < len(heldout) < 300
    assert not {str(c.messages) for c in train} & {str(c.messages) for c in heldout}
    for few in (conversations[:2], conversations[:5]):
        for fraction in (1e-9, 1 - 1e-9):
            assert all(split(few, fraction))
    with pytest.raises(UserError, match="two different ones or more"):
        split([conversations[0], conversations[50]], 0.2)
    with pytest.raises(UserError, match="heldout_fraction=1 is out of range"):
        split(conversations, 1)


def test_prompt_and_completion_are_a_conversation_and_other_fields_are_not_read(tmp_path):
    path = tmp_path / "talks.jsonl"
    lines = [
        {"prompt": "Why?", "completion": "Because.", "score": 3},
        {"messages": talk("Why?", "Because."), "prompt": "Why?", "id": 7},
        {"messages": [{**message, "name": None} for message in talk("Why?", "Because.", system="Be brief")]},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found = list(read_conversations(str(tmp_path)))
    assert [conversation.place for conversation in found] == [f"{path}:{line}" for line in (1, 3, 5)]
    plain = talk("Why?", "Because.")
    assert [c.messages for c in found] == [plain, plain, talk("Why?", "Because.", system="Be brief")]


def test_parquet_has_the_same_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    conversations = many_talks(30)
    parquet.write_table(
        pyarrow.table({"messages": conversations, "score": list(range(30))}), tmp_path / "a.parquet", row_group_size=7
    )
    found = list(read_conversations(str(tmp_path / "a.parquet")))
    assert [c.messages for c in found] == conversations and found[8].place == f"{tmp_path}/a.parquet:9"
    parquet.write_table(pyarrow.table({"prompt": ["Why?"], "completion": ["Because."]}), tmp_path / "b.parquet")
    assert [c.messages for c in read_conversations(str(tmp_path / "b.parquet"))] == [talk("Why?", "Because.")]
    parquet.write_table(pyarrow.table({"text": ["Why?"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match='c.parquet: no column "prompt"; allowed: "messages", or "prompt" and'):
        list(read_conversations(str(tmp_path / "c.parquet")))


USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "the line is a list, not an object"),
        ({"text": "a"}, 'no conversation; allowed: "messages", or "prompt" and "completion"; it has: text'),
        ({"messages": None}, 'no conversation; allowed: "messages", or'),
        ({"messages": "a"}, '"messages" is a string; allowed: a list of at least one message'),
        ({"messages": []}, '"messages" is a list; allowed: a list of at least one message'),
        ({"messages": ["a"]}, "message 1 is a string; allowed: an object with role and content"),
        ({"messages": [USER]}, 'no message has the role "assistant": there is no answer to learn'),
        (
            {"messages": [USER, {"role": "robot", "content": "a"}]},
            'message 2 has the role "robot"; allowed: system, user,',
        ),
        (
            {"messages": [USER, {"from": "gpt", "value": "a"}]},
            "message 2 has no role; allowed: system, user, assistant",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: its content is null; allowed: a string"),
        ({"messages": [USER, {"role": "assistant", "content": ["a"]}]}, "message 2: its content is a list; allowed"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2 is an answer without text"),
        ({"messages": [{"role": "assistant", "content": "a"}, USER]}, "an answer comes before any question"),
        (
            {"messages": [USER, {**USER, "tool_calls": [1]}]},
            "message 2 has tool_calls; allowed: role and content alone",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1 holds a lone surrogate at character 0"),
        ({"prompt": "a"}, 'no conversation; allowed: "messages", or "prompt" and "completion"; it has: prompt'),
        ({"prompt": [USER], "completion": "a"}, '"prompt" is a list; allowed: a string (or "messages", a list)'),
        ({"messages": [USER, {"role": "assistant", "content": "a\ufdd0"}]}, "a message has the character U+FDD0"),
        (
            {"messages": [{"role": "system", "content": "a"}, *talk("a", "b")]},
            "refuses the conversation: only users and",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, record, message):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": talk("Why?", "Because.")}) + "\n" + json.dumps(record) + "\n")
    chat = Chat(chat_tokenizer(BRACKETS, True), "here")
    with pytest.raises(UserError) as error:
        list(tokenise(list(read_conversations(str(path))), chat))
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    chat_tokenizer().save(str(tmp_path))
    talks = write_talks(tmp_path / "talks.jsonl", many_talks(40))
    data = load_data("chat", talks, str(tmp_path), 0.1)
    assert data.train.num_documents + data.heldout.num_documents == 40
    assert data.heldout.num_documents == len(data.heldout_conversations) and data.heldout_text() is None
    assert find_data("chat", talks) == "0.0 MiB of conversations"
    for files, tokenizer, message in (
        ("", tmp_path, "data files are not given"),
        (f"{tmp_path}/none", tmp_path, "no file matches"),
        (f"{talks}:0.5", tmp_path, "no file matches"),
        (str(tmp_path / "tokenizer.json"), tmp_path, "is not a file the chat source reads; allowed: .jsonl"),
        (talks, "bytes", "data.tokenizer = 'bytes': the tokenizer has no chat template"),
        (talks, "bpe:300", "data.tokenizer = 'bpe:300': the tokenizer has no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            load_data("chat", files, str(tokenizer), 0)
