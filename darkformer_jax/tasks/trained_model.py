"""A run's language model for Python programs: `darkformer_jax.load_model`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from darkformer_jax.data.progress import no_progress
from darkformer_jax.data.sources import Corpus, Document
from darkformer_jax.data.tokenizers import Tokenizer, encode_prompt
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.text_scores import QUARTERS, TextScorer, make_quarter_step
from darkformer_jax.tasks.texts import Writer


class Score(NamedTuple):
    """How well a model predicts a text; see `darkformer_jax.evaluate`."""

    tokens: int  # that were predicted
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    accuracy: float


class TrainedModel:
    """A language model: text in, text or probabilities out.

    Attributes:
      tokenizer: text <-> ids.
      config: the run's.
      step: of the checkpoint.
    """

    def __init__(self, loaded: WorkdirModel) -> None:
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.config = loaded.config
        self.step = loaded.step
        self._loaded = loaded
        self._quarter_step = make_quarter_step(loaded.network)
        self._sampler = functools.lru_cache(maxsize=8)(self._make_sampler)  # each compiles programs of its own

        @jax.jit
        def logits(params: dict, projections: dict, ids: Array, segment_ids: Array) -> Array:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            return loaded.network.bind(params, projections)(ids, segment_ids, positions)[0]

        self._logits = logits

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """What the model writes after the prompt, as `python -m darkformer_jax.generate` prints it."""
        _require_text("prompt", prompt)
        for name, value, lowest in (("max_new_tokens", max_new_tokens, 1), ("top_k", top_k, 0), ("seed", seed, 0)):
            _require_whole(name, value, lowest)
        writer = Writer(self._sampler(temperature, top_k, top_p, seed), self.tokenizer, self._loaded.ends)
        return "".join(writer.stream(encode_prompt(self.tokenizer, prompt), max_new_tokens))

    def logits(self, ids: Int[Array, "*b n"] | list) -> Float[Array, "*b n vocab"]:
        """The logits of the token after each of `ids`, a row or a batch of rows; `tokenizer.encode` makes ids.

        Raises UserError for ids outside the vocabulary.
        """
        try:
            array = np.asarray(ids)
        except ValueError as error:
            raise UserError("the rows of ids have different lengths; allowed: rows of one length") from error
        size = self._loaded.network.spec.vocab_size
        if array.ndim not in (1, 2) or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"ids have shape {array.shape} and type {array.dtype}; expected integers [n] or [batch, n]")
        if array.min() < 0 or array.max() >= size:
            raise UserError(f"ids are from {array.min()} to {array.max()}; allowed: 0 to {size - 1}")
        rows = array.reshape(-1, array.shape[-1]).astype(np.int32)
        length = rows.shape[1]
        padded = 1 << (length - 1).bit_length()  # so that texts of all lengths share a few compiled programs
        rows = np.pad(rows, ((0, 0), (0, padded - length)))
        segment_ids = np.broadcast_to(np.arange(padded) < length, rows.shape).astype(np.int32)
        out = self._logits(self._loaded.params, self._loaded.projections, rows, segment_ids)
        return out[:, :length].reshape(*array.shape, -1)

    def score(self, text: str, context: int | None = None) -> Score:
        """Loss and more of a text, in windows of `context` tokens (default: those that the model was trained on).

        Raises UserError for a text without a token to predict.
        """
        _require_text("text", text)
        context = self.config.sequence_length if context is None else context
        if context < QUARTERS:
            raise UserError(f"context = {context}: must be at least {QUARTERS}")
        scorer = TextScorer(self._loaded, context, context, self._quarter_step)
        num_bytes = len(text.encode("utf-8"))
        corpus = Corpus(num_bytes, lambda _: iter([Document("text", text)]))
        scorer.score(corpus, num_bytes, 1, None, no_progress)
        figures = scorer.figures()
        if not figures["tokens"]:
            raise UserError(f"text = {text!r}: it has no token to predict")
        return Score(**figures)

    def _make_sampler(self, temperature: float, top_k: int, top_p: float, seed: int) -> Sampler:
        model = self._loaded
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return Sampler(model.network, model.params, model.projections, **options, vocab_size=model.tokenizer.vocab_size)


def _require_whole(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int | np.integer) or not lowest <= value < 2**32:
        raise UserError(f"{name} = {value!r}: must be a whole number from {lowest} to {2**32 - 1}")


def _require_text(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} has a lone surrogate at character {error.start}, which is no UTF-8 text") from error


def load_model(workdir: str, step: int | None = None) -> TrainedModel:
    """The language model of a run: its newest undamaged checkpoint, or that of `step`.

        model = darkformer_jax.load_model("runs/quickstart")
        model.generate("def ")
        model.logits(model.tokenizer.encode("def f(x):"))
        model.score("def f(x):\\n    return x\\n").bits_per_byte

    Raises:
      UserError: no config, no checkpoint, a damaged one, or a model of another task.
    """
    return TrainedModel(load_language_model(Workdir(workdir), step))
