"""Multi-query associative recall: shows what linear attention forgets, which averages over text hide.

    python -m benchmarks.recall --out=docs/results/recall
    python -m benchmarks.recall --variants='softmax;dark, window' --steps=500

A row begins with PAIRS tokens, each of which gives the value of one key. Every other token asks for a key; no answer is
shown again. Only the answers count in the loss. Trains every variant from scratch on rows that are a function of (seed,
step), and prints the share of right answers on unseen rows, by the number of tokens between a pair and its question.
Chance is one in VALUES. A window shows 16 tokens and the own chunk of 16, so none reaches further back than 31 tokens.

In Arora et al., Zoology, arXiv 2312.04927, key and value are two tokens. A model must then first find that each value
belongs to the token before it. That takes two layers, and more than 1,500 steps in which even exact attention knows the
values but not their keys. With one token per pair, only memory is compared.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
import tqdm

from benchmarks.learning import RIVALS, VARIANTS, parse_changes, train
from configs import ablation
from darkformer_jax.config.validation import validate
from darkformer_jax.data import Batch
from darkformer_jax.training.evaluation import put_batch

PAIRS = KEYS = 32
VALUES = 16
FIRST_PAIR = KEYS + VALUES  # tokens: keys from 0, values from KEYS, pairs from here
VOCABULARY = FIRST_PAIR + KEYS * VALUES
LENGTH = 128
WINDOW = 16
DISTANCES = (0, 32, 64, LENGTH)  # edges of the table's columns: tokens from a pair to its question
_TEST = 2**31  # steps of the held-out rows


def make_rows(seed: int, step: int, count: int) -> Batch:
    """`count` rows, a function of (seed, step). `distance` [count, LENGTH] is that of each question, 0 elsewhere."""
    random = np.random.default_rng([seed, step])
    inputs = np.empty((count, LENGTH), np.int32)
    targets, distance = np.zeros_like(inputs), np.zeros_like(inputs)
    for row in range(count):
        keys = random.permutation(KEYS)[:PAIRS]
        values = random.integers(VALUES, size=PAIRS)
        asked = random.integers(PAIRS, size=LENGTH - PAIRS)
        inputs[row] = [*(FIRST_PAIR + keys * VALUES + values), *keys[asked]]
        targets[row, PAIRS:] = KEYS + values[asked]
        distance[row, PAIRS:] = np.arange(PAIRS, LENGTH) - asked
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), inputs.shape)
    tokens = {"inputs": inputs, "targets": targets, "positions": positions, "segment_ids": np.ones_like(inputs)}
    return tokens | {"weights": (distance > 0).astype(np.float32), "distance": distance}


def training_rows(config: ml_collections.ConfigDict) -> Iterator[Batch]:
    """The batches of steps 0, 1, ..."""
    for step in range(config.num_steps):
        batch = make_rows(config.seed, step, config.batch_size)
        del batch["distance"]
        yield batch


def config_of(variant: str, changes: str, learning_rate: float, steps: int, seed: int) -> ml_collections.ConfigDict:
    """The config of two small layers of the variant, with changes as `learning.parse_changes` reads them."""
    config = ablation.get_config()
    config.update_from_flattened_dict(
        {
            "num_steps": steps,
            "seed": seed,
            "batch_size": 32,
            "sequence_length": LENGTH,
            "model.num_layers": 2,
            "model.embed_dim": 64,
            "model.num_heads": 2,
            "model.num_kv_heads": 2,
            "model.mlp_dim": 128,
            "model.attention.chunk_size": WINDOW,
            "optimizer.learning_rate": learning_rate,
            "optimizer.geometry_learning_rate": learning_rate,
            "optimizer.warmup_steps": min(50, steps // 4),
            **(VARIANTS | RIVALS)[variant],
            **parse_changes(changes),
        }
    )
    if config.model.attention.window:
        config.model.attention.window = WINDOW
    validate(config)
    return config


def recall(config: ml_collections.ConfigDict, bar: tqdm.tqdm) -> list[float]:
    """Trains, and returns the share of right answers between successive DISTANCES."""
    experiment, state, _ = train(config, VOCABULARY, training_rows(config), bar.update)

    @jax.jit
    def answers(params: dict, projections: dict, batch: dict) -> jax.Array:
        model = experiment.network.bind(params, projections)
        logits, _ = model(batch["inputs"], batch["segment_ids"], batch["positions"])
        return logits.argmax(-1)

    right, asked = np.zeros(len(DISTANCES) - 1), np.zeros(len(DISTANCES) - 1)
    for step in range(8):
        batch = make_rows(config.seed, _TEST + step, config.eval.batch_size)
        distance = batch.pop("distance")
        found = answers(state.params, state.projections, put_batch(batch, experiment.batch_sharding))
        place = np.digitize(distance, DISTANCES[1:-1])
        for column in range(len(right)):
            here = (place == column) & (batch["weights"] > 0)
            right[column] += np.sum(here & (np.asarray(found) == batch["targets"]))
            asked[column] += np.sum(here)
    return list(right / asked)


def table(results: list[dict]) -> str:
    """The Markdown table: one row per variant, with its best learning rate by the mean over columns and seeds."""
    columns = [f"{first + (not first)} to {last - 1}" for first, last in itertools.pairwise(DISTANCES)]
    lines = [f"| variant | learning rate | {' | '.join(columns)} tokens back |", "|---" * (len(columns) + 2) + "|"]
    for variant in dict.fromkeys(result["variant"] for result in results):
        own = [result for result in results if result["variant"] == variant]
        shares = {
            rate: np.array([result["share"] for result in own if result["learning_rate"] == rate])
            for rate in {result["learning_rate"] for result in own}
        }
        rate = max(shares, key=lambda rate: shares[rate].mean())
        spread = shares[rate].std(axis=0, ddof=1) if len(shares[rate]) > 1 else None
        cells = [f"{100 * mean:.0f}%" for mean in shares[rate].mean(axis=0)]
        if spread is not None:
            cells = [f"{cell} ± {100 * width:.0f}" for cell, width in zip(cells, spread, strict=True)]
        lines.append(f"| {variant} | {rate:g} of {', '.join(f'{r:g}' for r in sorted(shares))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains, prints the table, and writes it and every run to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by a semicolon (default: all)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run (default: 600)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n-1 of each run (default: 1)")
    parser.add_argument("--learning_rates", default="3e-3", help="comma-separated peaks (default: 3e-3)")
    parser.add_argument("--set", action="append", default=[], help="a config field for all runs: model.qk_norm=true")
    parser.add_argument("--out", type=Path, help="writes <out>.md and <out>.jsonl")
    args = parser.parse_args()
    variants = [name.strip() for name in args.variants.split(";")]
    if unknown := set(variants) - (VARIANTS | RIVALS).keys():
        parser.error(f"--variants: {min(unknown)!r} is unknown; allowed: {'; '.join(VARIANTS | RIVALS)}")
    changes = " ".join(sorted(args.set))
    rates = [float(rate) for rate in args.learning_rates.split(",")]
    runs = [(variant, rate, seed) for variant in variants for rate in rates for seed in range(args.seeds)]
    results: list[dict] = []
    with tqdm.tqdm(total=len(runs) * args.steps, unit="step") as bar:
        for variant, rate, seed in runs:
            bar.set_description(f"{variant} lr {rate:g} seed {seed}")
            share = recall(config_of(variant, changes, rate, args.steps, seed), bar)
            name = " ".join(filter(None, [variant, changes]))
            results.append({"variant": name, "learning_rate": rate, "seed": seed, "share": share})
            tqdm.tqdm.write(table(results[-1:]).splitlines()[-1])
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.with_suffix(".jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
                args.out.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
