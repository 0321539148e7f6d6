"""The verb `lm_eval`: the harness' tasks on a workdir, with the same results as the harness' own model `hf`."""

import importlib.util
import json
import subprocess
import sys
import warnings

import pytest

from darkformer_jax import lm_eval as verb
from tests.harness.tiny_harness import TASKS, write_llama, write_task, write_tasks
from tests.pretrained.tiny_sources import import_source
from tests.tiny_runs import tiny_config, write_workdir

pytest.importorskip("lm_eval")

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hugging Face directory `hf`, its workdir `run`, and `tasks`."""
    directory = tmp_path_factory.mktemp("lm_eval")
    import_source(write_llama(directory / "hf", bos=False), directory / "run")
    (directory / "tasks").mkdir()
    write_tasks(directory / "tasks")
    return directory


@pytest.fixture(scope="module", autouse=True)
def data_are_cached_here(tmp_path_factory):
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def run(place, *flags):
    flags = [f"--workdir={place}/run", f"--include_path={place}/tasks", *flags]
    return verb.evaluate_tasks(verb.parse_flags(["lm_eval", *flags]))


def theirs(place, tasks, **options):
    """The results of the harness' own command and its model `hf`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=str(place / "hf"), device="cpu", batch_size=3)
        manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
        return simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)["results"]


def same(ours, theirs):
    names = [name for name in theirs if "," in name and "stderr" not in name]
    return names and all(ours[name] == pytest.approx(theirs[name], rel=1e-3) for name in names)


def test_three_types_of_requests_have_the_results_of_the_harness_own_model(place, tmp_path, capsys):
    result = run(place, f"--tasks={','.join(TASKS)}", "--batch_size=3", f"--json={tmp_path}/out.json")
    wanted = theirs(place, list(TASKS))
    for task in TASKS:
        assert same(result["results"][task], wanted[task]), task
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["max_length"] == 64 and result["step"] == 0 and result["n-samples"]["next"]["effective"] == 4
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"{place}/run step 0: at most 64 tokens")
    assert lines[1].split() == ["task", "version", "filter", "n-shot", "metric", "value", "stderr"]
    assert [line.split()[0] for line in lines[2:]] == ["next", "text", "text", "write"]
    assert f"{result['results']['text']['bits_per_byte,none']:.4f}" in shown.out
    assert "WARNING" not in shown.err and "likelihoods: 100%" in shown.err


def test_examples_limits_and_chat_templates_are_those_of_the_harness(place, capsys):
    flags = ("--num_fewshot=2", "--limit=3", "--apply_chat_template")
    result = run(place, "--tasks=next", *flags)
    options = {"num_fewshot": 2, "limit": 3, "apply_chat_template": True, "fewshot_as_multiturn": True}
    assert same(result["results"]["next"], theirs(place, ["next"], **options)["next"])
    assert result["n-shot"]["next"] == 2 and result["n-samples"]["next"]["effective"] == 3


def test_a_group_stands_above_its_tasks_and_patterns_name_several(place, capsys, monkeypatch):
    from darkformer_jax.harness import run as harness_run

    own = harness_run.TaskManager
    monkeypatch.setattr(  # without the 14,000 tasks of the harness, which take seconds
        harness_run, "TaskManager", lambda include_path, **_: own(include_path=include_path, include_defaults=False)
    )
    run(place, "--tasks=chosen", "--limit=1")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines[2:]] == ["chosen", "  next"]
    result = run(place, "--tasks=*e*t,write", "--limit=1", "--gen_kwargs=max_gen_toks=3")
    assert set(result["results"]) == set(TASKS)
    assert result["configs"]["write"]["generation_kwargs"]["max_gen_toks"] == 3


def test_a_file_is_a_task(place, capsys):
    result = run(place, f"--tasks={place}/tasks/text.yaml", "--limit=1", "--max_length=100")
    assert set(result["results"]) == {"text"}
    assert "note: --max_length=100 is more than the 64 tokens of the run" in capsys.readouterr().err


def test_a_model_with_dark_attention_is_scored(tmp_path, place, capsys):
    write_workdir(tmp_path, tiny_config())
    flags = [f"--workdir={tmp_path}", f"--include_path={place}/tasks", f"--tasks={','.join(TASKS)}", "--limit=2"]
    result = verb.evaluate_tasks(verb.parse_flags(["lm_eval", *flags]))
    assert 4 < result["results"]["text"]["bits_per_byte,none"] < 12  # it has hardly learned anything


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks=nxt", "--tasks=nxt: there is no such task in the harness or in {place}/tasks; did you mean next?"),
        ("--tasks=next,,text", "--tasks=next,,text: an empty name"),
        ("--tasks=next --include_path={tmp}/none", "--include_path={tmp}/none: no such directory"),
        ("--tasks=next --batch_size=0", "--batch_size=0: must be from 1 to"),
        ("--tasks=next --gen_kwargs=top_k=3", "--gen_kwargs=top_k=3: none of the tasks generates text"),
        ("--tasks=write --gen_kwargs=num_beams=3", "generation_kwargs of write: num_beams = 3 is not supported"),
        ("--tasks=lost", "--tasks=lost: cannot be loaded: FileNotFoundError"),
        ("--tasks=next --workdir={tmp}/none", "{tmp}/none/config.json cannot be read"),
        ("--tasks=next --workdir={tmp}/spam", "predicts no next token; `predict` answers for it"),
        ("--tasks=next --json={tmp}/taken.json", "--json={tmp}/taken.json: the file exists"),
        ("--tasks=next --max_length=1", "next: the continuation"),
        ("--tasks=next --num_fewshot=4", "--num_fewshot=4: next has too few solved examples: Sample larger than"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, flags, message, capsys, monkeypatch):
    from darkformer_jax.harness import run as harness_run

    own = harness_run.TaskManager
    monkeypatch.setattr(
        harness_run, "TaskManager", lambda include_path, **_: own(include_path=include_path, include_defaults=False)
    )
    (tmp_path / "taken.json").touch()
    (tmp_path / "spam").mkdir()
    (tmp_path / "spam" / "config.json").write_text(json.dumps({"task": {"name": "classification"}}))
    files = {"data_files": {"test": str(tmp_path / "lost.jsonl")}}
    write_task(place / "tasks", task="lost", dataset_path="json", dataset_kwargs=files, test_split="test")
    argv = [f"--workdir={place}/run", f"--include_path={place}/tasks", *flags.format(tmp=tmp_path).split()]
    with pytest.raises(SystemExit) as ended:
        verb.main(verb.parse_flags(["lm_eval", *argv]))
    shown = capsys.readouterr()
    assert ended.value.code == 2 and message.format(tmp=tmp_path, place=place) in shown.err
    assert [line for line in shown.err.splitlines() if "error:" in line] == [shown.err.splitlines()[-1]]
    assert not shown.out and (tmp_path / "taken.json").read_bytes() == b""


def test_without_the_harness_a_line_says_how_to_install_it(place, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        verb.main(verb.parse_flags(["lm_eval", f"--workdir={place}/run", "--tasks=next"]))
    assert ended.value.code == 2 and "pip install 'lm_eval>=0.4.13'" in capsys.readouterr().err


def test_the_verb_and_the_harness_have_one_name_and_do_not_meet():
    """The verb's module is not the harness', and its flags and those of other verbs need none."""
    code = (
        "import sys, darkformer_jax, darkformer_jax.lm_eval as verb, darkformer_jax.evaluate\n"
        "assert 'lm_eval' not in sys.modules and 'datasets' not in sys.modules\n"
        "import lm_eval\n"
        "assert lm_eval is not verb and lm_eval.__version__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
