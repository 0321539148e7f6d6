"""Analytic FLOPs of a training step, and the devices' peak: model FLOP/s utilisation (MFU) is their ratio over time."""

from darkformer_jax.mixers import MIXERS
from darkformer_jax.model.spec import ModelSpec

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


def train_step_flops(spec: ModelSpec, sequence_length: int, tokens: int) -> float:
    """FLOPs that the model's mathematics needs for one optimizer step: 3 x forward (backward = 2 x forward).

    A multiply-add is 2 FLOPs. What rematerialisation computes again is not counted, nor are norms, RoPE, exponentials,
    the embedding's look-up and the optimizer. Forward, per token, with D = embed_dim, H = num_heads, G = num_kv_heads,
    d = head_dim, m = num_features:

        logits              2 D V              what a classifier does once per sequence is not counted
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
            linear_transformer                 as performer with m = d, without its features
            random          2 H d n            fixed weights times values
            constant        0                  a running mean

    n is the mean over positions of one whole sequence: (L + 1) / 2 for softmax and random. A boundary between packed
    documents hides keys; that is not counted. Each mixer states its own part, `Mixer.flops`.

    Args:
      sequence_length: L.
      tokens: positions per optimizer step, batch_size * sequence_length, padding included.
    """
    mlp = 6 * spec.embed_dim * spec.mlp_dim
    logits = 0 if spec.num_outputs else 2 * spec.embed_dim * spec.vocab_size
    layers = sum(MIXERS[mixer.kind].flops(mixer, sequence_length) + mlp for mixer in spec.layers)
    return 3.0 * (layers + logits) * tokens


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one jax device; None where the kind is not known or has none (CPU): MFU is not reported."""
    for kind, peak in _PEAK_FLOPS:
        if device_kind.startswith(kind):
            return peak
    return None
