"""What language models find far back in their context, from what `evaluate --probes --json` wrote as probes*.json."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from darkformer_jax.data.files import read_json_object
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.curves import Line
from darkformer_jax.reporting.rows import Mean
from darkformer_jax.tasks.probe_tables import HEADINGS, PROBES, shown

PROBE_FILES = "probes*.json"


class Probed(NamedTuple):
    """The figures of one model for one probe and distance.

    Attributes:
      model: its workdir, with the step if other figures are of another step of it.
      probe, at, place, fingerprint: as in `tasks.probes.Asked` and the file.
      figures: name -> the mean over rows.
    """

    model: str
    probe: str
    at: str
    place: int
    fingerprint: str
    figures: dict[str, Mean]

    @property
    def cells(self) -> list[str]:
        """The figures as text."""
        return [shown(name, mean.mean, mean.standard_error) for name, mean in self.figures.items()]


class ProbeTable(NamedTuple):
    """All models' figures for one probe, by distance."""

    probe: str
    entries: list[Probed]

    @property
    def title(self) -> str:
        """What was asked."""
        return PROBES[self.probe]

    @property
    def names(self) -> list[str]:
        """The figures."""
        return list(self.entries[0].figures)

    @property
    def headings(self) -> list[str]:
        """The columns of the figures."""
        return [HEADINGS[name] for name in self.names]

    @property
    def lines(self) -> list[Line]:
        """Per model, the first figure by distance. Distance 0 has no place on a logarithmic axis."""
        lines: dict[str, Line] = {}
        for one in self.entries:
            if one.place:
                line = lines.setdefault(one.model, Line(one.model, [], None, []))
                line.points.append((one.place, one.figures[self.names[0]]))
        return list(lines.values())

    @property
    def axes(self) -> tuple[str, str]:
        """The names of the plot's axes."""
        x = "last position of the octave" if self.probe == "positions" else "distance, tokens"
        return x, f"{self.probe}: {self.headings[0]}" + (" (share)" if self.names[0] == "right" else "")


def find_probes(workdirs: Iterable[str]) -> list[ProbeTable]:
    """The tables of all probes*.json in the workdirs, in the order of the probes.

    Raises UserError for a file that `evaluate` did not write, two figures of one model for one thing, and models whose
    rows differ: their figures do not compare.
    """
    read = [(workdir, path, read_json_object(str(path))) for workdir in workdirs for path in _files(workdir)]
    steps: dict[str, set[Any]] = {}
    for workdir, _, content in read:
        steps.setdefault(workdir, set()).add(content.get("step"))
    found: dict[tuple[str, str, str], tuple[Path, Probed]] = {}
    for workdir, path, content in read:
        model = workdir + (f" step {content.get('step')}" if len(steps[workdir]) > 1 else "")
        for one in _entries(model, path, content):
            before = found.setdefault((one.probe, one.at, model), (path, one))
            if before[1] is not one:
                raise UserError(f"{before[0]} and {path} both have {one.probe} at {one.at}; allowed: one of them")
    _require_same_rows(list(found.values()))
    by_place = sorted((one for _, one in found.values()), key=lambda one: one.place)  # models stay in order
    tables = [ProbeTable(probe, [one for one in by_place if one.probe == probe]) for probe in PROBES]
    return [table for table in tables if table.entries]


def as_json(tables: Sequence[ProbeTable]) -> list[dict[str, Any]]:
    """The tables' part of results.json."""
    return [
        {
            "probe": one.probe,
            "at": one.at,
            "model": one.model,
            "figures": {
                name: {"mean": mean.mean, "standard_error": mean.standard_error} for name, mean in one.figures.items()
            },
        }
        for table in tables
        for one in table.entries
    ]


def _files(workdir: str) -> list[Path]:
    return sorted(Path(workdir).glob(PROBE_FILES))


def _entries(model: str, path: Path, content: dict[str, Any]) -> list[Probed]:
    try:
        return [_entry(model, one) for one in content["probes"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what evaluate --probes --json writes: {error!r}") from error


def _entry(model: str, one: dict[str, Any]) -> Probed:
    figures = {}
    for name, figure in one["figures"].items():
        spread = figure["standard_error"]
        mean = Mean(float(figure["mean"]), None if spread is None else float(spread), int(one["rows"]))
        if name not in HEADINGS or not math.isfinite(mean.mean + (mean.standard_error or 0.0)):
            raise ValueError(f"{name} = {figure['mean']}")
        figures[name] = mean
    if one["probe"] not in PROBES or not figures:
        raise ValueError(f"there is no probe {one['probe']}")
    return Probed(model, one["probe"], str(one["at"]), int(one["place"]), str(one["fingerprint"]), figures)


def _require_same_rows(found: Sequence[tuple[Path, Probed]]) -> None:
    first: dict[tuple[str, str], tuple[Path, Probed]] = {}
    for path, one in found:
        other, before = first.setdefault((one.probe, one.at), (path, one))
        if before.fingerprint != one.fingerprint:
            raise UserError(
                f"{other} and {path} asked {one.probe} at {one.at} with other rows: their text, tokenizer, --rows, "
                "--seed, --distances or --context differ, and their figures do not compare; report them separately"
            )
