"""Analytic FLOPs of a training step, and the devices' peak: model FLOP/s utilisation (MFU) is their ratio over time."""

from collections.abc import Sequence

# Dense bf16 FLOP/s of one jax device, by what its `device_kind` starts with; the first match counts.
_PEAK_FLOPS = (
    ("TPU v4 lite", None),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p; its device_kind is "TPU v5" or "TPU v5p"
    ("TPU v6", 918e12),  # "TPU v6 lite" and "TPU v6e"
    ("TPU7x", 2307e12 / 2),  # a chip is two jax devices
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
)


def train_step_flops(
    *,
    tokens: int,
    sequence_length: int,
    attention_kinds: Sequence[str],
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    vocab_size: int,
    num_features: int,
    chunk_size: int,
    window: int,
    num_sinks: int,
    local_window: int = 0,
) -> float:
    """FLOPs that the model's mathematics needs for one optimizer step: 3 x forward (backward = 2 x forward).

    A multiply-add is 2 FLOPs. What rematerialisation computes again is not counted, nor are norms, RoPE, exponentials,
    the embedding's look-up and the optimizer. Forward, a token, with D = embed_dim, H = num_heads, G = num_kv_heads,
    d = head_dim, m = num_features:

        logits              2 D V
        a layer
          gated MLP         6 D F
          projections       4 D H d (q, o) + 4 D G d (k, v); `random` and `constant` look at neither q nor k: half of it
          attention
            softmax         4 H d n            scores 2 d and values 2 d for each of n visible keys
            softmax_local   4 H d n            n = the keys of the last local_window tokens
            window_only     4 H d n            n = the keys seen exactly
            performer, dark, lfk
              geometry      2 d^2 (H + G)      M x, dark only
              features      2 m d (H + G)
              state         2 m d G            update, S += phi(k) v
              read          2 m d H            phi(q) S
              local         (2 m + 2 d) H n    own chunk through features (window = 0), or
                            4 H d n            exactly: own chunk, window and sinks
            random          2 H d n            fixed weights times values
            constant        0                  a running mean

    n is the mean over positions of one whole sequence: (L + 1) / 2 for softmax and random. A boundary between packed
    documents hides keys; that is not counted.

    Args:
      tokens: positions an optimizer step, batch_size * sequence_length, padding included.
      sequence_length: L.
      attention_kinds: the mechanism of each layer.
      window, num_sinks, chunk_size, local_window: tokens, as in the config.

    Raises ValueError for a mechanism it does not know, and for `softmax_local` without a local_window.
    """
    query_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    projections = 4 * embed_dim * (query_width + kv_width)
    all_visible = (sequence_length + 1) / 2
    seen_exactly = mean_exact_keys(sequence_length, chunk_size, window, num_sinks)
    features = 2 * num_features * (query_width + kv_width)
    state = 2 * num_features * (query_width + kv_width)
    geometry = 2 * head_dim * (query_width + kv_width)
    local = 4 * query_width if window else 2 * num_heads * (num_features + head_dim)
    linear = projections + features + state + local * seen_exactly
    layer = {
        "softmax": projections + 4 * query_width * all_visible,
        "softmax_local": projections + 4 * query_width * mean_local_keys(sequence_length, local_window),
        "window_only": projections + 4 * query_width * seen_exactly,
        "performer": linear,
        "lfk": linear,
        "dark": linear + geometry,
        "random": projections / 2 + 2 * query_width * all_visible,
        "constant": projections / 2,
    }
    if unknown := set(attention_kinds) - layer.keys():
        raise ValueError(f"no FLOP count for attention {sorted(unknown)[0]!r}; known: {', '.join(layer)}")
    if "softmax_local" in attention_kinds and not local_window:
        raise ValueError("attention 'softmax_local' needs local_window > 0")
    mlp = 6 * embed_dim * mlp_dim
    forward = sum(layer[kind] + mlp for kind in attention_kinds) + 2 * embed_dim * vocab_size
    return 3.0 * forward * tokens


def mean_local_keys(sequence_length: int, local_window: int) -> float:
    """Keys among a query's last `local_window` tokens, its own included, mean over the positions of one sequence."""
    window = min(local_window, sequence_length)
    return window * (2 * sequence_length - window + 1) / (2 * sequence_length)


def mean_exact_keys(sequence_length: int, chunk_size: int, window: int, num_sinks: int) -> float:
    """Keys that a query meets outside the state, mean over the positions of one sequence.

    Its own chunk up to itself, the `window` tokens before the chunk, and the first `num_sinks` tokens, each key once.
    """
    total = 0
    for start in range(0, sequence_length, chunk_size):
        length = min(chunk_size, sequence_length - start)
        before = min(window, start)
        sinks = min(num_sinks, start - before)
        total += length * (length + 1) // 2 + length * (before + sinks)
    return total / sequence_length


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one jax device; None where the kind is not known or has none (CPU): MFU is not reported."""
    for kind, peak in _PEAK_FLOPS:
        if device_kind.startswith(kind):
            return peak
    return None
