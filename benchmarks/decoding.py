"""Tokens per second of greedy decoding: ours and transformers', from the same weights on the same machine.

    python -m benchmarks.decoding --workdir=runs/smollm2 --out=docs/results/decoding.json

The workdir's model is exported and loaded by transformers (PyTorch, float32); both continue the same prompt. Each is
warmed up, then they take turns. A turn's time is that of the tokens after the first. The tokens must be the same, or
the run stops. Needs torch and transformers: bash launch/install.sh test.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tqdm

from darkformer_jax.model.sampling import Sampler
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir

Decode = Callable[[list[int], int], tuple[list[int], float]]  # (new tokens, seconds of those after the first)


def ours(workdir: str) -> Decode:
    """The sampler that `generate` uses."""
    model = load_model(Workdir(workdir))
    sampler = Sampler(model.network, model.params, model.projections, temperature=0)

    def decode(prompt: list[int], count: int) -> tuple[list[int], float]:
        tokens, started = [], 0.0
        for token in sampler.stream([prompt], count):
            tokens.append(int(token[0]))
            started = started or time.perf_counter()
        return tokens, time.perf_counter() - started

    return decode


def theirs(workdir: str) -> Decode:
    """`generate` of transformers, on an export of the workdir."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        directory = os.path.join(scratch, "export")
        export_workdir(Workdir(workdir), directory)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(directory, dtype=torch.float32, trust_remote_code=True).eval()

    class Clock(transformers.StoppingCriteria):
        """Takes the time of the first new token; never stops."""

        first = 0.0

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            self.first = self.first or time.perf_counter()
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    def decode(prompt: list[int], count: int) -> tuple[list[int], float]:
        clock = Clock()
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return out[0, len(prompt) :].tolist(), time.perf_counter() - clock.first

    return decode


def main() -> None:
    """Prints both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="workdir of a model that computes in float32 (model.dtype)")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--new_tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--out", type=Path, help="writes every turn to this JSON file")
    args = parser.parse_args()
    decoders = {"darkformer_jax": ours(args.workdir), "transformers": theirs(args.workdir)}
    prompt = np.random.default_rng(0).integers(10, 1000, args.prompt_tokens).tolist()
    written = {name: decode(prompt, args.new_tokens)[0] for name, decode in decoders.items()}  # warms up
    if written["darkformer_jax"] != written["transformers"]:
        raise SystemExit("error: the two wrote different tokens")
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in tqdm.trange(args.repeats, unit="turn"):
        for name, decode in decoders.items():
            speeds[name].append((args.new_tokens - 1) / decode(prompt, args.new_tokens)[1])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        print(f"{name:15s} {median:6.1f} tokens/s ({min(speeds[name]):.1f} to {max(speeds[name]):.1f})")
    print(f"ratio           {medians['darkformer_jax'] / medians['transformers']:6.2f}")
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": None}, "tokens_per_second": speeds}) + "\n")


if __name__ == "__main__":
    main()
