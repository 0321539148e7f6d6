"""Analytic FLOPs of a training step, and each device's peak FLOP/s. MFU = FLOPs / (seconds * devices * peak)."""

from darkformer_jax.mixers import MIXERS
from darkformer_jax.model.spec import ModelSpec

# Start of a jax device's `device_kind` -> its dense bf16 FLOP/s. The first match counts.
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

    A multiply-add is 2 FLOPs. Rematerialisation, norms, RoPE, exponentials, the embedding look-up and the optimizer are
    not counted. Forward, per token, with V = vocab_size, D = embed_dim and F = mlp_dim:

        logits              2 D V              none for a classifier, whose head runs once per sequence
        per layer
          gated MLP         6 D F
          mixer             each states its own, in `MixerKind.flops`

    Args:
      sequence_length: L.
      tokens: positions per optimizer step, batch_size * sequence_length, padding included.
    """
    logits = 0 if spec.num_outputs else 2 * spec.embed_dim * spec.vocab_size
    return 3.0 * (layers_flops(spec, sequence_length) + logits) * tokens


def layers_flops(spec: ModelSpec, sequence_length: int) -> float:
    """Forward FLOPs per token of all layers, counted as in `train_step_flops`; remat = "full" needs them once more."""
    mlp = 6 * spec.embed_dim * spec.mlp_dim
    return sum(MIXERS[mixer.kind].flops(mixer, sequence_length) + mlp for mixer in spec.layers)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one jax device. None if the kind is unknown or has none (CPU); MFU is then not reported."""
    for kind, peak in _PEAK_FLOPS:
        if device_kind.startswith(kind):
            return peak
    return None
