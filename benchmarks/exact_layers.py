"""Which layers to leave exact: `calibrate --exact_layers=auto` against evenly spaced and random layers.

    python -m darkformer_jax.calibrate --workdir=runs/smollm2 --text='faq/*.md' --out=runs/smollm2-dark
    python -m benchmarks.exact_layers --exact=runs/smollm2 --replaced=runs/smollm2-dark --text='faq/*.md' \\
        --test_text=persuasion.txt --out=exact_layers.json

Every layer of --replaced is fitted. A hybrid takes each layer from one model or from the other, and nothing is trained.
The layers are chosen on --text, and all figures are of --test_text: nats per token of passages, and of the second half
of passages that are repeated after half of --context. `auto` takes turns between two orders. Beside it stand these two
orders alone (by loss, by copying), every k-th layer, and random layers: each draw is an order, whose first N are exact.
--out is written after each row.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darkformer_jax.calibration.cache_budget import CACHE_CONTEXT, CacheSizes
from darkformer_jax.calibration.exact_layers import candidates_of, ranking
from darkformer_jax.calibration.hybrids import Hybrids, Quality
from darkformer_jax.calibration.passages import read_passages
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.runs.load import load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.table import table_lines

DRAWS = 3


def chosen_layers(alone: Sequence[Quality], base: Quality, layers: list[int], count: int) -> dict[str, list[int]]:
    """`count` exact layers by each way to choose them."""
    by_loss, by_copy = (
        sorted(layers, key=lambda layer: -getattr(alone[layers.index(layer)], name)) for name in ("loss", "copy")
    )
    return {
        "auto": ranking(alone, base, layers)[:count],
        **spaced_and_random(layers, count),
        "by loss": by_loss[:count],
        "by copying": by_copy[:count],
    }


def spaced_and_random(parts: Sequence[Any], count: int) -> dict[str, list[Any]]:
    """`count` of the parts, evenly spaced and by three draws."""
    draws = (np.random.default_rng(draw).permutation(len(parts))[:count] for draw in range(DRAWS))
    return {
        "every k-th": [parts[i * len(parts) // count] for i in range(count)],
        **{f"random {number}": [parts[i] for i in draw] for number, draw in enumerate(draws)},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows; `over exact` is that of the first row, which is the exact model."""
    lines = [["choice", "exact", "loss", "over exact", "copy", f"MB at {CACHE_CONTEXT:,}", "layers"]]
    for row in rows:
        over = 100 * (row["loss"] / rows[0]["loss"] - 1)
        figures = [f"{row['loss']:.4f}", f"{over:.2f}%", f"{row['copy']:.3f}", f"{row['cache_bytes'] / 1e6:,.0f}"]
        layers = " ".join(map(str, sorted(row["layers"]))) if 0 < row["count"] <= 10 else ""
        lines.append([row["choice"], str(row["count"]), *figures, layers])
    return "\n".join(table_lines(lines))


def make_parser(description: str | None, counts: Sequence[int]) -> argparse.ArgumentParser:
    """The flags of a comparison of models with so many exact parts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("exact", "replaced", "text", "test_text", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--passages", type=int, default=4, help="of either text")
    parser.add_argument("--counts", type=int, nargs="+", default=counts, help="how many are exact")
    return parser


def check_out(parser: argparse.ArgumentParser, out: str) -> None:
    """Refuses a file that cannot be written, before anything is measured."""
    path = Path(out).absolute()
    place = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        parser.error(f"--out {out}: cannot be written; allowed: a file in a directory that is there")


def main() -> None:
    """Measures, writes --out and prints the table."""
    parser = make_parser(__doc__, [2, 4, 6, 8])
    parser.add_argument("--choices", nargs="+", help="the rows of the table, such as auto (default: all)")
    args = parser.parse_args()
    known = list(chosen_layers([], Quality(0, 0), [], 0))
    unknown = sorted({*(args.choices or ())} - {*known})
    if unknown:
        parser.error(f"--choices {unknown[0]}: allowed: {', '.join(known)}")
    check_out(parser, args.out)

    exact, replaced = (load_language_model(Workdir(path)) for path in (args.exact, args.replaced))
    models = [model.network.bind(model.params, model.projections) for model in (exact, replaced)]
    specs = (exact.network.spec, replaced.network.spec)
    layers, sizes = candidates_of(*specs), CacheSizes.of(*specs, CACHE_CONTEXT)
    texts = (
        read_passages(text, "", "text", exact.tokenizer, args.passages, args.context, seed=0)[0]
        for text in (args.text, args.test_text)
    )
    selection, test = (Hybrids(models[0], models[1], passages, exact.tokenizer) for passages in texts)
    one_each = [frozenset(), *(frozenset({layer}) for layer in layers)]
    base, *alone = selection.measure(one_each, progress_bar, "each layer alone")
    found: dict[str, Any] = vars(args) | {
        "alone": [[*base], *([layer, *q] for layer, q in zip(layers, alone, strict=True))]
    }
    rows: list[dict[str, Any]] = []

    def measure(choice: str, some: Sequence[Sequence[int]]) -> None:
        hybrids = [frozenset(layers) - frozenset(kept) for kept in some]
        for kept, quality in zip(some, test.measure(hybrids, progress_bar, choice), strict=True):
            row = {"choice": choice, "count": len(kept), "layers": list(kept), **quality._asdict()}
            rows.append(row | {"cache_bytes": sizes.total(kept)})
        Path(args.out).write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")

    measure("all or none", [layers, []])
    by_count = [chosen_layers(alone, base, layers, count) for count in args.counts]
    for choice in args.choices or by_count[0]:
        measure(choice, [chosen[choice] for chosen in by_count])
    print(table(rows))


if __name__ == "__main__":
    main()
