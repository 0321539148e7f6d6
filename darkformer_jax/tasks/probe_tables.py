"""The figures of probes in words and tables."""

from typing import Any

from darkformer_jax.data.probe_words import EXAMPLES, FACTS, KINDS
from darkformer_jax.tasks.table import table_lines

HEADINGS = {  # figure -> column of a table
    "second_copy": "second copy, nats",
    "first_copy": "first copy, nats",
    "gain": "gain, nats",
    "accuracy": "accuracy",
    "right": "right",
    "answer": "answer, nats",
    "bits_per_token": "bits per token",
}
_SHARES = ("accuracy", "right")  # shown in percent
PROBES = {
    "copy": "a passage that comes again, by tokens from one copy to the other",
    "repeat": "the whole row comes again, by tokens from one copy to the other",
    "lookup": f"made-up facts, {FACTS} per row and distance, by tokens from the fact to its question",
    "classes": f"a rule from {EXAMPLES * len(KINDS)} examples, by tokens of text before the question; "
    f"chance is {100 // len(KINDS)}%",
    "positions": "plain text, by position",
}


def shown(name: str, mean: float, standard_error: float | None) -> str:
    """A figure as text: `0.25 ± 0.01`, or in percent."""
    scale, digits = (100, 0) if name in _SHARES else (1, 3)
    spread = "" if standard_error is None else f" ± {scale * standard_error:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}" + ("%" if scale > 1 else "")


def tables(result: dict[str, Any]) -> str:
    """One table per probe, for the result of `tasks.probes.ask_probes`."""
    lines = [
        f"{result['workdir']} step {result['step']}: {result['rows']} rows per probe and distance, mean ± standard "
        "error over the rows"
    ]
    for probe, title in PROBES.items():
        entries = [entry for entry in result["probes"] if entry["probe"] == probe]
        if entries:
            names = list(entries[0]["figures"])
            cells = [[shown(name, **entry["figures"][name]) for name in names] for entry in entries]
            rows = [["position" if probe == "positions" else "distance", *map(HEADINGS.__getitem__, names)]]
            rows += [[entry["at"], *row] for entry, row in zip(entries, cells, strict=True)]
            lines += ["", f"{probe}: {title}", *table_lines(rows)]
    return "\n".join(lines)
