"""A run's language model as the harness sees models: requests in, log-likelihoods and texts out.

Texts become ids as in the harness' own model for Hugging Face (`hf`), so that both give the same scores:

* A text that spells a special token, as chat templates do, has that token.
* A BOS precedes a text where the family puts one, unless the text spells it itself. `loglikelihood_rolling` predicts
  this BOS, too.
* Trailing spaces of a context belong to the continuation. What follows an empty context follows the token that
  `prefix_token_id` says.
* Where a context does not fit, its end is kept.
"""

import functools
import itertools
import operator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from darkformer_jax.data.chat_template import ChatTemplate, without_marks
from darkformer_jax.data.progress import ProgressBar, with_progress
from darkformer_jax.errors import UserError
from darkformer_jax.harness.generation import Options, StopWriter, read_options
from darkformer_jax.harness.likelihoods import Pair, PairScorer
from darkformer_jax.runs.load import WorkdirModel


class HarnessModel(TemplateLM):
    """The model of the harness' `evaluate`.

    Args:
      model: a language model.
      max_length: the most tokens that it sees at once. A longer text of `loglikelihood_rolling` is read in separate
        windows, each of which begins with the token before it.
      batch_size: rows at a time.
      seed: of the draws where a task asks for a temperature.
      progress_bar: shows the work.
    """

    def __init__(
        self, model: WorkdirModel, max_length: int, batch_size: int, seed: int, progress_bar: ProgressBar
    ) -> None:
        super().__init__()
        self._model, self._progress_bar = model, progress_bar
        self.max_length, self.batch_size = max_length, batch_size
        self._scorer = PairScorer(model, batch_size, max_length)
        self._writer = StopWriter(model, seed)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text that nothing precedes: a BOS if the tokenizer names one, else the end of a document."""
        tokenizer = self._model.tokenizer
        bos = tokenizer.added_tokens.get(tokenizer.token_names.get("bos_token", ""))
        return tokenizer.bos_id if tokenizer.adds_bos or bos is None else bos.id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text. add_special_tokens: whether a BOS precedes it; None = where the family puts one."""
        tokenizer = self._model.tokenizer
        ids: list[int] = tokenizer.encode_with_added([string])[0].ids.tolist()
        spelt = add_special_tokens is None and ids[:1] == [tokenizer.bos_id]
        return ids if add_special_tokens is False or spelt or not tokenizer.adds_bos else [tokenizer.bos_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether each of its tokens is the likeliest) of each request.

        Raises UserError for a continuation without tokens, or with more than `max_length`.
        """
        shown = with_progress(requests, "request", self._progress_bar, "tokenizing")
        return self._loglikelihood_tokens([(request.args, *self._pair(request)) for request in shown])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats of each request; every token is predicted once. That of an empty text is 0."""
        windows: list[list[tuple[Any, list[int], list[int]]]] = []
        for request in with_progress(requests, "request", self._progress_bar, "tokenizing"):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(window)) for window in rolling])
        answers = iter(self._loglikelihood_tokens(list(itertools.chain.from_iterable(windows))))
        return [sum((next(answers)[0] for _ in of_request), 0.0) for of_request in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, without the stop string that ends it.

        Requests with the same options are batches together, the longest contexts first.

        Raises UserError for options that are not supported, and for a task that wants more tokens than `max_length`
        leaves to its context.
        """
        texts: dict[int, str] = {}
        of_options: dict[Options, list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            options = read_options(request.args[1], request.task_name)
            room = self.max_length - options.max_tokens
            if room < 1:
                raise UserError(
                    f"--max_length={self.max_length}: {request.task_name} wants {options.max_tokens} new tokens "
                    "(max_gen_toks), which leaves none for the context"
                )
            ids = self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id]
            of_options.setdefault(options, []).append((index, ids))
        with self._progress_bar(len(requests), "text", "generating") as bar:
            for options, prompts in of_options.items():
                prompts.sort(key=lambda prompt: -len(prompt[1]))
                size = min(self.batch_size, len(prompts))
                for begin in range(0, len(prompts), size):
                    batch = prompts[begin : begin + size]
                    written = self._writer.write([ids for _, ids in batch], options, size)
                    texts.update(zip((index for index, _ in batch), written, strict=True))
                    bar.update(len(batch))
        return [text for _, text in sorted(texts.items(), key=operator.itemgetter(0))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template writes it, for an answer that comes next.

        Without a generation prompt, the last message is the beginning of an answer, which the model continues.

        Raises UserError if the tokenizer has no template, or if it refuses the conversation.
        """
        text = without_marks(self._chat_template.render(chat_history, add_generation_prompt))
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].lstrip()
        for written in (begun, begun.rstrip()):  # some templates strip messages
            if written in text:
                return text[: text.rindex(written) + len(written)]
        raise UserError("--apply_chat_template: the template does not write an answer as it begins")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, if there is one and it is asked for."""
        return self._model.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name for requests that the harness keeps."""
        return self._model.tokenizer.fingerprint

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise UserError("--apply_chat_template: this model's tokenizer has no chat template")
        return ChatTemplate(tokenizer.chat_template, tokenizer.token_names)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        likelihoods = self._scorer.score(pairs, self._progress_bar)
        return [(likelihood.log_probability, likelihood.is_greedy) for likelihood in likelihoods]

    def _pair(self, request: Instance) -> tuple[list[int], list[int]]:
        context, continuation = request.args
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                after = after[1:]
        if not before:  # a context of spaces alone, which belong to the continuation
            before = [self.prefix_token_id]
        if not 1 <= len(after) <= self.max_length:
            raise UserError(
                f"{request.task_name}: the continuation {continuation[:40]!r} of document {request.doc_id} has "
                f"{len(after)} tokens; allowed: 1 to --max_length={self.max_length}"
            )
        return before, after
