"""The whole road of a conversation: fine-tuned from another run, resumed, answered."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import finetune
from darkformer_jax import generate
from darkformer_jax.data.batches import make_batch
from darkformer_jax.data.chat import Chat
from darkformer_jax.data.conversations import ChatStream, Conversation, tokenise
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.language_model import LanguageModel
from darkformer_jax.tasks.next_token import predict, token_sums
from tests.data.chats import CHATML, END, chat_tokenizer, many_talks, talk, write_talks
from tests.tiny_runs import (
    experiment_of,
    fresh_state,
    run,
    saved_arrays,
    tiny_config,
    write_workdir,
)

pytestmark = pytest.mark.standard_promotion

TINY = {"model__vocab_size": 304, "sequence_length": 64, "data__tokenizer": ""}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An untrained model whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("source")
    write_workdir(directory, tiny_config(**TINY))
    (directory / "tokenizer.bytes").unlink()
    chat_tokenizer().save(str(directory))
    return directory


def chat_config(source, talks, **changes):
    own = {"init_from": str(source), "data__source": "chat", "data__files": talks, "sample__prompts": ()}
    return tiny_config(**(TINY | own | changes))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A model that has learned to say Yes, no. to everything."""
    directory = tmp_path_factory.mktemp("trained")
    talks = write_talks(
        directory / "talks.jsonl", [talk(f"why {n}?", "Yes, no.", "And?", "Yes, no.") for n in range(40)]
    )
    config = chat_config(
        source, talks, num_steps=60, optimizer__learning_rate=1e-2, log__every=20, sample__prompts=("", "And why?")
    )
    run(config, directory / "run")
    return directory / "run"


def test_the_arguments_of_the_finetuning_config_name_the_data():
    config = finetune.get_config("dark,data=chat,files=talks.jsonl")
    assert (config.data.source, config.data.files) == ("chat", "talks.jsonl")


def test_a_run_learns_to_answer_and_to_stop(trained, capsys):
    samples = (trained / "samples.txt").read_text().splitlines()
    assert samples[0] == "answers to held-out conversations:"
    assert [line for line in samples[1:] if not line.startswith("--- ")] == ["Yes, no."] * 2
    assert samples[-2] == "--- 'And why?'"
    generate.main(generate.parse_flags(["", f"--workdir={trained}", "--chat", "--prompt=why 77?", "--temperature=0"]))
    assert capsys.readouterr().out == "Yes, no.\n"


def test_several_prompts_are_one_conversation_and_lines_of_a_file_are_several(trained, tmp_path, capsys, monkeypatch):
    flags = [f"--workdir={trained}", "--chat", "--temperature=0"]
    asked = []
    prompt = Chat.prompt
    monkeypatch.setattr(Chat, "prompt", lambda self, messages: asked.append(list(messages)) or prompt(self, messages))
    generate.main(generate.parse_flags(["", *flags, "--prompt=why 1?", "--prompt=And?"]))
    assert capsys.readouterr().out == "--- 'why 1?'\nYes, no.\n--- 'And?'\nYes, no.\n"
    assert asked == [talk("why 1?"), talk("why 1?", "Yes, no.", "And?")]
    asked.clear()
    (tmp_path / "prompts.txt").write_text("why 1?\nwhy 2?\n")
    generate.main(generate.parse_flags(["", *flags, f"--prompts_file={tmp_path}/prompts.txt"]))
    assert capsys.readouterr().out == "--- 'why 1?'\nYes, no.\n--- 'why 2?'\nYes, no.\n"
    assert asked == [talk("why 1?"), talk("why 2?")]


def test_a_prompt_has_special_tokens_on_request_alone(trained, capsys, monkeypatch):
    written = "<|im_start|>user\nwhy 1?<|im_end|>\n<|im_start|>assistant\n"
    flags = ["", f"--workdir={trained}", "--temperature=0", f"--prompt={written}"]
    generate.main(generate.parse_flags([*flags, "--special_tokens"]))
    assert capsys.readouterr().out == written + "Yes, no.\n"
    monkeypatch.setattr(generate.Writer, "stream", lambda self, ids, count: [str(END in ids)])
    generate.main(generate.parse_flags(flags))
    assert capsys.readouterr().out == written + "False\n"


def test_a_resumed_run_is_an_unbroken_one(source, tmp_path):
    talks = write_talks(tmp_path / "talks.jsonl", many_talks(30))
    config = chat_config(source, talks, num_steps=6, optimizer__schedule="constant")
    run(config, tmp_path / "whole")
    config.num_steps = 3
    run(config, tmp_path / "parts")
    config.num_steps = 6
    run(config, tmp_path / "parts")
    one, other = (saved_arrays(tmp_path / name, 6) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_tokens_of_metrics_are_those_that_are_learned(source, tmp_path):
    talks = write_talks(tmp_path / "talks.jsonl", many_talks(30))
    config = chat_config(source, talks, num_steps=4)
    run(config, tmp_path / "run")
    task = LanguageModel.load(config, Workdir(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    batches = task.train_batches(0, Part(0, 1))
    steps = [line["tokens"] for line in lines if "tokens" in line]
    assert steps == [float(next(batches)["weights"].sum()) for _ in range(4)]
    batches.close()
    assert [line["heldout_tokens"] for line in lines if "heldout_tokens" in line][-1] == task.data.heldout.num_targets
    train = task.data.train
    assert f"{train.num_targets:,} of answers count in the loss" in str(task)


@pytest.mark.parametrize("kind", ["dark", "softmax"])
def test_packed_conversations_have_the_loss_of_separate_ones(kind):
    experiment = experiment_of(
        tiny_config(model__attention__kind=kind, sequence_length=128, model__vocab_size=302), 302
    )
    state = fresh_state(experiment)
    model = experiment.network.bind(state.params, state.projections)
    chat = Chat(chat_tokenizer(), "here")
    tokens = list(tokenise([Conversation("", messages) for messages in many_talks(2)], chat))
    packed = ChatStream(tokens, 302)
    assert packed.num_tokens <= 128

    def nll(stream):
        batch = jax.device_put(make_batch(stream, 128, np.arange(1)))
        sums = token_sums(predict(model, batch), batch)
        return float(sums["nll"]), float(sums["weight"])

    separate = [nll(ChatStream([each], 302)) for each in tokens]
    assert nll(packed)[1] == sum(weight for _, weight in separate) == packed.num_targets
    np.testing.assert_allclose(nll(packed)[0], sum(loss for loss, _ in separate), rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat", "--prompt=a", "--special_tokens"], "--special_tokens with --chat: a message is text"),
        (["--prompt=a", "--prompt=b"], "--prompt is there several times, which --chat allows"),
        (["--chat", "--prompt=a\ufdd0"], "a message has the character U+FDD0, which no text may have"),
        (["--chat", "--prompt=a", "--prompt=\udcff"], "--prompt='\\udcff': not UTF-8 text"),
    ],
)
def test_a_mistake_of_generate_is_one_line(source, flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        generate.main(generate.parse_flags(["", f"--workdir={source}", *flags]))
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_model_without_a_template_answers_nothing_and_learns_no_conversations(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "source")
    chat_tokenizer(None).save(str(tmp_path / "source"))
    with pytest.raises(SystemExit):
        generate.main(generate.parse_flags(["", f"--workdir={tmp_path}/source", "--chat", "--prompt=a"]))
    said = f"error: {tmp_path}/source: the tokenizer has no chat template; a model tuned for conversations has one"
    assert capsys.readouterr().err.startswith(said)
    talks = write_talks(tmp_path / "talks.jsonl", many_talks(30))
    with pytest.raises(UserError, match="source'?: the tokenizer has no chat template"):
        run(chat_config(tmp_path / "source", talks), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()
    (tmp_path / "source/chat_template.jinja").write_text(CHATML)
    run(chat_config(tmp_path / "source", talks, num_steps=1, optimizer__warmup_steps=0), tmp_path / "run")
    assert json.loads((tmp_path / "run/tokenizer_config.json").read_text())["chat_template"] == CHATML
