"""Which key/value heads to leave exact: `calibrate --exact_heads=auto` against evenly spaced and random heads.

    python -m darkformer_jax.calibrate --workdir=runs/smollm2 --text='faq/*.md' --out=runs/smollm2-dark
    python -m benchmarks.exact_heads --exact=runs/smollm2 --replaced=runs/smollm2-dark --text='faq/*.md' \\
        --test_text=persuasion.txt --out=exact_heads.json

Every head of --replaced is fitted; a model takes each head from either, and nothing is trained. Heads are
chosen by their gains on --text; all figures are of --test_text: nats per token of passages, and of the second half of
passages that are repeated after half of --context. Heads are counted from layer to layer; every k-th is of this order,
and each random draw is an order whose first N are exact. --out is written after each row.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.exact_layers import check_out, make_parser, spaced_and_random
from darkformer_jax.calibration.cache_budget import CACHE_CONTEXT
from darkformer_jax.calibration.exact_layers import candidates_of
from darkformer_jax.calibration.head_choice import Head, HeadSizes, rank_heads, shares_of
from darkformer_jax.calibration.heads import MixedHeads
from darkformer_jax.calibration.passages import read_passages
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.runs.load import load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.table import table_lines


def chosen_heads(ranked: Sequence[Head], count: int) -> dict[str, list[Head]]:
    """`count` exact heads by each way to choose them; `ranked` is the order of auto."""
    return {"auto": list(ranked[:count]), **spaced_and_random(sorted(ranked), count)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows; `over exact` is that of the first row, which is the exact model."""
    exact = rows[0]
    lines = [["choice", "exact heads", "loss", "over exact", "copy", f"MB at {CACHE_CONTEXT:,}", "of exact"]]
    for row in rows:
        over = f"{100 * (row['loss'] / exact['loss'] - 1):.2f}%"
        share = f"{100 * row['cache_bytes'] / exact['cache_bytes']:.1f}%"
        figures = [f"{row['loss']:.4f}", over, f"{row['copy']:.3f}", f"{row['cache_bytes'] / 1e6:,.0f}", share]
        lines.append([row["choice"], str(row["count"]), *figures])
    return "\n".join(table_lines(lines))


def main() -> None:
    """Measures, writes --out and prints the table."""
    parser = make_parser(__doc__, [6, 12, 18, 24])
    args = parser.parse_args()
    check_out(parser, args.out)

    exact, replaced = (load_language_model(Workdir(path)) for path in (args.exact, args.replaced))
    specs = (exact.network.spec, replaced.network.spec)
    chosen_on, test = (
        read_passages(text, "", "text", exact.tokenizer, args.passages, args.context, seed=0)[0]
        for text in (args.text, args.test_text)
    )
    before, after = (model.network.bind(model.params, model.projections) for model in (exact, replaced))
    heads = MixedHeads(before, after, candidates_of(*specs), exact.tokenizer)
    sizes = HeadSizes(*specs, CACHE_CONTEXT)
    ranked, _ = rank_heads(heads, chosen_on, progress_bar)
    models_of: list[tuple[str, list[Head]]] = [("all", list(ranked)), ("none", [])]
    for count in args.counts:
        models_of += chosen_heads(ranked, count).items()
    rows: list[dict[str, Any]] = []
    with progress_bar(len(models_of), "model", "together") as bar:
        for choice, kept in models_of:
            quality = heads.measure(shares_of(kept, specs[0]), test)
            row = {"choice": choice, "count": len(kept), "heads": sorted(kept), **quality._asdict()}
            rows.append(row | {"cache_bytes": sizes.total(kept)})
            Path(args.out).write_text(json.dumps(vars(args) | {"ranking": ranked, "rows": rows}, indent=1) + "\n")
            bar.update()
    print(table(rows))


if __name__ == "__main__":
    main()
