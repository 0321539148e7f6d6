"""Compares what mechanisms learn from the same data in the same number of steps, each at its best learning rate.

    python -m benchmarks.learning --out=docs/results/learning
    python -m benchmarks.learning --out=docs/results/geometry --variants='dark' --learning_rates=3e-3 \\
        --set=model.attention.geometry_init=1.0

Trains every variant of configs/ablation.py at each learning rate and keeps the best by held-out bits per byte. Two
figures show what far text is worth: bits by quarter of the row, and bits of repeats by their distance. A byte is a
repeat if the row already holds the eight bytes that end with it. Runs that --out already holds are not repeated.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from configs import ablation
from darkformer_jax.config.validation import validate
from darkformer_jax.data import Batch, Data, Split, heldout_batches, load_data, train_batches
from darkformer_jax.errors import UserError
from darkformer_jax.tasks.language_model import tokens_per_byte
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.training.evaluation import put_batch
from darkformer_jax.training.experiment import Experiment

QUARTERS = 4
REPEATED = 8  # a target is a repeat if so many tokens, up to and with it, were seen before
FAR = 128  # tokens back: no window of the variants reaches that far

# name -> changes to configs/ablation.py
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {"model.attention.kind": "softmax"},
    "performer": {"model.attention.kind": "performer"},
    "dark": {"model.attention.kind": "dark"},
    "lfk": {"model.attention.kind": "lfk"},
    "random": {"model.attention.kind": "random"},
    "constant": {"model.attention.kind": "constant"},
    "window only": {"model.attention.kind": "window_only", "model.attention.window": 64},
    "performer, window": {"model.attention.kind": "performer", "model.attention.window": 64},
    "dark, window": {"model.attention.kind": "dark", "model.attention.window": 64},
    "lfk, window": {"model.attention.kind": "lfk", "model.attention.window": 64},
}

# Rivals, which run only if they are named.
RIVALS: dict[str, dict[str, Any]] = {
    "softmax_local": {"model.attention.kind": "softmax_local", "model.attention.local_window": 64},
    "linear_transformer": {"model.attention.kind": "linear_transformer"},
    "hedgehog": {"model.attention.kind": "hedgehog"},
    "cosformer": {"model.attention.kind": "cosformer", "model.attention.horizon": 512},
    "rfa_gate": {"model.attention.kind": "rfa_gate", "model.attention.decay": "gate"},
    "mamba2": {"model.attention.kind": "mamba2"},
    "gated_deltanet": {"model.attention.kind": "gated_deltanet"},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, by everything that tells it from others."""

    variant: str
    changes: str  # --set, as "field=value field=value"
    learning_rate: float
    geometry_ratio: float  # learning rate of M and of learned projections over the model's
    steps: int
    seed: int
    batches: int  # held-out batches


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one training run. Bits are of held-out text, per token except in the first figure."""

    bits_per_byte: float
    accuracy: float
    train_loss: float  # mean of the last tenth of the steps, nats per token
    by_position: list[float]  # in each quarter of the row
    near_repeats: float  # of tokens that repeat the row, last seen less than FAR tokens back
    far_repeats: float  # FAR or more tokens back
    others: float


def train(
    config: ml_collections.ConfigDict, vocab_size: int, batches: Iterator[Batch], tick: Callable[[], object]
) -> tuple[Experiment, Any, float]:
    """Trains to the last step without a workdir; returns the experiment, its state and the last losses' mean."""
    experiment = Experiment.of(config, NextToken.of(config, vocab_size))
    state = experiment.initial_state()
    step = experiment.train_step()
    losses = []
    for _ in range(config.num_steps):
        state, metrics = step(state, put_batch(next(batches), experiment.batch_sharding))
        losses.append(metrics["loss"])
        tick()
    last = jax.device_get(losses[-max(1, config.num_steps // 10) :])
    return experiment, state, float(np.mean(last))


def repeat_distance(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """[L + 1] tokens, [L] -> [L]: how far back target i's document held the same REPEATED tokens; 0 = nowhere."""
    last_seen: dict[tuple[int, bytes], int] = {}
    distance = np.zeros(len(tokens) - 1, np.int64)
    for end in range(REPEATED - 1, len(tokens)):
        key = (int(segment_ids[end - 1]), tokens[end - REPEATED + 1 : end + 1].tobytes())
        if key in last_seen:
            distance[end - 1] = end - last_seen[key]
        last_seen[key] = end
    return distance


def measure(experiment: Experiment, state: Any, data: Data, train_loss: float, num_batches: int) -> Result:
    """The outcome on `num_batches` held-out batches."""
    config = experiment.config

    @jax.jit
    def outcomes(params: dict, projections: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        logits, _ = experiment.network.bind(params, projections)(
            batch["inputs"], batch["segment_ids"], batch["positions"]
        )
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        nll = -jax.numpy.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
        return nll, logits.argmax(-1) == batch["targets"]

    nlls, corrects, weights, distances = [], [], [], []
    for batch in heldout_batches(
        data.heldout,
        batch_size=config.eval.batch_size,
        sequence_length=config.sequence_length,
        max_batches=num_batches,
    ):
        nll, correct = outcomes(state.params, state.projections, put_batch(batch, experiment.batch_sharding))
        nlls.append(np.asarray(nll, np.float64) / math.log(2))
        corrects.append(correct)
        weights.append(batch["weights"])
        rows = np.concatenate([batch["inputs"][:, :1], batch["targets"]], axis=1)
        distances.append(np.stack([repeat_distance(*row) for row in zip(rows, batch["segment_ids"], strict=True)]))
    bits, correct, weight, distance = (np.concatenate(x) for x in (nlls, corrects, weights, distances))
    quarter = np.arange(config.sequence_length) * QUARTERS // config.sequence_length

    def mean(chosen: np.ndarray, of: np.ndarray = bits) -> float:
        return float((of * weight * chosen).sum() / (weight * chosen).sum())

    everything = np.ones_like(weight)
    return Result(
        bits_per_byte=mean(everything) * tokens_per_byte(data.heldout),
        accuracy=mean(everything, correct),
        train_loss=train_loss,
        by_position=[mean(everything * (quarter == i)) for i in range(QUARTERS)],
        near_repeats=mean((distance > 0) & (distance < FAR)),
        far_repeats=mean(distance >= FAR),
        others=mean(distance == 0),
    )


def parse_changes(changes: str) -> dict[str, Any]:
    """{"model.qk_norm": True} of "model.qk_norm=true". Values are JSON; what is not JSON is a string."""

    def parse(value: str) -> Any:
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value

    pairs = (change.partition("=") for change in changes.split())
    return {name: parse(value) for name, _, value in pairs}


def config_of(run: Run) -> ml_collections.ConfigDict:
    """configs/ablation.py with the run's changes."""
    config = ablation.get_config()
    config.update_from_flattened_dict(
        {
            "num_steps": run.steps,
            "seed": run.seed,
            "optimizer.learning_rate": run.learning_rate,
            "optimizer.geometry_learning_rate": run.learning_rate * run.geometry_ratio,
            **(VARIANTS | RIVALS)[run.variant],
            **parse_changes(run.changes),
        }
    )
    validate(config)
    if config.distill.workdir:
        raise UserError(f"distill.workdir = {config.distill.workdir!r}: this benchmark has no teacher; allowed: ''")
    return config


def table(results: dict[Run, Result]) -> str:
    """The Markdown table: per variant and change, the best learning rate (by the mean over seeds) and its results."""
    lines = [
        "| variant | learning rate | bits per byte | accuracy | training loss | bits by quarter of the row "
        "| bits of repeats: near, far; of the rest |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, dict[float, list[Result]]] = {}
    for run, result in results.items():
        group = groups.setdefault((run.variant, run.changes, run.geometry_ratio, run.steps, run.batches), {})
        group.setdefault(run.learning_rate, []).append(result)
    for (variant, changes, ratio, steps, _), rates in groups.items():
        rate, best = min(rates.items(), key=lambda item: float(np.mean([r.bits_per_byte for r in item[1]])))
        bits = np.array([r.bits_per_byte for r in best])
        spread = f" ± {bits.std(ddof=1):.3f}" if len(bits) > 1 else ""
        quarters = np.mean([r.by_position for r in best], axis=0)
        repeats = np.mean([[r.near_repeats, r.far_repeats, r.others] for r in best], axis=0)
        name = " ".join(filter(None, [variant, changes, f"(M: {ratio:g} lr)", f"({steps} steps)"]))
        lines.append(
            f"| {name} | {rate:g} of {', '.join(f'{rate:g}' for rate in sorted(rates))} | {bits.mean():.3f}{spread} "
            f"| {100 * np.mean([r.accuracy for r in best]):.1f}% | {np.mean([r.train_loss for r in best]):.3f} "
            f"| {' '.join(f'{q:.2f}' for q in quarters)} | {repeats[0]:.2f} {repeats[1]:.2f}; {repeats[2]:.2f} |"
        )
    return "\n".join(lines)


def ngram_bits(data: Data, order: int) -> float:
    """Held-out bits per token given only the `order` tokens before it, by counts that back off to lower orders."""
    size = data.tokenizer.vocab_size

    def contexts(split: Split) -> tuple[np.ndarray, np.ndarray]:
        tokens = split.read(np.zeros(1, np.int64), split.num_tokens)[0][0].astype(np.int64)
        count = len(tokens) - order
        before = sum((tokens[i : i + count] * size ** (order - 1 - i) for i in range(order)), np.zeros(count, np.int64))
        return before, tokens[order:]

    probabilities = np.full((1, size), 1 / size)
    before, after = contexts(data.train)
    for shorter in range(order + 1):
        places = (before % size**shorter) * size + after
        counts = np.bincount(places, minlength=size ** (shorter + 1)).reshape(size**shorter, size)
        below = probabilities[np.arange(size**shorter) % len(probabilities)]
        probabilities = (counts + below) / (counts.sum(axis=1, keepdims=True) + 1)
    before, after = contexts(data.heldout)
    return float(-np.log2(probabilities[before, after]).mean())


def load(path: Path | None) -> dict[Run, Result]:
    """The results in <out>.jsonl."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Run(**row["run"]): Result(**row["result"]) for row in rows}


def _arguments() -> argparse.Namespace:
    optimizer = ablation.get_config().optimizer
    default_ratio = round(optimizer.geometry_learning_rate / optimizer.learning_rate, 6)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        default=";".join(VARIANTS),
        help=f"separated by a semicolon (default: all but {', '.join(RIVALS)})",
    )
    parser.add_argument("--steps", type=int, default=350, help="optimizer steps of each run (default: 350)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n-1 of each run (default: 1)")
    parser.add_argument("--batches", type=int, default=16, help="held-out batches that are measured (default: 16)")
    parser.add_argument(
        "--learning_rates",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[1e-3, 3e-3, 1e-2],
        help="comma-separated peaks that are tried (default: 1e-3,3e-3,1e-2)",
    )
    parser.add_argument(
        "--geometry_ratio",
        type=float,
        default=default_ratio,
        help=f"learning rate of M and of learned projections over the model's (default: {default_ratio:g})",
    )
    parser.add_argument("--set", action="append", default=[], help="a config field for all runs: model.qk_norm=true")
    parser.add_argument("--out", type=Path, help="adds to <out>.jsonl, and writes <out>.md from all of it")
    args = parser.parse_args()
    args.variants = [name.strip() for name in args.variants.split(";")]
    if unknown := set(args.variants) - (VARIANTS | RIVALS).keys():
        allowed = "; ".join(VARIANTS | RIVALS)
        parser.error(f"--variants: {sorted(unknown)[0]!r} is unknown; allowed: {allowed}")
    return args


def main() -> None:
    """Trains what is missing, prints the table, and writes it to --out."""
    args = _arguments()
    changes = " ".join(sorted(args.set))
    runs = [
        Run(variant, changes, learning_rate, args.geometry_ratio, args.steps, seed, args.batches)
        for variant in args.variants
        for learning_rate in args.learning_rates
        for seed in range(args.seeds)
    ]
    log = args.out and args.out.with_suffix(".jsonl")
    results = load(log)
    missing = [run for run in runs if run not in results]
    configs = {run: config_of(run) for run in missing}  # refuses impossible runs before any work
    fields = config_of(runs[0]).data
    names = (fields.source, fields.files, fields.tokenizer)
    data = load_data(*names, fields.heldout_fraction, text_field=fields.text_field)
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with tqdm.tqdm(total=len(missing) * args.steps, unit="step") as bar:
        for run in missing:
            bar.set_description(f"{run.variant} lr {run.learning_rate:g} seed {run.seed}")
            config = configs[run]
            sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
            batches = train_batches(data.train, seed=config.seed, **sizes)
            experiment, state, loss = train(config, data.tokenizer.vocab_size, batches, bar.update)
            results[run] = measure(experiment, state, data, loss, args.batches)
            tqdm.tqdm.write(table({run: results[run]}).splitlines()[-1])
            if log:
                with log.open("a") as file:
                    file.write(
                        json.dumps({"run": dataclasses.asdict(run), "result": dataclasses.asdict(results[run])}) + "\n"
                    )
    if log:  # another process may have added results meanwhile
        results = load(log)
    orders = ", ".join(f"{order}: {ngram_bits(data, order) * tokens_per_byte(data.heldout):.3f}" for order in range(3))
    text = table(results) + f"\n\nBits per byte given only the last n bytes, by counts, n = {orders}.\n"
    if log:
        args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
