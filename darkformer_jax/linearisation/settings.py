"""What was asked for. The directory of a linearisation keeps it, so that the same command goes on and no other."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkformer_jax.config.linearisation import TRAINED_STAGES
from darkformer_jax.data.files import read_json_object, write_json
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import LOCK_FILE

TRANSFER, LONG = "transfer", "long"
STAGES = (TRANSFER, *TRAINED_STAGES)  # in their order
SETTINGS_FILE = "settings.json"
_OF_OLDER: Mapping[str, Any] = {  # what a directory was begun with before there were flags for it
    "geometry": "identity",
    "geometry_init": 0.5,
    "far_gain": False,
    "far_horizon": 0,
    "exact_heads": "none",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options; `python -m darkformer_jax.linearise --help` explains each.

    Attributes:
      stages: those to run, in the order of `STAGES`; the first is `transfer`.
      steps: of every stage of `STAGES`; those of `transfer` are per layer.
    """

    workdir: str
    text: str
    test_text: str
    text_field: str
    stages: tuple[str, ...]
    steps: Mapping[str, int]
    context: int
    long_context: int
    batch_size: int
    passages: int
    num_features: int
    window: int
    geometry: str
    geometry_init: float
    far_gain: bool
    far_horizon: int
    exact_layers: str
    exact_heads: str
    cache_budget: str
    lora: int
    dtype: str
    test_tokens: int
    seed: int

    def context_of(self, stage: str) -> int:
        """Tokens per row of a stage."""
        return self.long_context if stage == LONG else self.context

    def rows_of(self, stage: str) -> int:
        """Rows per step of a trained stage: as many tokens as in the others, and at least one row."""
        return max(1, self.batch_size * self.context // self.context_of(stage))

    @property
    def longest(self) -> int:
        """The longest context of the stages, in which figures are measured."""
        return max(map(self.context_of, self.stages))


def stage_directory(out: Path, stage: str) -> Path:
    """The run directory of a stage: 1-transfer, 2-hidden, 3-logits or 4-long."""
    return out / f"{1 + STAGES.index(stage)}-{stage}"


def has_stages(out: Path) -> bool:
    """Whether a stage is done, or one of those that save their steps has begun."""
    return any(stage_directory(out, stage).exists() for stage in STAGES)


def check_settings(out: Path, settings: Settings, fingerprint: str | None = None) -> None:
    """Refuses a directory that is not this linearisation's. Before the first stage is done, any flags may begin anew.

    fingerprint: that of the text's tokens; None = the text is not read yet, and may be another.

    Raises:
      UserError: the directory has other settings (each is named as `--flag: old -> new`), text that has changed since,
        or files of something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out={out}: is a file, not a directory")
    if not (out / SETTINGS_FILE).is_file():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in (SETTINGS_FILE + ".tmp", LOCK_FILE))
        if foreign:
            raise UserError(f"--out={out}: has {foreign[0]}, but no {SETTINGS_FILE}; give a new or an empty directory")
        return
    if not has_stages(out):
        return
    saved = {**_OF_OLDER, **read_json_object(str(out / SETTINGS_FILE))}
    changes = _changes(saved, _as_json(settings, fingerprint))
    if changes:
        raise UserError(f"--out={out}: was begun with other flags; undo, or give a new directory: {'; '.join(changes)}")


def write_settings(out: Path, settings: Settings, fingerprint: str) -> None:
    """Claims the directory."""
    write_json(out / SETTINGS_FILE, _as_json(settings, fingerprint))


def _as_json(settings: Settings, fingerprint: str | None) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return values | {"text_fingerprint": fingerprint}


def _changes(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs. Stages may be added behind those that there were, and steps of stages that there were not."""
    changes = []
    for name in sorted(saved.keys() | new.keys()):
        old, now = saved.get(name), new.get(name)
        if name == "steps" and isinstance(old, dict) and isinstance(now, dict):
            told = [stage for stage in saved.get("stages", ()) if old.get(stage) != now.get(stage)]
            changes += [f"--steps: {stage}={old.get(stage)} -> {stage}={now.get(stage)}" for stage in told]
        elif name == "stages" and isinstance(old, list) and isinstance(now, list):
            if now[: len(old)] != old:
                changes.append(f"--stages: {','.join(old)} -> {','.join(now)} (others may follow, none may go)")
        elif name == "text_fingerprint":
            is_same_place = all(saved.get(text) == new[text] for text in ("text", "test_text", "text_field"))
            if now not in (None, old) and is_same_place:
                changes.append("the files of --text or --test_text have changed")
        elif old != now and not (name == "long_context" and LONG not in saved.get("stages", ())):
            changes.append(f"--{name}: {old} -> {now}")
    return changes
