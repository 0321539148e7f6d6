"""Decoding speed and cache size of exported models in PyTorch, by context: linear attention beside exact attention.

    darkformer convert --workdir=runs/smollm2 --export_hf=exported/exact
    darkformer convert --workdir=runs/smollm2-dark --export_hf=exported/dark
    python -m benchmarks.exported --exact=exported/exact --linear=exported/dark --out=docs/results/exported.json

transformers loads both in float32 and runs the code that is in a directory. At each context both read the same random
tokens and then decode greedily in turns, with one step of the model per token. The first turn of each warms up and is
not counted. The cache's size is that of its tensors after reading. Needs torch and transformers:
bash launch/install.sh test.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tqdm

PIECE = 512  # tokens read by one call: exact attention's scores of all at once would not fit into memory
Figures = dict[str, dict[str, Any]]  # of `exact` and `linear`: `cache_bytes`, and of every turn what `RATES` names
RATES = ("tokens_per_second", "cpu_ms_per_token")  # the second is that of all threads, and is fair on a busy machine


class Reader:
    """A model, what it keeps of the tokens that it has read, and the token that it would write next."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.next: Any = None

    def read(self, tokens: Any) -> None:
        """Reads tokens [1, n] in pieces."""
        import torch

        with torch.no_grad():
            for piece in tokens.split(PIECE, 1):
                out = self.model(piece, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode(self, count: int) -> tuple[float, float]:
        """`RATES` of the next `count` tokens."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.read(self.next)
        return count / (time.perf_counter() - wall), 1000 * (time.process_time() - cpu) / count

    def cache_bytes(self) -> int:
        """The size of all tensors of the cache."""
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in _tensors(vars(layer)))


def _tensors(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif hasattr(tree, "element_size"):
        yield tree


def measure(models: Mapping[str, Any], context: int, new_tokens: int, turns: int) -> Figures:
    """The figures of each model after `context` tokens."""
    import torch

    vocabulary = min(model.config.vocab_size for model in models.values())
    tokens = torch.as_tensor(np.random.default_rng(0).integers(vocabulary, size=(1, context)))
    readers = {name: Reader(model) for name, model in models.items()}
    figures: Figures = {}
    for name, reader in readers.items():
        reader.read(tokens)
        figures[name] = {"cache_bytes": reader.cache_bytes()} | {rate: [] for rate in RATES}
        reader.decode(new_tokens)  # warms up
    for _ in range(turns):
        for name, reader in readers.items():
            for rate, value in zip(RATES, reader.decode(new_tokens), strict=True):
                figures[name][rate].append(value)
    return figures


def table(results: Mapping[int, Figures]) -> str:
    """Medians by context; a ratio is that of linear to exact attention."""
    lines = ["| context | attention | tokens/s | CPU ms per token | cache MB |", "|---|---|---|---|---|"]
    for context, figures in results.items():
        medians = {
            name: [*(statistics.median(of[rate]) for rate in RATES), of["cache_bytes"] / 1e6]
            for name, of in figures.items()
        }
        for name, values in medians.items():
            lines.append(f"| {context:,} | {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
        ratios = (linear / exact for linear, exact in zip(medians["linear"], medians["exact"], strict=True))
        lines.append(f"| {context:,} | ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", required=True, help="export of a model with exact attention")
    parser.add_argument("--linear", required=True, help="export of a model with linear attention; its code is run")
    parser.add_argument("--contexts", default="256,1500,8000", help="tokens before decoding (default: 256,1500,8000)")
    parser.add_argument("--new_tokens", type=int, default=16, help="per turn (default: 16)")
    parser.add_argument("--turns", type=int, default=5, help="of each, after one that warms up (default: 5)")
    parser.add_argument("--out", type=Path, help="writes every turn to this JSON file")
    args = parser.parse_args(argv)
    import torch
    from transformers import AutoModelForCausalLM

    models = {
        name: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
        for name, directory in (("exact", args.exact), ("linear", args.linear))
    }
    contexts = [int(context) for context in args.contexts.split(",")]
    results = {}
    for context in tqdm.tqdm(contexts, unit="context"):
        results[context] = measure(models, context, args.new_tokens, args.turns)
        if args.out:  # after each context, because a long one may take many minutes
            arguments = {"contexts": contexts, "new_tokens": args.new_tokens, "turns": args.turns}
            args.out.write_text(json.dumps({"arguments": arguments, "results": results}) + "\n")
    print(table(results))
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")


if __name__ == "__main__":
    main()
