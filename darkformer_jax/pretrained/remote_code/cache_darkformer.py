"""What each layer keeps of the tokens so far, of constant size in linear layers, and which tokens come after them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .attention_darkformer import Rows, State, take


class DarkformerCacheLayer(CacheLayerMixin):
    """What one layer keeps of the tokens so far; all tensors have the rows in front."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.state: State | None = None
        self.seen = 0  # tokens so far, padding included
        self.real: Tensor | None = None  # [B], without padding
        self.is_initialized = False

    def write(self, state: State, rows: Rows) -> None:
        """The state after a call."""
        self.state, self.is_initialized = state, True
        self.seen, self.real = self.seen + rows.length, rows.before + rows.count

    def _map(self, function: Any) -> None:
        if self.state is not None and self.real is not None:
            self.state = {name: function(x) for name, x in self.state.items()}
            self.real = function(self.real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """To the CPU's memory; the next call moves it back."""
        self._map(lambda x: x.to("cpu"))

    def prefetch(self) -> None:
        """Nothing: a call moves the state to the device of its tokens."""

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """(columns of the mask, its first column); `query` is the number of new tokens, or has an entry for each."""
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before 5.18

    def crop(self, *_: Any) -> None:
        """Refused: a state of constant size cannot forget its last tokens."""
        raise NotImplementedError("a DARKFormer cache cannot be cropped: its state has no single tokens")

    def lazy_initialization(self, *_: Any) -> None:
        """Refused, as `update`."""
        raise NotImplementedError("a DARKFormer cache is filled by the model alone")

    update = lazy_initialization  # type: ignore[assignment]


def own_layers(cache: Cache | None, num_layers: int) -> Any:
    """The cache with layers of ours in the place of empty ones, whatever made it."""
    if cache is None:
        cache = DynamicCache()
    if not hasattr(cache, "layers"):
        raise ValueError(f"a DARKFormer model cannot use a cache of {type(cache).__name__}: use DynamicCache")
    layers: list[Any] = cache.layers
    if layers and all(isinstance(layer, DarkformerCacheLayer) for layer in layers):
        if len(layers) != num_layers:
            raise ValueError(f"the cache has {len(layers)} layers, the model {num_layers}: another model filled it")
        return cache
    for layer in layers:
        name = type(layer).__name__
        if "Static" in name or "Quant" in name:
            raise ValueError(f"a DARKFormer model cannot use a cache of {name}: use DynamicCache, or pass no cache")
        if layer.is_initialized and layer.get_seq_length():
            raise ValueError(f"the cache holds tokens in a {name}: it was filled by another model")
    cache.layers = [DarkformerCacheLayer() for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    return cache


def rows_of(mask: Tensor | None, position_ids: Tensor | None, x: Tensor, cache: Any) -> tuple[Rows, Tensor | None]:
    """(the rows of x [B, n, width], the padding in front of each [B] or None where there is none).

    Raises ValueError for masks that are not 0 and 1 per token of all calls, or have holes; for position_ids that are
    not the count of real tokens, such as those of several documents in a row; and for a cache of other rows.
    """
    size, length = x.shape[:2]
    layer = None if cache is None else cache.layers[0]
    seen, before = (0, None) if layer is None else (layer.seen, layer.real)
    if before is not None and len(before) != size:
        raise ValueError(f"the cache holds {len(before)} rows, the new tokens have {size}")
    before = torch.zeros(size, dtype=torch.long, device=x.device) if before is None else before.to(x.device)
    if mask is None:
        if bool((before != seen).any()):
            raise ValueError("attention_mask is needed: the cache holds rows with padding")
        count, padding = torch.full_like(before, length), None
    else:
        if not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask is a {type(mask).__name__}; expected a tensor of 0 or 1 per token")
        if mask.dim() != 2 or tuple(mask.shape) != (size, seen + length):
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}; expected {[size, seen + length]}: 0 or 1 per token, "
                "with those in the cache"
            )
        mask = mask.to(x.device)
        real = mask != 0
        if bool((real & (mask != 1)).any()):
            raise ValueError(
                "attention_mask has numbers other than 0 and 1: several documents in a row and added masks are refused"
            )
        begins = real & ~F.pad(real, (1, 0))[:, :-1]
        if bool((begins.sum(1) > 1).any()):
            raise ValueError(
                "attention_mask has holes: a row may have padding before and after its tokens, not between"
            )
        if bool((real[:, :seen].sum(1) != before).any()):
            raise ValueError("attention_mask is not the one that the tokens in the cache had")
        count, padding = real[:, seen:].sum(1), None
        if bool((count < length).any()):
            padding = real[:, seen:].int().argmax(1)
    rows = Rows(before, count, length, list(zip(before.tolist(), count.tolist(), strict=True)))
    if position_ids is not None:
        own = position_ids.to(x.device).expand(size, -1)
        if padding is not None:
            own = take(own, torch.arange(length, device=x.device) + padding[:, None])
        if own.shape != rows.index.shape or bool(((own != rows.index) & rows.is_real).any()):
            raise ValueError(
                "position_ids are not the count of the real tokens of each row: several documents in one row, and "
                f"other positions, are not supported; the cache holds {seen} tokens"
            )
    return rows, padding
