"""Test figures of a run: those that `evaluate --json` wrote into its workdir as test*.json, one per checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from darkformer_jax.data.files import read_json_object
from darkformer_jax.data.seen_files import seen_file
from darkformer_jax.errors import UserError

_TEST_FILES = "test*.json"
_SAME_TEXT = ("text_fingerprint", "examples")  # of what evaluate --json writes; earlier files lack the first


class Tested(NamedTuple):
    """A test figure of a checkpoint, and what it was measured on: the file's _SAME_TEXT, as far as it has them."""

    figure: float
    path: str
    text: Mapping[str, Any]


def tested_figures(configs: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, dict[int, float]]:
    """workdir -> step -> the figure `name` of the test file, of each checkpoint that was tested.

    configs: workdir -> its config.

    Raises UserError for what `_tested` refuses, or if two files measured different texts: their figures are no sample
    of one test split, and do not compare.
    """
    tested = {workdir: _tested(workdir, config, name) for workdir, config in configs.items()}
    _require_one_text([each for by_step in tested.values() for each in by_step.values()])
    return {workdir: {step: each.figure for step, each in by_step.items()} for workdir, by_step in tested.items()}


def _tested(workdir: str, config: Mapping[str, Any], name: str) -> dict[int, Tested]:
    """step -> the figure `name` of the test file, of each checkpoint that was tested.

    Raises UserError for a test*.json that `evaluate` did not write, two of one checkpoint, or one that measured files
    which the run trained on or was validated with; relative paths are relative to the current directory.
    """
    figures: dict[int, Tested] = {}
    for path in sorted(Path(workdir).glob(_TEST_FILES)):
        result = read_json_object(str(path))
        step, figure, text = result.get("step"), result.get(name), result.get("text")
        if type(step) is not int or not isinstance(figure, int | float) or not isinstance(text, str):
            raise UserError(f"{path} is not what evaluate --json writes for this run; give it another name than test*")
        _refuse_own_files(path, text, config)
        if step in figures:
            raise UserError(f"{workdir} has two {_TEST_FILES} of step {step}; allowed: one per checkpoint")
        figures[step] = Tested(figure, str(path), {field: result.get(field) for field in _SAME_TEXT})
    return figures


def _require_one_text(tested: Sequence[Tested]) -> None:
    for field in _SAME_TEXT:
        known = [each for each in tested if each.text[field] is not None]
        for other in known:
            if other.text[field] != known[0].text[field]:
                raise UserError(
                    f"{known[0].path} and {other.path} measured different texts, whose figures do not compare; "
                    f"allowed: one test split for all runs, or another name than {_TEST_FILES}"
                )


def _refuse_own_files(path: Path, text: str, config: Mapping[str, Any]) -> None:
    if seen := seen_file(text, config["data"]["files"], config["task"]["heldout_files"]):
        file, field = seen
        raise UserError(
            f"{path} measured {file}, which is of the run's {field} and so no test split; "
            "give it another name than test*"
        )
