"""Attention of a DARKFormer model in PyTorch, token for token what darkformer_jax computes.

Linear attention keeps of the tokens that are no longer seen one by one, per key/value head and feature i,

    c_i = max_j l_i(k_j),   z_i = sum_j exp(l_i(k_j) - c_i),   S_i = sum_j exp(l_i(k_j) - c_i) v_j,

with the log features l_i(x) of keys. A query reads a_i = l_i(q) + c_i of them, and s_j = log kernel(q, k_j) of each key
j that it sees alone. With r the largest of all,

    out = [ sum_i exp(a_i - r) S_i + sum_j exp(s_j - r) v_j ] / [ sum_i exp(a_i - r) z_i + sum_j exp(s_j - r) ].

Without a window every key is seen through features. With one, the query's own chunk, the window before it and the first
tokens (sinks) are seen exactly. Chunks are counted from the first real token of a row.

Shapes: B rows, n new tokens, H query heads in G groups that share a key/value head, d head size, m features.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

NEG = -1e30  # "minus infinity" that can be subtracted from itself
HEADROOM, LOG_FLOOR = 36.0, -45.0  # of `feature_scores`
DECAY_FLOOR = -1000.0  # of one token's log decay

EXACT = ("softmax", "softmax_local")
_OF_EXACT = "exact_"  # begins the names of what exact heads keep, beside the state of the others
RANDOM_FEATURES = ("performer", "dark", "lfk")
KINDS = (*RANDOM_FEATURES, "window_only", "linear_transformer", "hedgehog", "cosformer")
State = dict[str, Tensor]


@dataclass
class Rows:
    """The new tokens of a batch. In each row the real ones come first; what follows is padding, which nothing sees."""

    before: Tensor  # [B] real tokens of earlier calls
    count: Tensor  # [B] real tokens now
    length: int  # n
    on_host: list[tuple[int, int]]  # (before, count) of each row

    def to(self, device: torch.device) -> "Rows":
        """For a layer on another device."""
        return Rows(self.before.to(device), self.count.to(device), self.length, self.on_host)

    @property
    def index(self) -> Tensor:
        """[B, n]: the place of each token among the real ones of its row."""
        return self.before[:, None] + torch.arange(self.length, device=self.before.device)

    @property
    def is_real(self) -> Tensor:
        """[B, n]."""
        return torch.arange(self.length, device=self.count.device) < self.count[:, None]


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x [B, t, ...] and index [B, i]; places beyond either end are those at the end."""
    index = index.to(x.device).clamp(0, x.shape[1] - 1)
    return x.gather(1, index.reshape(*index.shape, *(1,) * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def product(equation: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """einsum of operands that are rounded to `dtype`, in float32. Features and their sums are too large for float16."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return torch.einsum(equation, a.to(dtype).float(), b.to(dtype).float())


class RunningSum:
    """Sums of log decays [B, t, G] along t. Whole numbers are summed apart, so that strong decays cost no digits."""

    def __init__(self, decays: Tensor) -> None:
        whole = decays.detach().round()
        self.whole, self.rest = whole.cumsum(1), (decays - whole).cumsum(1)

    def between(self, queries: Tensor) -> Tensor:
        """[B, q, t, G]: the decay from each key to the queries at places [B, q]."""
        whole, rest = take(self.whole, queries), take(self.rest, queries)
        return (whole[:, :, None] - self.whole[:, None]) + (rest[:, :, None] - self.rest[:, None])

    def since_start(self, queries: Tensor) -> Tensor:
        """[B, q, G]: the decay from before the first key to the queries."""
        return take(self.whole, queries) + take(self.rest, queries)


class Coordinates(nn.Module):
    """q' = A q and k' = B (k - b), with A^T B = I: the same attention, but features that vary less.

    Where q and k have only the last key/value heads, so do these maps.
    """

    query_map: Tensor
    key_map: Tensor
    key_center: Tensor

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        empty = torch.empty(num_kv_heads, head_dim, head_dim, dtype=torch.float32)
        self.register_buffer("query_map", empty)
        self.register_buffer("key_map", empty.clone())
        self.register_buffer("key_center", empty[..., 0].clone())

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(q' [B, n, H, d], k' [B, n, G, d]) in the dtypes of q and k."""
        grouped = q.reshape(*k.shape[:3], -1, k.shape[3]).float()
        A, B, b = (x[-k.shape[2] :].float() for x in (self.query_map, self.key_map, self.key_center))
        queries = torch.einsum("bngrd,ged->bngre", grouped, A).reshape(q.shape)
        return queries.to(q.dtype), torch.einsum("bngd,ged->bnge", k.float() - b, B).to(k.dtype)


class Mechanism(nn.Module):
    """The arrays of one layer's features: M (`geometry`), projections w, maps of queries and keys, gains."""

    def __init__(self, layer: dict[str, Any], num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.layer, self.kind = layer, layer["kind"]
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: must be one of {', '.join((*EXACT, *KINDS))}")
        self.scale = layer["scale"]
        empty = lambda *shape: nn.Parameter(torch.empty(*shape, dtype=torch.float32))
        if self.kind in RANDOM_FEATURES:
            projections = empty(num_kv_heads, layer["num_features"], head_dim)
            if self.kind == "lfk" or layer["learn_projections"]:
                self.projections = projections
            else:  # a parameter would be trained: transformers forgets requires_grad = False as it loads
                self.register_buffer("projections", projections.detach())
        if self.kind == "dark":
            self.M = empty(num_kv_heads, head_dim, head_dim)
        if self.kind == "hedgehog":
            self.queries = empty(num_heads, head_dim, head_dim)
            self.keys = empty(num_kv_heads, head_dim, head_dim)
        if layer["far_gain"]:
            self.log_gain = empty(num_heads)
        self.coordinates = Coordinates(num_kv_heads, head_dim) if layer["balanced"] else None

    def forward(self, attend: nn.Module, *inputs: Any) -> Any:
        """What `attend` makes of q, k, v and so on. accelerate moves the arrays of modules while these are called."""
        return attend(self, *inputs)

    def reset(self) -> None:
        """As darkformer_jax starts them, but for the random numbers."""
        for name, array in (*self.named_parameters(), *self.named_buffers()):
            if name == "projections":
                init.normal_(array)
            elif name in ("log_gain", "coordinates.key_center"):
                init.zeros_(array)
            else:
                start = self.layer["geometry_init"] if name == "M" else 1.0
                init.copy_(array, start * torch.eye(array.shape[-1]).expand_as(array))

    @property
    def num_features(self) -> int:
        sizes = {"window_only": 0, "linear_transformer": 1, "hedgehog": 2, "cosformer": 2}
        per_dimension = sizes.get(self.kind)
        return self.layer["num_features"] if per_dimension is None else per_dimension * self.layer["head_dim"]

    def prepare(self, q: Tensor, k: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The q [B, n, H, d'] and k [B, n, G, d'] whose features are taken, and whose logits are seen exactly."""
        if self.coordinates is not None:
            q, k = self.coordinates(q, k)
        if self.kind == "hedgehog":
            maps = ((q, self.queries), (k, self.keys))
            q, k = (product("bnhd,hed->bnhe", x, W, x.dtype).to(x.dtype) for x, W in maps)
        if self.kind == "cosformer":
            horizon = self.layer["horizon"]
            if int(index.max()) >= horizon:
                raise ValueError(f"horizon = {horizon} with {int(index.max()) + 1} tokens: cosformer sees no more")
            angle = (0.5 * math.pi / horizon) * index.float()[..., None, None]
            q, k = (
                torch.cat([F.relu(x.float()) * angle.cos(), F.relu(x.float()) * angle.sin()], -1).to(x.dtype)
                for x in (q, k)
            )
        return q, k

    def log_features(self, x: Tensor) -> Tensor:
        """l(x) [B, n, G, g, m] of x [B, n, G, g, d]."""
        if self.kind == "linear_transformer":
            x = x.float()
            return torch.where(x < 0, x, torch.log1p(x.clamp_min(0)))
        if self.kind == "hedgehog":
            return torch.cat([x.float(), -x.float()], -1)
        if self.kind == "cosformer":
            return x.float().clamp_min(1e-6).log()
        point = self.apply_geometry(x)
        projected = product("bngre,gme->bngrm", point, self.projections[-x.shape[2] :], x.dtype)
        return self.scale**0.5 * projected - 0.5 * self.scale * point.float().square().sum(-1, keepdim=True)

    def apply_geometry(self, x: Tensor, equation: str = "bngrd,ged->bngre") -> Tensor:
        """M x, or x where there is no M."""
        return product(equation, x, self.M[-x.shape[2] :], x.dtype).to(x.dtype) if self.kind == "dark" else x

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, q, G, g, t]: the logarithm of the kernel that the features estimate, + log m as their sums have it."""
        if self.layer["window_kernel"] == "dark":
            q = self.apply_geometry(self.apply_geometry(q), "bngre,ged->bngrd")
        dots = product("bngrd,btgd->bngrt", q, k, q.dtype)
        return self.scale * dots + math.log(max(self.num_features, 1))


class LogProduct(torch.autograd.Function):
    """log max(P, e^LOG_FLOOR) of P = sum_i exp(l_i(q) + l_i(k)), where e^HEADROOM is the largest of either side.

    The gradient divides by P, which is up to m e^72: the quotient of a small loss would be no normal float32. So the
    quotients are scaled as far up as their products with features allow.
    """

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_k: Tensor, dtype: torch.dtype) -> Tensor:
        q, k = log_q.exp(), log_k.exp()
        dots = product("bngrm,btgm->bngrt", q, k, dtype)
        ctx.save_for_backward(q, k, dots)
        ctx.dtype = dtype
        return dots.clamp_min(math.exp(LOG_FLOOR)).log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, dots = ctx.saved_tensors
        above = dots > math.exp(LOG_FLOOR)
        gradient, dots = gradient.masked_fill(~above, 0.0), dots.masked_fill(~above, 1.0)
        # The largest quotient becomes e^-LOG_FLOOR, unless its product with both features passes e^75.
        log_quotient = log_largest(gradient * math.exp(30.0) / dots) - 30.0
        half = (0.5 * torch.minimum(75.0 - log_largest(gradient), -LOG_FLOOR - log_quotient)).exp()
        quotients = gradient * half / dots * half
        to_q = q * product("bngrt,btgm->bngrm", quotients, k, ctx.dtype)
        to_k = k * product("bngrt,bngrm->btgm", quotients, q, ctx.dtype)
        return to_q / half / half, to_k / half[..., 0] / half[..., 0], None


def log_largest(x: Tensor) -> Tensor:
    """[B, 1, G, 1, 1]: log max |x| of x [B, q, G, g, t], 0 where all are 0."""
    largest = x.abs().amax((1, 3, 4), keepdim=True)
    return torch.where(largest > 0, largest, 1.0).log()


def feature_scores(log_q: Tensor, log_k: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, q, G, g, t]: log sum_i exp(l_i(q) + l_i(k)), as one product, scaled by each side's largest feature."""
    headroom = min(HEADROOM, 0.5 * (80.0 - math.log(log_q.shape[-1])))
    q_max, k_max = (x.detach().amax(-1, keepdim=True) for x in (log_q, log_k))
    logs = LogProduct.apply(log_q - (q_max - headroom), log_k - (k_max - headroom), dtype)
    return logs + (q_max + k_max[..., 0].permute(0, 2, 1)[:, None, :, None] - 2 * headroom)


def weighted_mean(far_scores: Tensor | None, state: State, scores: Tensor, values: Tensor) -> Tensor:
    """[B, q, G, g, d] of far keys [.., m] and single ones [.., t] with values [B, t, G, d], in float32."""
    largest = scores.detach().amax(-1, keepdim=True)
    if far_scores is not None:
        largest = torch.maximum(largest, far_scores.detach().amax(-1, keepdim=True))
    weights = (scores - largest).exp()
    numerator = product("bngrt,btgd->bngrd", weights, values, values.dtype)
    denominator = weights.sum(-1, keepdim=True)
    if far_scores is not None:
        weights = (far_scores - largest).exp()
        numerator = numerator + product("bngrm,bgmd->bngrd", weights, state["S"], values.dtype)
        denominator = denominator + product("bngrm,bgm->bngr", weights, state["z"], torch.float32)[..., None]
    return numerator / denominator


class FeatureAttention(nn.Module):
    """Linear attention, with or without an exact window. Its state has the same size after any number of tokens."""

    def __init__(self, layer: dict[str, Any]) -> None:
        super().__init__()
        self.chunk, self.window, self.num_sinks = layer["chunk_size"], layer["window"], layer["num_sinks"]
        if self.window % self.chunk:
            raise ValueError(f"window = {self.window}: must be a multiple of chunk_size = {self.chunk}")

    def forward(
        self,
        mechanism: Mechanism,
        q: Tensor,  # [B, n, H, d]
        k: Tensor,  # [B, n, G, d]
        v: Tensor,
        rows: Rows,
        decays: Tensor | None,  # [B, n, G]
        state: State | None,
    ) -> tuple[Tensor, State]:
        """(out [B, n, H, d], the state after these tokens)."""
        q, k = mechanism.prepare(q, k, rows.index)
        q = q.unflatten(2, (k.shape[2], -1))
        if decays is not None:
            decays = torch.where(rows.is_real[..., None], decays.clamp_min(DECAY_FLOOR), 0.0)
        state = self.empty(mechanism, k, v, decays) if state is None else dict(state)
        attend = self.windowed if self.window else self.everywhere
        out, state = attend(mechanism, q, k, v, rows, decays, state)
        return out.flatten(2, 3).to(v.dtype), state

    def empty(self, mechanism: Mechanism, k: Tensor, v: Tensor, decays: Tensor | None) -> State:
        """The state before the first token."""
        rows, _, groups, size = k.shape
        wide: dict[str, Any] = {"dtype": torch.float32, "device": k.device}
        state = {}
        if m := mechanism.num_features:
            state["c"] = torch.full((rows, groups, m), NEG, **wide)
            state["z"] = torch.zeros(rows, groups, m, **wide)
            state["S"] = torch.zeros(rows, groups, m, v.shape[-1], **wide)
        if self.window:
            for name, slots in (("recent", self.window + self.chunk), ("sink", self.num_sinks)):
                state[f"{name}_keys"] = k.new_zeros(rows, slots, groups, size)
                state[f"{name}_values"] = v.new_zeros(rows, slots, groups, v.shape[-1])
                if decays is not None:
                    state[f"{name}_decays"] = torch.zeros(rows, slots, groups, **wide)
        return state

    def everywhere(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, rows: Rows, decays: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        """Features everywhere: read the far state and the own chunk through features, then fold the chunk in."""
        log_q, log_k = mechanism.log_features(q), mechanism.log_features(k[:, :, :, None])[:, :, :, 0]
        out = []
        for start in range(0, rows.length, self.chunk):
            part = slice(start, start + self.chunk)
            keys, values, real = log_k[:, part], v[:, part], rows.is_real[:, part]
            size = keys.shape[1]
            scores = feature_scores(log_q[:, part], keys, v.dtype)
            far_scores = log_q[:, part] + state["c"][:, None, :, None]
            sums, places = None, torch.arange(size, device=v.device).expand(len(v), -1)
            if decays is not None:
                sums = RunningSum(decays[:, part])
                scores = scores + heads_last(sums.between(places))
                far_scores = far_scores + sums.since_start(places)[..., None, None]
            own = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
            visible = own & (real[:, None] | torch.eye(size, dtype=torch.bool, device=v.device))
            scores = scores.masked_fill(~visible[:, :, None, None], NEG)
            out.append(weighted_mean(far_scores, state, scores, values))
            state = state | fold(state, keys, values, real, sums)
        return torch.cat(out, 1), state

    def windowed(
        self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, rows: Rows, decays: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        """Window, own chunk and sinks exactly, the rest through features.

        Slots 0 .. window - 1 hold the window of the first chunk, the next ones that chunk and all later ones. `fill`
        tokens of the first chunk are there from earlier calls.
        """
        fill = rows.before % self.chunk
        base = rows.before - fill - self.window  # the index of slot 0
        end = self.window + fill + rows.count
        in_chunks = [before % self.chunk + count for before, count in rows.on_host]  # from the first on
        num_chunks = max(1, *(-(-tokens // self.chunk) for tokens in in_chunks))
        new = {"keys": k, "values": v} | ({} if decays is None else {"decays": decays})
        slots = torch.arange(self.window + num_chunks * self.chunk, device=k.device)
        source = torch.where(slots < (self.window + fill)[:, None], slots, slots + (self.chunk - fill)[:, None])
        full = {name: take(torch.cat([state[f"recent_{name}"], x], 1), source) for name, x in new.items()}
        out = []
        for chunk in range(num_chunks):
            start = chunk * self.chunk
            places = self.window + torch.arange(self.chunk, device=k.device).expand(len(k), -1)
            queries = q
            if rows.length == 1:
                places = self.window + fill[:, None]
            else:
                queries = take(q, start + places - self.window - fill[:, None])
            near = {name: x[:, start : start + self.window + self.chunk] for name, x in full.items()}
            out.append(self.one_chunk(mechanism, queries, places, near, base + start, state))
            if max(in_chunks) >= start + self.chunk:  # most decoded tokens complete no chunk
                complete = end >= start + self.window + self.chunk
                state = self.shift(mechanism, near, base + start, complete, state)
        outputs = out[0] if rows.length == 1 else take(torch.cat(out, 1), fill[:, None] + slots[: rows.length])
        passed = (fill + rows.count) // self.chunk * self.chunk
        kept = passed[:, None] + torch.arange(self.window + self.chunk, device=k.device)
        return outputs, state | {f"recent_{name}": take(x, kept) for name, x in full.items()}

    def one_chunk(
        self, mechanism: Mechanism, q: Tensor, places: Tensor, near: State, base: Tensor, state: State
    ) -> Tensor:
        """Attention of queries at `places` [B, q] among the near keys, the first of which has the index `base` [B]."""
        slots = torch.arange(near["keys"].shape[1], device=q.device)
        visible = (slots <= places[..., None]) & (base[:, None] + slots >= 0)[:, None]
        sinks = torch.arange(self.num_sinks, device=q.device) < base[:, None]
        visible = torch.cat([sinks[:, None].expand(-1, visible.shape[1], -1), visible], 2)
        keys = torch.cat([state["sink_keys"], near["keys"]], 1)
        values = torch.cat([state["sink_values"], near["values"]], 1)
        scores, far_scores = mechanism.log_kernel(q, keys), None
        if mechanism.num_features:
            far_scores = mechanism.log_features(q) + state["c"][:, None, :, None]
            if mechanism.layer["far_gain"]:
                far_scores = far_scores + mechanism.log_gain[-q.shape[2] * q.shape[3] :].view(q.shape[2], -1, 1)
            if horizon := mechanism.layer["far_horizon"]:
                place = (base[:, None] + places + 1).clamp(min=1).to(far_scores.dtype)
                far_scores = far_scores + (horizon / place).clamp(max=1).log()[..., None, None, None]
        if "decays" in near:
            sums = RunningSum(near["decays"])
            since = sums.since_start(places)
            to_sinks = since[:, :, None] + state["sink_decays"][:, None]
            scores = scores + heads_last(torch.cat([to_sinks, sums.between(places)], 2))
            far_scores = None if far_scores is None else far_scores + since[..., None, None]
        scores = scores.masked_fill(~visible[:, :, None, None], NEG)
        return weighted_mean(far_scores, state, scores, values)

    def shift(self, mechanism: Mechanism, near: State, base: Tensor, complete: Tensor, state: State) -> State:
        """Folds the window's oldest chunk into the far state and the sinks, in rows whose newest chunk is complete."""
        chunk = {name: x[:, : self.chunk] for name, x in near.items()}
        index = base[:, None] + torch.arange(self.chunk, device=base.device)
        sums = RunningSum(chunk["decays"]) if "decays" in chunk else None
        new = {}
        if mechanism.num_features:
            log_k = mechanism.log_features(chunk["keys"][:, :, :, None])[:, :, :, 0]
            new = fold(state, log_k, chunk["values"], index >= self.num_sinks, sums)
        if self.num_sinks:
            new |= self.keep_sinks(chunk, index, sums, state)
        where = lambda x, old: torch.where(complete.view(-1, *(1,) * (x.dim() - 1)), x, old)
        return state | {name: where(x, state[name]) for name, x in new.items()}

    def keep_sinks(self, chunk: State, index: Tensor, sums: RunningSum | None, state: State) -> State:
        """The sinks, with those that the chunk holds."""
        sinks = torch.arange(self.num_sinks, device=index.device)
        place = sinks - index[:, :1]  # in the chunk
        found = ((place >= 0) & (place < self.chunk))[..., None]
        new = {
            f"sink_{name}": torch.where(found[..., None], take(chunk[name], place), state[f"sink_{name}"])
            for name in ("keys", "values")
        }
        if sums is not None:
            to_end, of_chunk = decays_to_end(sums)
            new["sink_decays"] = torch.where(found, take(to_end, place), state["sink_decays"] + of_chunk[:, None])
        return new


def heads_last(decays: Tensor) -> Tensor:
    """[B, q, t, G] -> [B, q, G, 1, t], as scores are."""
    return decays.permute(0, 1, 3, 2)[:, :, :, None]


def decays_to_end(sums: RunningSum) -> tuple[Tensor, Tensor]:
    """(from each key [B, t, G], from before the first [B, G]) to the last token of a chunk."""
    last = torch.full((len(sums.whole), 1), sums.whole.shape[1] - 1, device=sums.whole.device)
    return sums.between(last)[:, 0], sums.since_start(last)[:, 0]


def fold(state: State, log_k: Tensor, values: Tensor, is_far: Tensor, sums: RunningSum | None) -> State:
    """c, z and S with the keys that `is_far` marks, log_k [B, t, G, m] and values [B, t, G, d]."""
    decay = None
    if sums is not None:
        to_end, decay = decays_to_end(sums)
        log_k = log_k + to_end[..., None]
    log_k = log_k.masked_fill(~is_far[:, :, None, None], NEG)
    before = state["c"] if decay is None else state["c"] + decay[..., None]
    c = torch.maximum(before, log_k.amax(1)).detach()  # it moves the numbers into range and cancels in the output
    weights = (log_k - c[:, None]).exp().masked_fill(~is_far[:, :, None, None], 0.0)
    gap = state["c"] - c
    keep = (gap if decay is None else gap + decay[..., None]).exp()
    added = product("btgm,btgd->bgmd", weights, values, values.dtype)
    return {"c": c, "z": state["z"] * keep + weights.sum(1), "S": state["S"] * keep[..., None] + added}


class ExactAttention(nn.Module):
    """Softmax attention to all tokens, or to the last `local_window` ones. Its state grows up to that length.

    Its slots are aligned to the right: the last one holds the newest real token of each row.
    """

    def __init__(self, layer: dict[str, Any]) -> None:
        super().__init__()
        self.scale, self.softcap, self.local_window = layer["scale"], layer["softcap"], layer["local_window"]

    def forward(
        self,
        mechanism: None,
        q: Tensor,  # [B, n, H, d]
        k: Tensor,  # [B, n, G, d]
        v: Tensor,
        rows: Rows,
        decays: Tensor | None,  # [B, n, G]
        state: State | None,
    ) -> tuple[Tensor, State]:
        """(out [B, n, H, d], the state after these tokens)."""
        new = {"keys": k, "values": v}
        if decays is not None:
            steps = torch.where(rows.is_real[..., None], decays, 0.0).double()
            first = 0.0 if state is None else state["elapsed"][:, -1:]
            new["elapsed"] = first + steps.cumsum(1)
        seen = new if state is None else {name: torch.cat([state[name], x], 1) for name, x in new.items()}
        slots = torch.arange(seen["keys"].shape[1], device=k.device)
        shift = rows.length - rows.count
        if any(count < rows.length for _, count in rows.on_host):
            seen = {name: take(x, slots - shift[:, None]) for name, x in seen.items()}
        index = (rows.before + rows.count - len(slots))[:, None] + slots  # of each slot's token
        distance = rows.index[..., None] - index[:, None]
        visible = (distance >= 0) & (index >= 0)[:, None]
        if self.local_window:
            visible &= distance < self.local_window
        visible |= ~rows.is_real[..., None]  # so that the softmax of padding is defined
        bias = None
        if decays is not None:
            bias = heads_last((new["elapsed"][:, :, None] - seen["elapsed"][:, None]).float())
        out = self.attend(q, seen["keys"], seen["values"], visible, bias)
        kept = min(len(slots), self.local_window or len(slots))
        return out, {name: x[:, -kept:] for name, x in seen.items()}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(cap(scale q k^T) + bias) v over the visible keys [B, n, t]."""
        if bias is None and not self.softcap:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible[:, None], scale=self.scale, enable_gqa=grouped
            )
            return out.transpose(1, 2)
        grouped = q.unflatten(2, (k.shape[2], -1))
        scores = self.scale * product("bngrd,btgd->bngrt", grouped, k, q.dtype)
        if self.softcap:
            scores = self.softcap * (scores / self.softcap).tanh()
        scores = (scores if bias is None else scores + bias).masked_fill(~visible[:, :, None, None], NEG)
        out = product("bngrt,btgd->bngrd", scores.softmax(-1), v, v.dtype)
        return out.flatten(2, 3).to(v.dtype)


class SplitAttention(nn.Module):
    """Exact attention in the first key/value heads, features in the others. Its state has what both keep."""

    def __init__(self, layer: dict[str, Any]) -> None:
        super().__init__()
        self.kv_heads = layer["exact_kv_heads"]
        self.exact, self.features = ExactAttention(layer), FeatureAttention(layer)

    def forward(
        self,
        mechanism: Mechanism,
        q: Tensor,  # [B, n, H, d]
        k: Tensor,  # [B, n, G, d]
        v: Tensor,
        rows: Rows,
        decays: Tensor | None,  # [B, n, G]
        state: State | None,
    ) -> tuple[Tensor, State]:
        """(out [B, n, H, d], the state after these tokens)."""
        first, rest = slice(None, self.kv_heads), slice(self.kv_heads, None)
        heads = self.kv_heads * q.shape[2] // k.shape[2]
        kept, sums = None, None
        if state is not None:
            kept = {name.removeprefix(_OF_EXACT): x for name, x in state.items() if name.startswith(_OF_EXACT)}
            sums = {name: x for name, x in state.items() if not name.startswith(_OF_EXACT)}
        early, late = (None if decays is None else decays[..., part] for part in (first, rest))
        exact, kept = self.exact(None, q[:, :, :heads], k[:, :, first], v[:, :, first], rows, early, kept)
        others, sums = self.features(mechanism, q[:, :, heads:], k[:, :, rest], v[:, :, rest], rows, late, sums)
        return torch.cat([exact, others], 2), sums | {_OF_EXACT + name: x for name, x in kept.items()}
