"""Causal language modelling: next-token prediction on texts, judged by bits per byte of held-out text."""

import dataclasses
import gzip
import lzma
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import ml_collections
import numpy as np

from darkformer_jax.config.base import LABELLED_SOURCE
from darkformer_jax.data import (
    Batch,
    ChatStream,
    Data,
    Mixture,
    Split,
    data_of_texts,
    heldout_batches,
    load_data,
    num_rows,
    train_batches,
)
from darkformer_jax.data.chat_template import Message
from darkformer_jax.data.files import write_atomically
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.tokenizers import encode_prompt
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.errors import printable
from darkformer_jax.model.network import Network
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.origin import ends_of_text
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.amounts import too_little_heldout_text, too_little_text
from darkformer_jax.tasks.labelled import read_splits
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.tasks.prompts import heldout_prompts, heldout_questions
from darkformer_jax.tasks.task import ScoreRequest, Scores
from darkformer_jax.tasks.teacher import Teacher
from darkformer_jax.tasks.text_scores import score_text
from darkformer_jax.tasks.texts import Writer, headed
from darkformer_jax.tasks.tokenizer import check_same_tokenizer, tokenizer_of, vocab_size_of

SAMPLES_FILE = "samples.txt"


class TextEvaluation(NamedTuple):
    """The figures of a language model on held-out text."""

    loss: float  # nats per token
    bits_per_byte: float  # comparable across tokenizers
    accuracy: float  # share of tokens whose successor has the largest logit
    tokens: int
    of_sources: tuple[tuple[str, float], ...] = ()  # the name of each source of a mixture, and its bits per byte

    @classmethod
    def of(cls, sums: Mapping[str, np.ndarray], tokens_per_byte: float) -> "TextEvaluation":
        """The figures for added `token_sums`. tokens_per_byte: predicted tokens / bytes of text, in the whole split."""
        tokens = max(float(sums["weight"]), 1.0)
        loss = float(sums["nll"]) / tokens
        bits = loss / math.log(2) * tokens_per_byte
        return cls(loss, bits, float(sums["correct"]) / tokens, int(sums["weight"]))

    @property
    def size(self) -> str:
        """How much was predicted."""
        return f"{self.tokens:,} tokens"

    def as_metrics(self) -> dict[str, float]:
        """The figures by their names in metrics.jsonl."""
        own = {name: value for name, value in self._asdict().items() if name != "of_sources"}
        of_sources = {f"bits_per_byte/{name}": bits for name, bits in self.of_sources}
        return {f"heldout_{name}": value for name, value in (own | of_sources).items()}

    def __str__(self) -> str:
        of_sources = "".join(f"  {name} {bits:.4f}" for name, bits in self.of_sources)
        return f"loss {self.loss:.4f}  bits per byte {self.bits_per_byte:.4f}  accuracy {100 * self.accuracy:.2f}%" + (
            f"  bits per byte by source:{of_sources}" if of_sources else ""
        )


class SamplePrompt(NamedTuple):
    """What a sample continues.

    Attributes:
      text: the prompt, for the line above the sample.
      ids: its tokens.
      shown: what stands before the continuation.
    """

    text: str
    ids: list[int]
    shown: str


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The task of predicting the next token; see `tasks.task.Task`.

    Attributes:
      config: the run's.
      data: both splits and their tokenizer.
      teacher: None = the model learns from text alone.
    """

    config: ml_collections.ConfigDict
    data: Data
    teacher: Teacher | None

    best = "heldout_loss"
    loss_unit: ClassVar[str] = "nats per token"

    @classmethod
    def objective_of(cls, config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> NextToken:
        """The objective of a config, without a teacher."""
        return NextToken.of(config, vocab_size_of(config, workdir))

    @classmethod
    def objective_before_data(cls, config: ml_collections.ConfigDict, workdir: Workdir) -> NextToken | None:
        """The objective, unless a tokenizer is to be trained, which may get fewer ids than it is asked for."""
        objective = cls.objective_of(config, workdir)
        return None if config.data.tokenizer.startswith("bpe:") and not config.model.vocab_size else objective

    @classmethod
    def load(
        cls, config: ml_collections.ConfigDict, workdir: Workdir, progress_bar: ProgressBar = no_progress
    ) -> "LanguageModel":
        """Reads both splits. The first use of `constants` reads the teacher's weights."""
        data = _read(config, workdir, progress_bar)
        fingerprint = data.tokenizer.fingerprint
        if config.init_from:
            check_same_tokenizer(Workdir(config.init_from), fingerprint, "init_from")
        teacher = Teacher.of(config, data.tokenizer.vocab_size, fingerprint) if config.distill.workdir else None
        return cls(config, data, teacher)

    @property
    def objective(self) -> NextToken:
        """The objective for this tokenizer, with the teacher if there is one."""
        network = self.teacher.network if self.teacher else None
        return NextToken.of(self.config, self.data.tokenizer.vocab_size, network)

    @property
    def constants(self) -> tuple[dict, dict] | None:
        """The teacher's parameters and projections."""
        return self.teacher.arrays if self.teacher else None

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """SHA-256 of both splits' tokens, and the tokenizer's fingerprint."""
        return {"data": self.data.fingerprint, "tokenizer": self.data.tokenizer.fingerprint}

    def train_batches(self, start_step: int, part: Part) -> Iterator[Batch]:
        """The batches of `darkformer_jax.data.train_batches`."""
        return train_batches(
            self.data.train,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            start_step=start_step,
            num_workers=self.config.data.num_workers,
            process_index=part.index,
            process_count=part.count,
        )

    def heldout_batches(self, max_batches: int, part: Part) -> Iterator[Batch]:
        """The batches of `darkformer_jax.data.heldout_batches`."""
        return heldout_batches(
            self.data.heldout,
            batch_size=self.config.eval.batch_size,
            sequence_length=self.config.sequence_length,
            max_batches=max_batches,
            process_index=part.index,
            process_count=part.count,
        )

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> TextEvaluation:
        """The figures, as means over tokens. `rows` is empty unless the data is a mixture."""
        heldout = self.data.heldout
        evaluation = TextEvaluation.of(sums, tokens_per_byte(heldout))
        return (
            evaluation._replace(of_sources=bits_of_sources(heldout, rows))
            if isinstance(heldout, Mixture)
            else evaluation
        )

    @property
    def warnings(self) -> list[str]:
        """What is too little text, of each source and of the held-out text."""
        c, train = self.config, self.data.train
        sources = [("", train, 1.0)]
        if isinstance(train, Mixture):
            sources = list(zip(train.names, train.streams, train.shares, strict=True))
        said = [
            too_little_text(
                name,
                text.num_tokens if isinstance(text, ChatStream) else text.num_targets,  # which fill the rows
                c.sequence_length,
                drawn=share * c.num_steps * c.batch_size,
                batch_size=share * c.batch_size,
                num_steps=c.num_steps,
            )
            for name, text, share in sources
        ]
        return [*filter(None, [*said, too_little_heldout_text(self.data.heldout.num_targets, c.sequence_length)])]

    def save(self, workdir: Workdir) -> None:
        """Writes the tokenizer if the workdir has none."""
        if workdir.tokenizer_dir is None:
            self.data.tokenizer.save(str(workdir.local))

    def report(self, network: Network, params: dict, projections: dict, workdir: Workdir, last: TextEvaluation) -> str:
        """Prints bits per byte, those of general compressors for comparison, and samples. Writes samples.txt."""
        text = self.data.heldout_text()
        if text:
            others = "  ".join(f"{name} {bits:.3f}" for name, bits in compressors(text).items())
            print(
                f"bits per byte of the same {len(text):,} bytes: this model {last.bits_per_byte:.3f}  {others} (what a "
                "byte costs if the model's predictions compress the text; plain text costs 8, and less is better)"
            )
        prompts, where = self._prompts()
        if prompts and jax.process_count() == 1:  # else no process has the whole state
            samples = where + self._samples(prompts, network, params, projections, workdir)
            print("\n" + samples)
            write_atomically(workdir / SAMPLES_FILE, samples.encode())
        prompt = printable(prompts[0].text.strip().partition("\n")[0]) if prompts else "The "
        return (
            f"more samples: python -m darkformer_jax.generate --workdir={shlex.quote(str(workdir))} "
            f"{'--chat ' if self.data.chat else ''}--prompt={shlex.quote(prompt)}"
        )

    @classmethod
    def score(cls, workdir: Workdir, step: int | None, request: ScoreRequest, progress_bar: ProgressBar) -> Scores:
        """Scores text by quarter of the window."""
        return score_text(workdir, step, request, progress_bar)

    def _prompts(self) -> tuple[list[SamplePrompt], str]:
        """(the config's prompts, each "" replaced by held-out text, a line that says where that is from)."""
        given, data = self.config.sample.prompts, self.data
        own = [prompt for prompt in given if prompt]
        if data.chat is not None:
            held_out = heldout_questions(data.heldout_conversations, given.count("")) if "" in given else []
            asked: list[list[Message]] = held_out + [[{"role": "user", "content": prompt}] for prompt in own]
            prompts = [SamplePrompt(messages[-1]["content"], data.chat.prompt(messages), "") for messages in asked]
            return prompts, "answers to held-out conversations:\n" if held_out else ""
        pieces = heldout_prompts(data.heldout, data.tokenizer, given.count("")) if "" in given else []
        texts = [piece.text for piece in pieces] + own
        places = ", ".join(f"{piece.place:.0%}" for piece in pieces)
        prompts = [SamplePrompt(text, encode_prompt(data.tokenizer, text), text) for text in texts]
        return prompts, f"prompts from the held-out text, at {places} of it:\n" if pieces else ""

    def _samples(
        self, prompts: Sequence[SamplePrompt], network: Network, params: dict, projections: dict, workdir: Workdir
    ) -> str:
        """The prompts and the model's continuations, as `generate` prints them."""
        s, tokenizer = self.config.sample, self.data.tokenizer
        sampler = Sampler(
            network,
            params,
            projections,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            seed=self.config.seed,
            vocab_size=tokenizer.vocab_size,
        )
        ends = ends_of_text(workdir) | {tokenizer.eos_id} | (self.data.chat.ends if self.data.chat else set())
        texts = Writer(sampler, tokenizer, ends).continue_all([prompt.ids for prompt in prompts], s.max_new_tokens)
        return "".join(headed(p.text, p.shown + text) for p, text in zip(prompts, texts, strict=True))

    def __str__(self) -> str:
        taught = f", taught by step {self.teacher.step} of {self.config.distill.workdir}" if self.teacher else ""
        train = self.data.train
        if isinstance(train, ChatStream):
            learned = _conversations(train, self.config.sequence_length)
            return f"{learned}; {self.data.heldout.num_targets:,} tokens of answers held out{taught}"
        sources = f" ({'; '.join(self._sources(train))})" if isinstance(train, Mixture) else ""
        return f"{train.num_tokens:,} training tokens{sources}, {self.data.heldout.num_tokens:,} held out{taught}"

    def _sources(self, train: Mixture) -> Iterator[str]:
        """What the run reads of each source."""
        c = self.config
        for name, stream, share in zip(train.names, train.streams, train.shares, strict=True):
            epochs = share * c.num_steps * c.batch_size / num_rows(stream, c.sequence_length)
            yield f"{name}: {100 * share:.4g}% of the rows, {stream.num_tokens:,} tokens, {epochs:.3g} epochs"


def _read(config: ml_collections.ConfigDict, workdir: Workdir, progress_bar: ProgressBar) -> Data:
    """Both splits. Of labelled files they are a classifier's texts, to the row, without the labels."""
    d = config.data
    tokenizer = tokenizer_of(config, workdir)
    if d.source == LABELLED_SOURCE:
        training, heldout = ([example.text for example in side] for side in read_splits(config))
        return data_of_texts(training, heldout, tokenizer, workdir.tokenizer_dir, progress_bar)
    return load_data(
        d.source,
        d.files,
        tokenizer,
        d.heldout_fraction,
        workdir.tokenizer_dir,
        text_field=d.text_field,
        verify=(jax.process_index(), jax.process_count()),
        progress_bar=progress_bar,
    )


def _conversations(stream: ChatStream, row_length: int) -> str:
    """What there is to learn."""
    said = (
        f"{stream.num_documents:,} conversations, {stream.num_tokens:,} training tokens, of which the "
        f"{stream.num_targets:,} of answers count in the loss"
    )
    cut = stream.num_cut(row_length)
    return said + (f"; {cut:,} go on in another row, which does not see their beginning" if cut else "")


def tokens_per_byte(split: Split) -> float:
    """Predicted tokens / bytes of text, the factor that turns nats per token into bits per byte."""
    return split.num_targets / split.num_bytes


def bits_of_sources(heldout: Mixture, rows: Mapping[str, np.ndarray]) -> tuple[tuple[str, float], ...]:
    """(name, bits per byte) of each source of which rows were measured. rows: see `NextToken.measure`."""
    nll, weight = (
        np.bincount(rows["source"], rows[name].astype(np.float64), minlength=len(heldout.names))
        for name in ("nll", "weight")
    )
    return tuple(
        (name, float(nll[number] / weight[number]) / math.log(2) * tokens_per_byte(heldout.streams[number]))
        for number, name in enumerate(heldout.names)
        if weight[number]
    )


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte of `data` under `gzip -9` and `xz -9`, which a language model should beat.

    They take about 0.1 s and 0.5 s per MB, and xz up to 0.7 GB of memory. Raises ValueError if `data` is empty.
    """
    if not data:
        raise ValueError("nothing to compress")
    return {
        "gzip -9": 8 * len(gzip.compress(data, compresslevel=9)) / len(data),
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }
