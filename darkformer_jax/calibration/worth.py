"""What a converted model loses, and what its features are worth: the loss with and without them.

A smaller error of attention need not lower the model's loss: exact heads and a window may hold all that matters.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from darkformer_jax.calibration.choice import Choice
from darkformer_jax.calibration.exact_layers import candidates_of
from darkformer_jax.calibration.head_choice import HeadChoice, shares_of
from darkformer_jax.calibration.heads import MixedHeads
from darkformer_jax.calibration.hybrids import Quality
from darkformer_jax.calibration.kept import Remember, keep_nothing, recall
from darkformer_jax.calibration.passages import MEASURED
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.tasks.table import table_lines

_LITTLE = 0.001  # of the loss


class Worth(NamedTuple):
    """Three models on passages that nothing was chosen or fitted on.

    Attributes:
      exact: the model before.
      converted: the one that `calibrate` wrote.
      window_alone: the same without its features. None: it has no window or no features.
      passages: on how many.
    """

    exact: Quality
    converted: Quality
    window_alone: Quality | None
    passages: int

    def to_json(self) -> dict[str, Any]:
        """What calibration.json has of it."""
        models = {name: None if found is None else found._asdict() for name, found in self._named().items()}
        return models | {"passages": self.passages}

    def lines(self) -> list[str]:
        """As a table, and a word where the features could as well be left out."""
        title = f"{self.passages} test passage{'s' * (self.passages > 1)}"
        rows = [[title, "loss", "over exact", "copy"]]
        for name, found in self._named().items():
            if found is not None:
                over = f"{100 * (found.loss / self.exact.loss - 1):.2f}%"
                rows.append([name.replace("_", " "), f"{found.loss:.4f}", over, f"{found.copy:.3f}"])
        lines = table_lines(rows)
        if self.window_alone and self.window_alone.loss - self.converted.loss < _LITTLE * self.exact.loss:
            lines.append(
                f"in passages of this length the features lower the loss by less than {100 * _LITTLE:g}%; "
                "--mechanism=window_only makes the model without them"
            )
        return lines

    def _named(self) -> dict[str, Quality | None]:
        return {"exact": self.exact, "converted": self.converted, "window_alone": self.window_alone}


def measure_worth(
    exact: Transformer,
    replaced: Transformer,
    choice: Choice | HeadChoice | None,
    test: Int[np.ndarray, "n l"],
    tokenizer: Tokenizer,
    progress_bar: ProgressBar,
    remember: Remember = keep_nothing,
) -> Worth:
    """Measures the model that `choice` makes of the two; without one, `replaced`.

    `choice` was measured on the same passages, and so was the exact model.
    """
    test = test[:MEASURED]
    shares = _shares(exact, choice)
    candidates = candidates_of(exact.spec, replaced.spec)
    specs = [replaced.spec.layers[layer] for layer in candidates]
    has_features = any(spec.window and spec.kind != "window_only" for spec in specs)
    models = [] if choice else [(np.ones_like(shares), False), (shares, False)]
    models += [(shares, True)] if has_features else []
    found = [Quality(point.loss, point.copy) for point in (choice.points[-1], choice.point)] if choice else []
    with progress_bar(len(models), "model", "what it is worth") as bar:
        for number, (of_model, window_alone) in enumerate(models):
            heads = MixedHeads(exact, replaced, candidates, tokenizer, window_alone)
            measure = functools.partial(heads.measure, of_model, test)
            found.append(Quality(*recall(remember, f"worth_{number}", measure)))
            bar.update()
    return Worth(found[0], found[1], found[2] if has_features else None, len(test))


def _shares(exact: Transformer, choice: Choice | HeadChoice | None) -> Float[np.ndarray, "layers hkv"]:
    """1 where a head is exact."""
    if isinstance(choice, Choice):
        every = range(exact.spec.layers[0].num_kv_heads)
        return shares_of(itertools.product(choice.layers, every), exact.spec)
    return shares_of(choice.ranked[: choice.number] if choice else (), exact.spec)
