"""Reading, writing and memory by context: a converted model beside the exact one, with the sampler of `generate`.

    python -m benchmarks.contexts --workdirs=runs/smollm2,runs/smollm2-dark --contexts=1024,4096,16384

Each model reads so many random tokens and then writes. Programs are compiled before the clock starts. The models take
turns; the first is the one that the others are compared with, and they compute in its dtype. A model leaves the longer
contexts out once one reading would take longer than --limit: it expects four times as long for twice the tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.parser import one_line_errors
from darkformer_jax.data.files import write_file
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.table import table_lines

_WRITTEN_BEFORE = 2  # tokens that are not timed


class Reader:
    """A model's compiled programs for one context."""

    def __init__(self, sampler: Sampler, arrays: tuple[Any, Any], context: int, new_tokens: int) -> None:
        self._sampler, self._arrays, self._new = sampler, arrays, new_tokens
        self._tokens = np.random.default_rng(0).integers(10, 1000, (1, context)).astype(np.int32)
        self._lengths, self._key = np.full(1, context, np.int32), jax.random.key(0)
        room = context + new_tokens + _WRITTEN_BEFORE
        self._read = sampler._prefill.lower(*arrays, self._tokens, self._lengths, self._key, room=room).compile()

    def turn(self) -> dict[str, Any]:
        """Seconds for reading, the median of those for a token, and the bytes of the state between tokens."""
        started = time.perf_counter()
        token, state = jax.block_until_ready(self._read(*self._arrays, self._tokens, self._lengths, self._key))
        reading, writing = time.perf_counter() - started, []
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        for place in range(self._new + _WRITTEN_BEFORE):
            started = time.perf_counter()
            position = self._lengths + place
            token, state = self._sampler._step(*self._arrays, token, position, state, self._key)
            token.block_until_ready()
            writing.append(time.perf_counter() - started)
        return {"reading": reading, "token": statistics.median(writing[_WRITTEN_BEFORE:]), "state_bytes": state_bytes}


def measure(
    workdirs: Sequence[str], contexts: Sequence[int], new_tokens: int, repeats: int, limit: float
) -> list[dict[str, Any]]:
    """One row per model and context: what `Reader.turn` gives, medians over turns."""
    models, dtype = {}, None
    for workdir in workdirs:
        model = load_model(Workdir(workdir), dtype=dtype)
        dtype = model.config.model.dtype
        arrays = (model.params, model.projections)
        models[workdir] = (Sampler(model.network, *arrays, temperature=0), arrays)
    rows: list[dict[str, Any]] = []
    expected = dict.fromkeys(workdirs, 0.0)
    with tqdm.tqdm(total=len(contexts) * len(workdirs) * repeats, unit="turn") as bar:
        for before, context in zip((contexts[0], *contexts), contexts, strict=False):
            expected = {name: seconds * (context / before) ** 2 for name, seconds in expected.items()}
            readers = {name: Reader(*models[name], context, new_tokens) for name in workdirs if expected[name] <= limit}
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in readers}
            for _ in range(repeats):
                for name, reader in readers.items():
                    turns[name].append(reader.turn())
                    bar.update()
            for name, found in turns.items():
                row = {key: statistics.median(turn[key] for turn in found) for key in found[0]}
                rows.append({"workdir": name, "dtype": dtype, "context": context, **row})
                expected[name] = row["reading"]
            bar.update(repeats * (len(workdirs) - len(readers)))
    return rows


def lines(rows: Sequence[dict[str, Any]], first: str) -> list[str]:
    """The table; ratios are to the first model, where it read the same context."""
    base = {row["context"]: row for row in rows if row["workdir"] == first}
    table = [["context", "model", "reads, tokens/s", "ratio", "writes, tokens/s", "ratio", "state, MB", "of it"]]
    for row in rows:
        other = base.get(row["context"])
        ratio = lambda name, row=row, other=other: f"{other[name] / row[name]:.2f}" if other else "-"
        share = f"{100 * row['state_bytes'] / other['state_bytes']:.1f}%" if other else "-"
        reads, writes = f"{row['context'] / row['reading']:,.0f}", f"{1 / row['token']:.1f}"
        size = f"{row['state_bytes'] / 1e6:.1f}"
        name = Path(row["workdir"]).name
        table.append([f"{row['context']:,}", name, reads, ratio("reading"), writes, ratio("token"), size, share])
    return table_lines(table)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", required=True, help="comma-separated; the first is what others are compared with")
    parser.add_argument("--contexts", default="1024,4096,16384", help="tokens, rising (default: 1024,4096,16384)")
    parser.add_argument("--new_tokens", type=int, default=16, help="written after each reading (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--limit", type=float, default=600, help="seconds of one reading (default: 600)")
    parser.add_argument("--out", help="writes the rows to this JSON file")
    args = parser.parse_args()
    with one_line_errors("nothing was written"):
        workdirs = args.workdirs.split(",")
        if min(args.new_tokens, args.repeats) < 1:
            raise UserError(f"--new_tokens={args.new_tokens} --repeats={args.repeats}: must be at least 1")
        rows = measure(workdirs, _contexts(args.contexts), args.new_tokens, args.repeats, args.limit)
        print("\n".join(lines(rows, workdirs[0])))
        if args.out:
            write_file(args.out, (json.dumps(rows) + "\n").encode())


def _contexts(text: str) -> list[int]:
    """Raises UserError."""
    numbers = text.split(",")
    contexts = [int(number) for number in numbers if number.isdecimal()]
    if len(contexts) < len(numbers) or contexts != sorted(set(contexts)) or contexts[0] < 1:
        raise UserError(f"--contexts={text}: allowed: rising whole numbers from 1")
    return contexts


if __name__ == "__main__":
    start_with_huge_pages()
    main()
