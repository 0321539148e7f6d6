"""The README.md of an exported model with feature mechanisms."""

import ml_collections

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.pretrained.families.family import FULL, LOCAL, kinds_of

_TEXT = """# An exported DARKFormer

Attention, layer by layer: {kinds}.

Plain `transformers` does not know feature attention. It reads `config.json` and the weights beside it as a
`{architecture}`, that is the same transformer with **exact softmax attention in every layer**:

* it loads without missing or unexpected keys, and its embeddings, projections, MLPs and norms are this model's;
* its logits are **not** this model's: they are what these weights give with softmax attention, with its quadratic cost
  and growing cache. Use it as a starting point, not to judge this model.

What makes the model what it is stands in two more files, which transformers ignores:

* `darkformer.json`: every field of the model, mechanism and window included, and the seed;
* `darkformer.safetensors`: M (the learned geometry), learned and random projections, under their names here.

With darkformer_jax both are read back, bit for bit:

    python -m darkformer_jax.convert --source=<this directory> --workdir=runs/copy
    python -m darkformer_jax.generate --workdir=runs/copy --prompt="..."
"""


def mechanism_readme(config: ml_collections.ConfigDict, architecture: str) -> str:
    """What plain transformers can and cannot do with the export."""
    kinds = kinds_of(dict(flat_fields(config.model.to_dict())))
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    exact = {FULL: " (exact)", LOCAL: " (exact)"}
    shown = ", ".join(f"{count} x {kind}{exact.get(kind, '')}" for kind, count in counts.items())
    return _TEXT.format(kinds=shown, architecture=architecture)
