import json
import shutil

import numpy as np
import pytest

from darkformer_jax import generate
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import run_commands, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_workdir(directory, tiny_config())
    return directory


def run(workdir, *flags):
    generate.main(generate.parse_flags(["generate", f"--workdir={workdir}", *flags]))


def test_one_prompt_is_continued_as_the_sampler_continues_it(workdir, capsys):
    run(workdir, "--prompt=def ", "--max_new_tokens=12", "--temperature=0.7", "--top_k=9", "--seed=5")
    shown = capsys.readouterr().out
    model = load_model(Workdir(workdir))
    assert model.step == 3
    sampler = Sampler(model.network, model.params, model.projections, temperature=0.7, top_k=9, seed=5)
    ids = [int(token[0]) for token in sampler.stream([[256, *b"def "]], 12)]
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert shown == "def " + BytesTokenizer().decode(ids) + "\n"
    run(workdir, "--prompt=def ", "--max_new_tokens=12", "--temperature=0.7", "--top_k=9", "--seed=5")
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # -sig: with a byte order mark at the beginning
def test_a_file_of_prompts_is_one_batch(workdir, tmp_path, capsys, encoding):
    path = tmp_path / "prompts.txt"
    path.write_text("def \nimport\nThé\n", encoding=encoding)
    run(workdir, f"--prompts_file={path}", "--max_new_tokens=6", "--temperature=0")
    shown = capsys.readouterr().out
    wanted = ""
    for prompt in ("def ", "import", "Thé"):
        run(workdir, f"--prompt={prompt}", "--max_new_tokens=6", "--temperature=0")
        wanted += f"--- {prompt!r}\n{capsys.readouterr().out}"
    assert shown == wanted


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "note"),
    [
        (["def "], 28, None),  # BOS and 4 bytes; the last token sees 32, the row that the model was trained on
        (["def "], 29, "--max_new_tokens=29 after a prompt of 5 tokens"),
        (["a", "def import", "b"], 23, "--max_new_tokens=23 after a prompt of 11 tokens"),
    ],
)
def test_text_longer_than_the_model_was_trained_on_is_noted_once(workdir, tmp_path, prompts, new_tokens, note, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts))
    run(workdir, f"--prompts_file={path}", f"--max_new_tokens={new_tokens}")
    expected = f"note: {note} is more than the 32 tokens this model was made for\n" if note else ""
    assert capsys.readouterr().err == expected


def test_an_empty_prompt_is_a_document_from_its_beginning(workdir, capsys):
    run(workdir, "--prompt=", "--max_new_tokens=3", "--temperature=0")
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts_file={dir}/none.txt"], "--prompts_file={dir}/none.txt: No such file or directory"),
        (["--prompts_file={dir}/empty.txt"], "--prompts_file={dir}/empty.txt: the file is empty"),
        (["--prompts_file={dir}/binary.txt"], "--prompts_file={dir}/binary.txt: not UTF-8 text"),
        (["--prompts_file={dir}"], "--prompts_file={dir}: Is a directory"),
        (["--prompt=a", "--max_new_tokens=0"], "--max_new_tokens=0: must be from 1 to"),
        (["--prompt=a", "--max_new_tokens=x"], "argument --max_new_tokens: 'x' is not a whole number"),
        (["--prompt=a", "--temperature=-1"], "temperature = -1.0"),
        (["--prompt=a", "--temperature=nan"], "temperature = nan"),
        (["--prompt=a", "--top_p=2"], "temperature = 0.8, top_k = 0, top_p = 2.0"),
        (["--prompt=a", "--seed=-1"], "--seed=-1: must be from 0 to"),
        (["--prompt=a", "--seed=99999999999999999999"], "--seed=99999999999999999999: must be from 0 to"),
        (["--prompt=\udcff"], "--prompt='\\udcff': not UTF-8 text"),
        (["--prompt=a", "--step=4"], "no checkpoint step 4 in"),
        (["--prompt=a", "--prompts_file=b"], "argument --prompts_file: not allowed with argument --prompt"),
        ([], "one of the arguments --prompt --prompts_file is required"),
        (["--prompt=a", "--sauce=1"], "unrecognized arguments: --sauce=1"),
        (["--prompt=a", "--workdir={dir}/none"], "{dir}/none/config.json cannot be read: No such file"),
        (["--prompt=a", "--workdir={dir}"], "{dir}/config.json cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(workdir, tmp_path, flags, message, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as exit_:
        run(workdir, *(flag.format(dir=tmp_path) for flag in flags))
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message.format(dir=tmp_path)}")
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_workdir_without_a_checkpoint_or_with_another_ones_config(workdir, tmp_path):
    for name in ("config.json", "tokenizer.bytes"):
        shutil.copy(workdir / name, tmp_path)
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}/checkpoints"):
        load_model(Workdir(tmp_path))
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    assert load_model(Workdir(tmp_path)).step == 3
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["mlp_dim"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="belongs to another model: params/blocks_0/mlp/down/kernel"):
        load_model(Workdir(tmp_path))
    (tmp_path / "config.json").write_text('{"another": "program"}')
    with pytest.raises(UserError, match=r"config.json is not the config of a run of this version"):
        load_model(Workdir(tmp_path))
    (tmp_path / "tokenizer.bytes").unlink()
    with pytest.raises(UserError, match="must hold exactly one of"):
        load_model(Workdir(tmp_path))


def shown_pieces(monkeypatch, capsys, workdir, tokens):
    """What is printed when the sampler writes `tokens`, a piece a token."""
    pieces = []

    def stream(self, prompts, max_new_tokens):
        for token in tokens:
            yield np.array([token])
            pieces.append(capsys.readouterr().out)

    monkeypatch.setattr(Sampler, "stream", stream)
    run(workdir, "--prompt=>")
    pieces.append(capsys.readouterr().out)
    return pieces


def test_half_a_character_waits_for_its_other_half(workdir, monkeypatch, capsys):
    tokens = [*"é€x".encode(), 256]
    assert shown_pieces(monkeypatch, capsys, workdir, tokens) == [">", "é", "", "", "€", "x", "\n"]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (list("a€".encode())[:-1], "a\ufffd"),  # it ends inside a character
        ([0xFF, *b"ab"], "\ufffdab"),
        ([0xE2, 0x82, *b"a"], "\ufffda"),
        ([*b"ab", 256, *b"c"], "ab"),  # nothing after the document's end
    ],
)
def test_bytes_that_are_no_character_do_not_stop_the_text(workdir, monkeypatch, capsys, tokens, text):
    assert "".join(shown_pieces(monkeypatch, capsys, workdir, tokens)) == f">{text}\n"


def test_the_command_itself(workdir):
    flags = [f"--workdir={workdir}", "--max_new_tokens=3", "--prompt=ab"]
    (shown,) = run_commands([("darkformer_jax.generate", flags)])
    assert shown.status == 0 and shown.out.startswith("ab") and shown.out.endswith("\n") and shown.err == ""
