"""Text from a model: prefill with the chunked form, then one token at a time from the state."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.ops.keys import key_of_seed
from darkformer_jax.ops.state import NEG

# Below this temperature no token but the likeliest is drawn, and the logits would leave float32's range.
_COLDEST = 1e-20

# Tokens of a prompt that are read at a time: exact attention holds as many rows of scores, each as long as the prompt.
PIECE = 1024


def filter_logits(
    logits: Float[Array, "b vocab"], *, temperature: float, top_k: int, top_p: float
) -> Float[Array, "b vocab"]:
    """Logits / temperature, very negative outside the `top_k` largest and the smallest set of probability `top_p`.

    top_k = 0 and top_p = 1 keep all. Ties at the border are kept. temperature >= 1e-20.
    """
    logits = logits / temperature
    if top_k:
        smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, NEG)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        stays = (before < top_p).at[:, 0].set(True)  # also where top_p is 0 in float32
        smallest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, NEG)
    return logits


class Sampler:
    """Continues batches of prompts. Memory and time per token do not grow with the length, except for KV caches.

    Args:
      network, params, projections: the model.
      temperature: 0 takes the most likely token, and so does all below 1e-20.
      top_k, top_p: see `filter_logits`.
      seed: every draw is a function of it, the prompt's index in the batch and the token's place.
      vocab_size: the tokenizer's, if the model's table is larger. Ids from it on have no meaning and are never drawn.
    """

    def __init__(
        self,
        network: Network,
        params: dict,
        projections: dict,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"temperature = {temperature}, top_k = {top_k}, top_p = {top_p}: "
                "temperature and top_k must be finite and at least 0, top_p in (0, 1]"
            )
        self._arrays = (params, projections)
        self._seed = seed

        def choose(logits: Array, key: Array) -> Array:
            logits = logits[:, :vocab_size]
            if temperature < _COLDEST:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            kept = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
            return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

        def prefill(
            params: dict, projections: dict, tokens: Array, lengths: Array, key: Array, room: int
        ) -> tuple[Array, Any]:
            model = network.bind(params, projections)
            return _prefill(model, tokens, lengths, room, choose, key)

        def step(
            params: dict, projections: dict, token: Array, position: Array, state: Any, key: Array
        ) -> tuple[Array, Any]:
            model = network.bind(params, projections)
            ones = jnp.ones((token.shape[0], 1), jnp.int32)
            hidden, state = model.hidden(token[:, None], ones, position[:, None], state)
            return choose(model.logits(hidden[:, 0]), key), state

        self._prefill = jax.jit(prefill, static_argnames="room")
        self._step = jax.jit(step, donate_argnums=4)

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the next token of every prompt, int32 [b], `max_new_tokens` times.

        Args:
          prompts: token ids, at least one per prompt; see `encode_prompt`.
          seed: in place of the sampler's; another one for each batch makes the draws of several batches independent.
        """
        if not prompts or not all(prompts):
            raise UserError("there is no prompt, or one has no tokens")
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        # Padded to a power of two, so that prompts of all lengths share a few compiled programs.
        padded = max(16, 1 << int(lengths.max() - 1).bit_length())
        tokens = np.zeros((len(prompts), padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        root = key_of_seed(self._seed if seed is None else seed)
        room = padded + max_new_tokens
        token, state = self._prefill(*self._arrays, tokens, lengths, jax.random.fold_in(root, 0), room=room)
        yield np.asarray(token)
        for place in range(1, max_new_tokens):
            key = jax.random.fold_in(root, place)
            token, state = self._step(*self._arrays, token, lengths + (place - 1), state, key)
            yield np.asarray(token)


def _prefill(
    model: Transformer, tokens: Int[Array, "b n"], lengths: Int[Array, "b"], room: int, choose: Any, key: Array
) -> tuple[Array, Any]:
    """(the first new token of each prompt, the state after the prompts). The prompts are padded at the end."""
    batch, length = tokens.shape
    size = min(PIECE, length)

    def read(start: Int[Array, ""], state: Any) -> tuple[Array, Any]:
        """The output at each prompt's last token, as far as it is in this piece, and the state after it."""
        index = start + jnp.arange(size)
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        segment_ids = (index[None] < lengths[:, None]).astype(jnp.int32)
        hidden, state = model.hidden(piece, segment_ids, jnp.broadcast_to(index[None], piece.shape), state)
        place = jnp.clip(lengths - 1 - start, 0, size - 1)
        return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0], state

    def read_next(carry: tuple[Array, Any], start: Int[Array, ""]) -> tuple[tuple[Array, Any], None]:
        last, state = carry
        found, state = read(start, state)
        return (jnp.where((lengths > start)[:, None], found, last), state), None

    last, state = read(jnp.int32(0), model.init_state(batch, room))
    if length > size:
        (last, state), _ = jax.lax.scan(read_next, (last, state), jnp.arange(size, length, size, dtype=jnp.int32))
    return choose(model.logits(last), key), state


def continue_prompts(
    sampler: Sampler, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """The new tokens of each prompt, before the first one that is in `ends`."""
    new: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for tokens in sampler.stream(prompts, max_new_tokens):
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                new[row].append(token)
        if not any(running):
            break
    return new
