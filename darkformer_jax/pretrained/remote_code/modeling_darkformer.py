"""A DARKFormer model in PyTorch: the Llama and Gemma family of transformers with the attention of attention_darkformer.

Weights have the names of the stock model (Llama, Gemma, ...), and what it lacks is below `self_attn.mechanism`,
`self_attn.convolution` and `self_attn.forgetting`. A row is one document. Positions count its real tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)

from .attention_darkformer import EXACT, ExactAttention, FeatureAttention, Mechanism, Rows, SplitAttention, State, take
from .cache_darkformer import own_layers, rows_of
from .configuration_darkformer import DarkformerConfig

_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # before 5.24
_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32; * (1 + weight) with `plus_one`."""

    def __init__(self, size: int, config: DarkformerConfig) -> None:
        super().__init__()
        model = config.fields
        self.eps, self.plus_one = model["norm_eps"], model["norm_plus_one"]
        self.weight = nn.Parameter(torch.zeros(size) if self.plus_one else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float()
        return (wide * (1 + weight if self.plus_one else weight)).to(x.dtype)


class GatedMLP(nn.Module):
    """(activation(x Wg) * (x Wu)) Wd."""

    def __init__(self, config: DarkformerConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = _ACTIVATIONS[config.fields["activation"]]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Kernel(nn.Module):
    """The kernel [width, heads, d] of one of q, k and v. accelerate moves the arrays of modules that are called."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """y [B, n, heads, d] of x, with the width - 1 tokens before it."""
        kernel, tokens = self.kernel.to(x.dtype), torch.cat([before, x], 1)
        width, length = len(kernel), x.shape[1]
        past = (kernel[back] * tokens[:, width - 1 - back :][:, :length] for back in range(width))
        return sum(past, x)


class ShortConvolution(nn.Module):
    """y_n = x_n + sum_i kernel_i x_{n-i} for q, k and v, per head and dimension. Its state is the last tokens' x."""

    def __init__(self, width: int, heads: dict[str, int], head_dim: int) -> None:
        super().__init__()
        self.width = width
        for name, number in heads.items():
            setattr(self, name, Kernel(width, number, head_dim))

    def forward(self, parts: dict[str, Tensor], rows: Rows, state: State | None) -> tuple[dict[str, Tensor], State]:
        reach = self.width - 1
        kept = rows.count[:, None] + torch.arange(reach, device=rows.count.device)
        new, out = {}, {}
        for name, x in parts.items():
            before = x.new_zeros(len(x), reach, *x.shape[2:]) if state is None else state[f"convolution_{name}"]
            out[name] = getattr(self, name)(x, before)
            new[f"convolution_{name}"] = take(torch.cat([before, x], 1), kept)
        return out, new


class Gate(nn.Module):
    """x W in float32."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(width, num_heads))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ self.kernel.float()


class Forgetting(nn.Module):
    """The log decay per token of each key/value head: -softplus(bias + x W), or without W, or constants."""

    def __init__(self, layer: dict[str, Any], width: int, num_heads: int) -> None:
        super().__init__()
        self.kind, self.constants = layer["decay"], layer["alibi"]
        self.forgetful = num_heads - layer["undecayed_heads"]
        if self.constants is None:
            self.bias = nn.Parameter(torch.zeros(num_heads))
        if self.kind == "gate":
            self.gate = Gate(width, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, G] of x [B, n, width]."""
        if self.constants is not None:
            return torch.tensor(self.constants, dtype=torch.float32, device=x.device).expand(*x.shape[:2], -1)
        raw = self.bias.float().expand(*x.shape[:2], -1)
        if self.kind == "gate":
            raw = raw + self.gate(x)
        decays = -F.softplus(raw)
        return torch.cat([decays[..., : self.forgetful], torch.zeros_like(decays[..., self.forgetful :])], -1)


class Attention(nn.Module):
    """Projections, convolution, norms, rotary positions and decay around exact or linear attention."""

    def __init__(self, config: DarkformerConfig, index: int) -> None:
        super().__init__()
        layer, model = config.layer(index), config.fields
        self.heads = {"q": model["num_heads"], "k": model["num_kv_heads"], "v": model["num_kv_heads"]}
        size, width, bias = model["head_dim"], config.hidden_size, model["qkv_bias"]
        for name, number in self.heads.items():
            setattr(self, f"{name}_proj", nn.Linear(width, number * size, bias=bias))
        self.o_proj = nn.Linear(self.heads["q"] * size, width, bias=False)
        self.q_norm = RMSNorm(size, config) if model["qk_norm"] else None
        self.k_norm = RMSNorm(size, config) if model["qk_norm"] else None
        self.frequencies, self.amplitude = layer["frequencies"], layer["amplitude"]
        is_exact = layer["kind"] in EXACT
        self.mechanism = None if is_exact else Mechanism(layer, self.heads["q"], self.heads["k"], size)
        split = SplitAttention if layer["exact_kv_heads"] else FeatureAttention
        self.attend = ExactAttention(layer) if is_exact else split(layer)
        self.convolution = ShortConvolution(layer["conv_width"], self.heads, size) if layer["conv_width"] else None
        has_decay = layer["alibi"] is not None or layer["decay"] != "none"
        self.forgetting = Forgetting(layer, width, self.heads["k"]) if has_decay else None

    def forward(self, x: Tensor, rows: Rows, state: State | None) -> tuple[Tensor, State]:
        """(y, the state after the tokens) of x [B, n, width]."""
        parts = {
            name: getattr(self, f"{name}_proj")(x).unflatten(-1, (heads, -1)) for name, heads in self.heads.items()
        }
        convolved: State = {}
        if self.convolution is not None:
            parts, convolved = self.convolution(parts, rows, state)
        q, k, v = parts.values()
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.frequencies is not None:
            q, k = self.rotate(q, rows), self.rotate(k, rows)
        own = None if state is None else {name: x for name, x in state.items() if not name.startswith("convolution_")}
        with torch.autocast(x.device.type, enabled=False):  # it would round exponents
            decays = None if self.forgetting is None else self.forgetting(x)
            inputs = (q, k, v, rows, decays, own)
            if self.mechanism is None:
                out, new = self.attend(None, *inputs)
            else:
                out, new = self.mechanism(self.attend, *inputs)
        return self.o_proj(out.flatten(2)), new | convolved

    def rotate(self, x: Tensor, rows: Rows) -> Tensor:
        """Rotates the pairs (x_i, x_{i + d/2}) of x [B, n, heads, d] by the token's index times the frequencies."""
        angles = rows.index.float()[..., None] * torch.tensor(self.frequencies, device=x.device)
        cos, sin = (self.amplitude * turn[:, :, None] for turn in (angles.cos(), angles.sin()))
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class DarkformerBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma 2 and 3 also norm each term before it is added."""

    def __init__(self, config: DarkformerConfig, index: int) -> None:
        super().__init__()
        self.post_norms = config.fields["post_norms"]
        self.self_attn = Attention(config, index)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def forward(self, x: Tensor, rows: Rows, state: State | None) -> tuple[Tensor, State]:
        rows = rows.to(x.device)
        mixed, state = self.self_attn(self.input_layernorm(x), rows, state)
        if not self.post_norms:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x)), state
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), state


class DarkformerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the models below."""

    config_class = DarkformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DarkformerBlock"]  # noqa: RUF012  # transformers expects lists
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Exponents: half precision would change the kernel.
    _keep_in_fp32_modules_strict = ["mechanism", "forgetting"]  # noqa: RUF012
    _is_stateful = True  # assisted decoding would have to take tokens back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mechanism):
            module.reset()
        elif isinstance(module, RMSNorm):
            (init.zeros_ if module.plus_one else init.ones_)(module.weight)
        elif isinstance(module, Forgetting | Gate | Kernel):
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)


class DarkformerModel(DarkformerPreTrainedModel):
    """Tokens -> hidden states."""

    def __init__(self, config: DarkformerConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DarkformerBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config)
        self.scale = config.hidden_size**0.5 if config.fields["scale_embeddings"] else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' models. `past_key_values` and `cache` are two names of one thing.

        Raises ValueError for what a state of constant size cannot have: attention weights, masks with holes, and
        positions other than the count of the real tokens.
        """
        _refuse(kwargs)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions=True: linear attention has no attention weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        shape = next(list(given.shape[:2]) for given in (input_ids, inputs_embeds) if given is not None)
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"the input has shape {shape}; expected [rows, tokens], at least one token")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        cache = past_key_values if cache is None else cache
        if use_cache is None:  # nothing reads a cache in training, and it would hold memory
            use_cache = self.config.use_cache and not self.training
        if (use_cache and not (self.gradient_checkpointing and self.training)) or cache is not None:
            cache = own_layers(cache, len(self.layers))
        rows, padding = rows_of(attention_mask, position_ids, x, cache)
        places = torch.arange(rows.length, device=x.device)
        x = x if padding is None else take(x, places + padding[:, None])
        in_order = lambda x: x if padding is None else take(x, places - padding[:, None])
        states = [in_order(x)]
        for index, block in enumerate(self.layers):
            layer: Any = None if cache is None else cache.layers[index]
            state = None if layer is None else _to_device(layer.state, x.device)
            x, state = block(x, rows, state)
            if layer is not None:
                layer.write(state, rows)
                if getattr(cache, "offloading", False):
                    layer.offload()
            if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
                states.append(in_order(x))
        x = in_order(self.norm(x))
        shown = (*states[:-1], x) if len(states) > 1 else None
        results: dict[str, Any] = {"last_hidden_state": x, "hidden_states": shown, _CACHE: cache}
        out = BaseModelOutputWithPast(**results)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


class DarkformerForCausalLM(DarkformerPreTrainedModel, GenerationMixin):
    """Tokens -> logits of each next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DarkformerConfig) -> None:
        super().__init__(config)
        self.model = DarkformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.softcap = config.fields["logit_softcap"]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As `DarkformerModel`; with labels, the mean loss of those that are not -100, each of its predecessor.

        The first token of a row has none, whatever padding is in front of it.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        loss = None
        if labels is not None:
            if attention_mask is not None:
                after_padding = F.pad(attention_mask[:, -labels.shape[1] :] == 0, (1, 0))[:, :-1]
                labels = labels.masked_fill(after_padding.to(labels.device), -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items
            )
        results = {"loss": loss, "logits": logits, "hidden_states": out.hidden_states, _CACHE: out.get(_CACHE)}
        result = CausalLMOutputWithPast(**results)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


class Score(nn.Linear):
    """x W + b in float32, whatever dtype the rest of the model has."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class DarkformerForSequenceClassification(DarkformerPreTrainedModel):
    """Tokens -> outputs of each row: a logit per class, or the number of a regression."""

    _keep_in_fp32_modules_strict = [*DarkformerPreTrainedModel._keep_in_fp32_modules_strict, "score"]  # noqa: RUF012
    accepts_loss_kwargs = False  # the loss is a mean over rows: Trainer itself divides it by accumulated batches

    def __init__(self, config: DarkformerConfig) -> None:
        super().__init__(config)
        labels: Any = config.num_labels  # of id2label
        self.num_labels, self.pooling = labels, config.pooling
        self.model = DarkformerModel(config)
        self.score = Score(config.hidden_size, labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The outputs [rows, labels] in float32; with labels, the mean loss that transformers has for `problem_type`.

        Raises ValueError for what `DarkformerModel` refuses, for a cache, and for a pair that the tokenizer put
        together: its tokens are not those of the text that the model was trained on.
        """
        _refuse_cache(kwargs)
        if token_type_ids is not None and bool((token_type_ids != 0).any()):
            raise ValueError(
                "token_type_ids has a second text: this model reads a pair as one text, with a line feed between both: "
                'tokenizer(f"{first}\\n{second}")'
            )
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(pool(out.last_hidden_state, attention_mask, self.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        result = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One hidden state per row [B, width] in float32: that of its last real token, or their mean.

    It is zero for a row of padding alone. mask: 1 = a real token, 0 = padding on either side; None = no padding.
    """
    hidden = hidden.float()
    if mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    is_real = (mask != 0).to(hidden.device)
    if pooling == "mean":
        return hidden.masked_fill(~is_real[..., None], 0).sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)
    last = (is_real * torch.arange(is_real.shape[1], device=hidden.device)).argmax(1)
    return take(hidden, last[:, None])[:, 0].masked_fill(~is_real.any(1, keepdim=True), 0)


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for an argument that would change the result and is not supported."""
    ignored = ("cache_position", "tokenizer")  # it follows from the cache; `generate` passes on that of stop_strings
    unknown = [name for name, value in kwargs.items() if value is not None and name not in ignored]
    if unknown:
        raise ValueError(f"{unknown[0]} is not an argument of a DARKFormer model")


def _refuse_cache(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a cache: pooling would see only the tokens after those in it. Takes out `use_cache`."""
    asked = {name: kwargs.pop(name, None) for name in ("past_key_values", "cache")}
    named = [name for name, value in asked.items() if value is not None]
    if kwargs.pop("use_cache", None):
        named.append("use_cache=True")
    if named:
        raise ValueError(f"{named[0]}: a classifier reads whole texts at once and has no cache")


def _to_device(state: State | None, device: torch.device) -> State | None:
    return None if state is None else {name: x.to(device) for name, x in state.items()}
