"""What a run was beside its figures: data, size, speed, machine, version, time and samples, as text."""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.language_model import SAMPLES_FILE
from darkformer_jax.training.goodput import SESSIONS_FILE, duration, read_sessions

NUMBERS = ("parameters", "tokens/s", "wall time")  # the last headings
NOT_RECORDED = "not recorded"  # an earlier version trained the run, or a part of the workdir was removed

_LONGEST_SAMPLES = 1200  # characters


class Facts(NamedTuple):
    """What a run was, by heading, and the beginning of its samples."""

    shown: dict[str, str]  # heading -> text or NOT_RECORDED; all runs have the same headings
    samples: str  # "" = there are none


def read_facts(workdir: str, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Facts:
    """Reads the account of the run's sessions and its samples.

    config: its config.json. lines: those of its metrics.jsonl. Raises UserError if the account is damaged.
    """
    sessions = read_sessions(Workdir(workdir))
    try:
        shown = {
            "data": _data(config["data"], sessions),
            "hardware": _of_sessions(sessions, "hardware"),
            "version": _of_sessions(sessions, "version"),
            "date": _date(sessions),
            "parameters": _parameters(sessions),
            "tokens/s": shown_median([median_speed(lines)], "{:,.0f}"),
            "wall time": _wall_time(sessions),
        }
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{workdir}/{SESSIONS_FILE} is not what training writes: {error!r}") from error
    return Facts(shown, _samples(workdir))


def common_facts(all_facts: Sequence[Facts]) -> dict[str, str]:
    """The facts that are equal in all runs."""
    first = all_facts[0].shown if all_facts else {}
    return {name: text for name, text in first.items() if all(facts.shown[name] == text for facts in all_facts)}


def _data(data: Mapping[str, Any], sessions: Sequence[Mapping[str, Any]]) -> str:
    source = " ".join(filter(None, (data["source"], data["files"])))
    tokenizer = f", tokenizer {data['tokenizer']}" if data["tokenizer"] else ""
    size = _of_sessions(sessions, "data")
    return source + tokenizer + ("" if size == NOT_RECORDED else f"; {size}")


def _parameters(sessions: Sequence[Mapping[str, Any]]) -> str:
    facts = next((session["facts"] for session in sessions if session.get("facts")), None)
    if facts is None:
        return NOT_RECORDED
    total, trained = facts["parameters"], facts["trained"]
    return f"{total:,}" if total == trained else f"{total:,}, of which {trained:,} trained"


def shown_median(values: Sequence[float | None], form: str, unit: float = 1) -> str:
    """The median of the values that are known, in units of `unit` and the format `form`, or NOT_RECORDED."""
    known = [value for value in values if value is not None]
    return form.format(statistics.median(known) / unit) if known else NOT_RECORDED


def median_speed(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens per second: the median over the lines of metrics.jsonl, which a pause does not change. None = no line."""
    speeds = [line["time"]["tokens_per_second"] for line in lines if "tokens_per_second" in line.get("time", {})]
    known = [speed for speed in speeds if speed is not None]
    return statistics.median(known) if known else None


def largest_memory(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes: the peak of the device where it counts, else the largest of the process on the host. None = no line."""
    for name in ("device_memory_bytes", "host_memory_bytes"):
        known = [line["time"][name] for line in lines if line.get("time", {}).get(name) is not None]
        if known:
            return max(known)
    return None


def _wall_time(sessions: Sequence[Mapping[str, Any]]) -> str:
    if not sessions:
        return NOT_RECORDED
    seconds = sum(session["ended"] - session["began"] for session in sessions)
    starts = f" in {len(sessions)} starts" if len(sessions) > 1 else ""
    return duration(seconds) + starts


def _of_sessions(sessions: Sequence[Mapping[str, Any]], name: str) -> str:
    """The values of a fact in the order of the sessions, each once."""
    values = dict.fromkeys(str(session.get("facts", {}).get(name, NOT_RECORDED)) for session in sessions)
    return ", then ".join(values) or NOT_RECORDED


def _date(sessions: Sequence[Mapping[str, Any]]) -> str:
    if not sessions:
        return NOT_RECORDED
    began, ended = (_day(sessions[i][name]) for i, name in ((0, "began"), (-1, "ended")))
    return began if began == ended else f"{began} to {ended}"


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d")


def _samples(workdir: str) -> str:
    path = Workdir(workdir) / SAMPLES_FILE
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").strip("\n")
    if len(text) <= _LONGEST_SAMPLES:
        return text
    return f"{text[:_LONGEST_SAMPLES]}\n[{len(text) - _LONGEST_SAMPLES:,} more characters in {SAMPLES_FILE}]"
