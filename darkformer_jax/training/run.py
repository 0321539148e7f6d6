"""What `train.py` does: from a config to a finished workdir."""

import shlex
import time

import jax
import ml_collections

from darkformer_jax.cli.progress import Progress
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.validation import validate
from darkformer_jax.data import PREPARED_SOURCE, Data, load_data, load_tokenizer
from darkformer_jax.data.tokenizers import (
    bpe_vocab_size,
    decode_continuation,
    encode_prompt,
    has_tokenizer,
    make_tokenizer,
)
from darkformer_jax.distributed import processes
from darkformer_jax.model.sampling import Sampler, continue_prompts
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.runs.mirror import Mirror
from darkformer_jax.runs.origin import hand_on_origin
from darkformer_jax.runs.store import local_path
from darkformer_jax.runs.workdir import (
    Workdir,
    WorkdirLock,
    check_config,
    check_data,
    write_atomically,
    write_config,
    write_data,
)
from darkformer_jax.training.evaluation import Evaluation
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.goodput import Stopwatch, describe, read_sessions
from darkformer_jax.training.init_from import check_same_tokenizer
from darkformer_jax.training.loop import Run
from darkformer_jax.training.pictures import compressors, loss_curve
from darkformer_jax.training.step import TrainState


def dry_run(config: ml_collections.ConfigDict) -> None:
    """Prints the experiment's sizes. Reads the tokenizer, allocates nothing on a device."""
    config = inherit(config)
    validate(config)
    processes.require_same("config", dict(flat_fields(config.to_dict())))
    description = Experiment.of(config, vocab_size_of(config)).describe()
    if jax.process_index() == 0:
        print(description)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains to the last step and reports. See `Run.train` for what it raises."""
    processes.require_shared(
        Workdir(workdir).shared, f"workdir {workdir}"
    )  # first of all, because what this run is depends on what is there
    config = inherit(config, workdir)
    validate(config)
    processes.require_same("config", dict(flat_fields(config.to_dict())))
    check_config(workdir, config.to_dict())
    with WorkdirLock(workdir) as lock, Mirror(workdir) as mirror:
        _run(config, workdir, lock, mirror)


def _run(config: ml_collections.ConfigDict, workdir: str, lock: WorkdirLock, mirror: Mirror) -> None:
    progress = Progress(config.num_steps, config.log.every)
    started, watch = time.perf_counter(), Stopwatch(workdir)
    progress.note(f"workdir {workdir}; reading {config.data.source} {config.data.files}".rstrip())
    data = _load_data(config, workdir)
    # After this all have read what process 0 is about to write.
    processes.require_same("data", {"fingerprint": data.fingerprint, "tokenizer": data.tokenizer.fingerprint})
    check_data(workdir, data.fingerprint)
    if config.init_from:
        check_same_tokenizer(config.init_from, data.tokenizer.fingerprint)
    experiment = Experiment.of(config, data.tokenizer.vocab_size)
    progress.note(
        f"{data.train.num_tokens:,} training tokens, {data.heldout.num_tokens:,} held out; "
        f"training {experiment.num_trained:,} of {experiment.num_params:,} parameters; "
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    )
    training = Run(experiment, data, workdir, watch, mirror)
    step, state = training.start(progress)
    write_config(workdir, config.to_dict())  # only now: a mistake in data or init_from must not claim the directory
    lock.take()
    write_data(workdir, data.fingerprint)
    if jax.process_index() == 0:
        directory = str(local_path(workdir))
        if not has_tokenizer(directory):
            data.tokenizer.save(directory)
        if config.init_from:
            hand_on_origin(config.init_from, workdir)
    mirror.upload()
    state, evaluation = training.train(step, state, progress)
    if jax.process_index() == 0:
        _report(experiment, data, workdir, state, evaluation, time.perf_counter() - started)


def _load_data(config: ml_collections.ConfigDict, workdir: str) -> Data:
    d = config.data
    directory = str(local_path(workdir))
    tokenizer_dir = directory if has_tokenizer(directory) else None
    part = (jax.process_index(), jax.process_count())
    tokenizer = _tokenizer(config, tokenizer_dir)
    return load_data(d.source, d.files, tokenizer, d.heldout_fraction, tokenizer_dir, verify=part)


def _tokenizer(config: ml_collections.ConfigDict, tokenizer_dir: str | None) -> str:
    """What `data.tokenizer` says; where it says nothing, the run's own once it has one, else `init_from`'s."""
    d = config.data
    if d.tokenizer or d.source == PREPARED_SOURCE:
        return d.tokenizer
    return tokenizer_dir or (str(local_path(config.init_from)) if config.init_from else "")


def vocab_size_of(config: ml_collections.ConfigDict) -> int:
    """Of the model, without reading the text: a dry run of lm_1b must not need the corpus."""
    d = config.data
    if config.model.vocab_size:
        return config.model.vocab_size
    tokenizer = _tokenizer(config, None)
    if tokenizer.startswith("bpe:"):
        return bpe_vocab_size(tokenizer)
    if tokenizer:
        return make_tokenizer(tokenizer, tuple).vocab_size  # no text is needed: nothing is trained
    return load_tokenizer(d.files).vocab_size


def _report(
    experiment: Experiment, data: Data, workdir: str, state: TrainState, evaluation: Evaluation, seconds: float
) -> None:
    print(f"\n{workdir}: step {int(state.step)} after {seconds:.0f} s")
    print(f"held out ({evaluation.tokens:,} tokens): {evaluation}")
    if sessions := read_sessions(local_path(workdir)):  # none of a run that an earlier version finished
        print(describe(sessions))
    text = data.heldout_text()
    if text:
        others = "  ".join(f"{name} {bits:.3f}" for name, bits in compressors(text).items())
        print(f"bits per byte of the same {len(text):,} bytes: this model {evaluation.bits_per_byte:.3f}  {others}")
    if experiment.config.sample.prompts and jax.process_count() == 1:  # this process alone has not the whole state
        samples = sample(experiment, data, state)
        print("\n" + samples)
        write_atomically(local_path(workdir) / "samples.txt", samples.encode())
    print(f"loss curve: {workdir}/{loss_curve(workdir).name}")
    print(f"more samples: python -m darkformer_jax.generate --workdir={shlex.quote(workdir)} --prompt='def '")


def sample(experiment: Experiment, data: Data, state: TrainState) -> str:
    """The config's prompts and how the model continues them."""
    s, tokenizer = experiment.config.sample, data.tokenizer
    sampler = Sampler(
        experiment.network,
        state.params,
        state.projections,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        seed=experiment.config.seed,
        vocab_size=tokenizer.vocab_size,
    )
    ids = [encode_prompt(tokenizer, prompt) for prompt in s.prompts]
    continued = continue_prompts(sampler, ids, s.max_new_tokens, {tokenizer.eos_id})
    blocks = (
        f"--- {prompt!r}\n{prompt}{decode_continuation(tokenizer, prompt_ids, new)}"
        for prompt, prompt_ids, new in zip(s.prompts, ids, continued, strict=True)
    )
    return "\n".join(blocks) + "\n"
