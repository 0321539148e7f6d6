"""Our attention against packages that others wrote, from the same arrays: outputs and gradients.

    pip install -c constraints/py3.11.txt ".[peers]"
    python -m benchmarks.parity

Batch 2, 2 heads of 64, 200 tokens, 64 features, float32, on a CPU; inputs are N(0, 1). A difference is that of the
largest entry, over the largest entry there. performer-pytorch adds 1e-4 to every feature and 1e-6 to the normaliser,
which is left out here. Of maps that no package has, only the sums over tokens are its code: their formula is applied in
PyTorch. Peers in transformers are compared in tests/mixers.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from benchmarks.zoo import FEATURES, HEAD_DIM, HEADS, spec_of
from darkformer_jax import dark_attention, draw_projections, linear_attention
from darkformer_jax.mixers.linformer import Linformer
from darkformer_jax.ops.features import log_elu_plus_one, log_two_sided
from darkformer_jax.tasks.table import table_lines

BATCH, LENGTH, DIM = 2, 200, HEAD_DIM


class Pair(NamedTuple):
    """A mechanism twice.

    Attributes:
      package: whose the second is.
      ours: (q, k, v[, learned arrays]) -> out, [b, n, h, d].
      theirs: the same on torch's tensors, with the heads in front of the tokens.
      learned: arrays beside q, k and v that have gradients.
    """

    package: str
    ours: Callable[..., Array]
    theirs: Callable[..., Any]
    learned: tuple[np.ndarray, ...] = ()


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def performer(causal: bool) -> Pair:
    """FAVOR+ with one draw of projections for all heads."""
    import torch
    from performer_pytorch import performer_pytorch as package

    w = np.array(draw_projections(jax.random.key(0), FEATURES, DIM, num_heads=1))[0]

    def theirs(q: Any, k: Any, v: Any) -> Any:
        features = (
            package.softmax_kernel(x, projection_matrix=torch.from_numpy(w), is_query=is_query, eps=0)
            for x, is_query in ((q, True), (k, False))
        )
        if not causal:
            return package.linear_attention(*features, v)
        return package.causal_linear_attention_noncuda(*features, v, eps=0)

    projections = jnp.asarray(np.tile(w, (HEADS, 1, 1)))
    return Pair(
        "performer-pytorch", lambda q, k, v: dark_attention(q, k, v, projections=projections, causal=causal), theirs
    )


def dark(causal: bool) -> Pair:
    """Features of M q and M k, with the package's own draw of projections."""
    import torch
    from darkformer_pytorch import DarkformerKernelAttention

    module = DarkformerKernelAttention(DIM, HEADS, num_features=FEATURES, causal=causal, projection_seed=0).eval()
    w = module.random_features.projection_matrix.detach().numpy()
    w = jnp.asarray(np.broadcast_to(w, (HEADS, FEATURES, DIM)))
    geometry = np.eye(DIM, dtype=np.float32) + 0.1 * drawn(HEADS, DIM, DIM, seed=3)

    def theirs(q: Any, k: Any, v: Any, geometry: Any) -> Any:
        return torch.func.functional_call(module, {"random_features.geometry": geometry}, (q, k, v))

    def ours(q: Array, k: Array, v: Array, geometry: Array) -> Array:
        return dark_attention(q, k, v, projections=w, geometry=geometry, causal=causal)

    return Pair("darkformer-pytorch", ours, theirs, (geometry,))


def by_formula(log_features: Callable[..., Array], formula: Callable[[Any], Any]) -> Pair:
    """A feature map that the package does not have, by its formula."""
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return causal_linear_attention_noncuda(formula(q), formula(k), v, eps=0)

    return Pair("performer-pytorch's sums", lambda q, k, v: linear_attention(q, k, v, feature_map=log_features), theirs)


def linear_transformer() -> Pair:
    """elu(x) + 1."""
    import torch

    return by_formula(log_elu_plus_one, lambda x: torch.nn.functional.elu(x) + 1)


def hedgehog() -> Pair:
    """exp [x, -x], before the learned map."""
    import torch

    return by_formula(log_two_sided, lambda x: torch.exp(torch.cat([x, -x], dim=-1)))


def linformer() -> Pair:
    """Without the projections to q, k and v."""
    import torch
    from linformer import LinformerSelfAttention

    module = LinformerSelfAttention(DIM * HEADS, LENGTH, k=FEATURES, heads=HEADS)
    one, none = torch.eye(DIM * HEADS), torch.zeros(DIM * HEADS, DIM * HEADS)
    fixed = {"to_q.weight": one, "to_k.weight": torch.cat([one, none], dim=1)}
    fixed |= {"to_v.weight": torch.cat([none, one], dim=1), "to_out.weight": one, "to_out.bias": none[0]}
    graphdef, arrays = nnx.split(Linformer(spec_of("linformer", LENGTH), 0))
    places = jnp.zeros((BATCH, LENGTH), jnp.int32)
    learned = tuple(drawn(LENGTH, FEATURES, seed=seed) / math.sqrt(FEATURES) for seed in (4, 5))

    def theirs(q: Any, k: Any, v: Any, E: Any, F: Any) -> Any:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        keys_and_values = {"context": torch.cat([k, v], dim=-1)}
        out = torch.func.functional_call(module, fixed | {"proj_k": E, "proj_v": F}, (q,), keys_and_values)
        return out.unflatten(2, (HEADS, DIM)).transpose(1, 2)

    def ours(q: Array, k: Array, v: Array, E: Array, F: Array) -> Array:
        nnx.replace_by_pure_dict(arrays, {"E": E, "F": F})
        return nnx.merge(graphdef, arrays)(q, k, v, segment_ids=places + 1, positions=places)[0]

    return Pair("linformer", ours, theirs, learned)


PAIRS: dict[str, tuple[str, Callable[[], Pair]]] = {
    "performer": ("performer_pytorch", lambda: performer(True)),
    "performer, bidirectional": ("performer_pytorch", lambda: performer(False)),
    "dark": ("darkformer_pytorch", lambda: dark(True)),
    "dark, bidirectional": ("darkformer_pytorch", lambda: dark(False)),
    "linear_transformer": ("performer_pytorch", linear_transformer),
    "hedgehog's map": ("performer_pytorch", hedgehog),
    "linformer": ("linformer", linformer),
}


def differences(pair: Pair) -> tuple[float, float]:
    """(of the outputs, the largest of the gradients of q, k, v and what is learned)."""
    import torch

    q, k, v, cotangent = (drawn(BATCH, LENGTH, HEADS, DIM, seed=seed) for seed in (10, 11, 12, 13))
    out, pull = jax.vjp(pair.ours, *map(jnp.asarray, (q, k, v, *pair.learned)))
    gradients = pull(jnp.asarray(cotangent))
    in_front = [torch.from_numpy(np.swapaxes(x, 1, 2).copy()).requires_grad_() for x in (q, k, v)]
    learned = [torch.from_numpy(x).requires_grad_() for x in pair.learned]
    their_out = pair.theirs(*in_front, *learned)
    wanted = torch.autograd.grad(
        their_out, [*in_front, *learned], torch.from_numpy(np.swapaxes(cotangent, 1, 2).copy())
    )
    back = lambda x: np.swapaxes(x.detach().numpy(), 1, 2)
    theirs = [*map(back, wanted[:3]), *(x.numpy() for x in wanted[3:])]
    return relative(out, back(their_out)), max(map(relative, gradients, theirs))


def relative(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference over the largest number."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table. What is not installed is said."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "float32")
    rows = [["mechanism", "package", "outputs", "gradients"]]
    for name, (module, build) in PAIRS.items():
        if importlib.util.find_spec(module) is None:
            rows.append([name, f"{module.replace('_', '-')} is not installed", "", ""])
            continue
        pair = build()
        rows.append([name, pair.package, *(f"{difference:.1e}" for difference in differences(pair))])
    print("\n".join(table_lines(rows)))


if __name__ == "__main__":
    main()
