"""`model.attention.backend`: which program computes the attention of a layer with features."""

from typing import Any, Literal

from jax.sharding import Mesh

from darkformer_jax.distributed.sharding import context_size, tensor_size
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.lowering import TPU_TILE

Backend = Literal["auto", "scan", "parallel", "pallas"]
_NAMED = "model.attention.backend = 'pallas'"


def backend_of(spec: MixerSpec, state: Any) -> Literal["scan", "parallel", "pallas"]:
    """What computes a call. `auto` is the scan: no GPU has run `parallel`, and no TPU the kernel.

    In the kernel's place the scan computes calls with a state: prefill and decoding, which a training run needs for
    its samples.
    """
    if spec.backend == "auto" or (spec.backend == "pallas" and state is not None):
        return "scan"
    return spec.backend  # type: ignore[return-value]


def check_backend(spec: MixerSpec) -> None:
    """Raises UserError where the backend does not cover the layer."""
    if spec.backend in ("parallel", "pallas") and not spec.causal:
        raise UserError(
            f"model.attention.backend = {spec.backend!r} with model.causal = False; allowed: model.causal = True, or "
            "backend = 'scan'"
        )
    if spec.backend != "pallas":
        return
    window = f"with model.attention.window = {spec.window}"
    for missing, what, allowed in (
        (
            spec.window and spec.chunk_size % TPU_TILE,
            f"{window}: chunk_size = {spec.chunk_size}",
            f"a multiple of {TPU_TILE}",
        ),
        (spec.window and (spec.has_decay or spec.has_alibi), f"{window} and a decay", "model.attention.window = 0"),
    ):
        if missing:
            raise UserError(f"{_NAMED} {what}; allowed: {allowed}, or backend = 'scan'")


def check_backend_on(spec: MixerSpec, mesh: Mesh) -> None:
    """Raises UserError where the devices lack the kernel, or share a sequence or a key/value head."""
    if spec.backend != "pallas":
        return
    platform = mesh.devices.flat[0].platform
    if platform != "tpu":
        raise UserError(f"{_NAMED} on a {platform}: the kernel is for TPUs; allowed: 'auto', 'scan', 'parallel'")
    if context_size(mesh) > 1:
        raise UserError(f"{_NAMED} with mesh.context = {context_size(mesh)}; allowed: 1, or backend = 'scan'")
    heads, ways = spec.num_kv_heads - spec.exact_kv_heads, tensor_size(mesh)
    if heads % ways:
        raise UserError(
            f"{_NAMED} with mesh.tensor = {ways}: it splits {heads} key/value heads with features; allowed: a divisor "
            "of them, or backend = 'scan'"
        )
