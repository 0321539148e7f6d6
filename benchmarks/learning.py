"""What each mechanism learns from the same data in the same number of steps, and by which learning rates.

    python -m benchmarks.learning --out=docs/results/learning
    python -m benchmarks.learning --only='dark;performer' --learning_rates=3e-3 --steps=100

Trains every variant at each learning rate from configs/ablation.py, keeps the best by held-out bits per byte, and
prints loss by position: how much a variant gains from far text is the difference between early and late positions.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from configs import ablation
from darkformer_jax.config import validate
from darkformer_jax.data import Data, heldout_batches, load_data, train_batches
from darkformer_jax.training.evaluation import put_batch
from darkformer_jax.training.setup import Experiment, tokens_per_byte
from darkformer_jax.training.step import make_state_init, make_train_step

QUARTERS = 4

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


@dataclasses.dataclass(frozen=True)
class Result:
    """One training run's outcome."""

    variant: str
    learning_rate: float
    seed: int
    train_loss: float  # mean of the last tenth of the steps, nats a token
    bits_per_byte: float  # held out
    accuracy: float
    by_position: list[float]  # held-out bits a token in each quarter of the row


def train(config: ml_collections.ConfigDict, data: Data, tick: Callable[[], object]) -> tuple[Experiment, Any, float]:
    """Trains to the last step without a workdir; returns the experiment, its state and the last losses' mean."""
    experiment = Experiment.of(config, data.tokenizer.vocab_size)
    state = jax.jit(make_state_init(experiment.network, experiment.optimizer, config.seed))()
    step = jax.jit(
        make_train_step(
            experiment.network,
            experiment.optimizer,
            experiment.schedule,
            accumulation_steps=1,
            z_loss=config.optimizer.z_loss,
            redraw_every=config.model.attention.redraw_every,
        ),
        donate_argnums=0,
    )
    batches = train_batches(
        data.train, seed=config.seed, batch_size=config.batch_size, sequence_length=config.sequence_length
    )
    losses = []
    for _ in range(config.num_steps):
        state, metrics = step(state, put_batch(next(batches), experiment.batch_sharding))
        losses.append(metrics["loss"])
        tick()
    last = jax.device_get(losses[-max(1, config.num_steps // 10) :])
    return experiment, state, float(np.mean(last))


def measure(experiment: Experiment, state: Any, data: Data, num_batches: int) -> tuple[float, float, list[float]]:
    """Held-out bits per byte, accuracy, and bits a token by quarter of the row."""
    config = experiment.config

    @jax.jit
    def sums(params: dict, projections: dict, batch: dict) -> tuple[jax.Array, ...]:
        logits, _ = experiment.network.bind(params, projections)(
            batch["inputs"], batch["segment_ids"], batch["positions"]
        )
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        nll = -jax.numpy.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
        correct = (logits.argmax(-1) == batch["targets"]).astype(nll.dtype)
        return tuple(x.sum(axis=0) for x in (nll * batch["weights"], correct * batch["weights"], batch["weights"]))

    totals = np.zeros((3, config.sequence_length))
    for batch in heldout_batches(
        data.heldout,
        batch_size=config.eval.batch_size,
        sequence_length=config.sequence_length,
        max_batches=num_batches,
    ):
        totals += np.stack(
            jax.device_get(sums(state.params, state.projections, put_batch(batch, experiment.batch_sharding)))
        )
    nll, correct, weight = totals
    quarters = [part.sum() for part in np.split(nll, QUARTERS)], [part.sum() for part in np.split(weight, QUARTERS)]
    by_position = [a / b / math.log(2) for a, b in zip(*quarters, strict=True)]
    bits = nll.sum() / weight.sum() / math.log(2) * tokens_per_byte(data.heldout)
    return float(bits), float(correct.sum() / weight.sum()), by_position


def run(variant: str, changes: dict[str, Any], args: argparse.Namespace, data: Data, bar: tqdm.tqdm) -> list[Result]:
    """All learning rates and seeds of one variant."""
    results = []
    for learning_rate in args.learning_rates:
        for seed in range(args.seeds):
            config = ablation.get_config()
            ratio = config.optimizer.geometry_learning_rate / config.optimizer.learning_rate
            config.update_from_flattened_dict(
                {
                    "num_steps": args.steps,
                    "seed": seed,
                    "optimizer.learning_rate": learning_rate,
                    "optimizer.geometry_learning_rate": learning_rate * ratio,
                    **changes,
                    **dict(args.set),
                }
            )
            validate(config)
            bar.set_description(f"{variant} lr {learning_rate:g} seed {seed}")
            experiment, state, loss = train(config, data, bar.update)
            results.append(Result(variant, learning_rate, seed, loss, *measure(experiment, state, data, args.batches)))
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown: for each variant its best learning rate (by the mean over seeds), and what it reached there."""
    lines = [
        "| variant | learning rate | bits per byte | accuracy | training loss | bits by quarter of the row |",
        "|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(result.variant for result in results):
        of_variant = [result for result in results if result.variant == variant]
        rates = sorted({result.learning_rate for result in of_variant})
        groups = {rate: [r for r in of_variant if r.learning_rate == rate] for rate in rates}
        rate, best = min(groups.items(), key=lambda item: float(np.mean([r.bits_per_byte for r in item[1]])))
        bits = np.array([r.bits_per_byte for r in best])
        spread = f" ± {bits.std(ddof=1):.3f}" if len(bits) > 1 else ""
        quarters = np.mean([r.by_position for r in best], axis=0)
        lines.append(
            f"| {variant} | {rate:g} | {bits.mean():.3f}{spread} | {100 * np.mean([r.accuracy for r in best]):.1f}% "
            f"| {np.mean([r.train_loss for r in best]):.3f} | {' '.join(f'{q:.3f}' for q in quarters)} |"
        )
    return "\n".join(lines)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    """Trains, prints the table, and writes it beside all results to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="variants, separated by a semicolon")
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
        "--set", type=_setting, action="append", default=[], help="a config field for all runs: model.qk_norm=true"
    )
    parser.add_argument("--out", type=Path, help="writes <out>.md and <out>.json")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(";")] if args.only else list(VARIANTS)
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"--only: {sorted(unknown)[0]!r} is unknown; allowed: {'; '.join(VARIANTS)}")
    config = ablation.get_config()
    data = load_data(config.data.source, config.data.files, config.data.tokenizer, config.data.heldout_fraction)
    results: list[Result] = []
    with tqdm.tqdm(total=len(names) * len(args.learning_rates) * args.seeds * args.steps, unit="step") as bar:
        for name in names:
            results += run(name, VARIANTS[name], args, data, bar)
            tqdm.tqdm.write(table(results[-len(args.learning_rates) * args.seeds :]).splitlines()[-1])
    text = table(results)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(text + "\n")
        args.out.with_suffix(".json").write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
