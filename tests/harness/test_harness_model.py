"""The same requests to `HarnessModel` and to the harness' own model `hf`: the same ids, scores and texts."""

import warnings

import pytest

from darkformer_jax.data.progress import no_progress
from darkformer_jax.errors import UserError
from tests.harness.tiny_harness import CHATML, TEXTS, write_llama
from tests.pretrained.tiny_sources import import_source

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from darkformer_jax.harness.harness_model import HarnessModel

MAX_LENGTH = 48


class Both:
    """The model here and there."""

    def __init__(self, directory, bos):
        source = write_llama(directory / "hf", bos)
        self.loaded = import_source(source, directory / "workdir")
        self.ours = HarnessModel(self.loaded, MAX_LENGTH, 3, 0, no_progress)
        with warnings.catch_warnings():  # of torch, transformers and the harness
            warnings.simplefilter("ignore")
            # Without its cache, which gives a wrong likelihood where continuations of different lengths end alike.
            options = {"batch_size": 3, "max_length": MAX_LENGTH, "logits_cache": False}
            self.theirs = HFLM(pretrained=str(source), device="cpu", **options)

    def ask(self, kind, *arguments):
        """(our answers, theirs) to requests with these arguments."""
        requests = [
            Instance(request_type=kind, doc={}, arguments=one, idx=n, metadata=("my_task", n, 1))
            for n, one in enumerate(arguments)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(self.theirs, kind)(requests, disable_tqdm=True)
        return getattr(self.ours, kind)(requests), theirs


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def both(request, tmp_path_factory):
    return Both(tmp_path_factory.mktemp("model"), request.param)


def test_texts_become_the_same_ids(both):
    assert both.ours.prefix_token_id == both.theirs.prefix_token_id
    assert both.ours.eot_token_id == both.theirs.eot_token_id
    for text in (*TEXTS, "", " ", "the<|doc|>cat", "<|doc|>the cat", "<|im_start|>user\nHi<|im_end|>\n"):
        for special in (None, False):
            assert both.ours.tok_encode(text, special) == both.theirs.tok_encode(text, special), (text, special)


def test_continuations_have_the_same_likelihoods(both):
    pairs = [(TEXTS[0], choice) for choice in (" A", " B", " the cat")]
    pairs += [("The cat  ", "sat"), ("The cat", " sat on the mat."), ("", "The cat"), ("", " sat"), (" One", "\nTwo")]
    pairs += [(" ".join(TEXTS) * 3, " the cat sat"), ("<|doc|>The", " dog"), ("The cat <|im_end|>", "\n")]
    ours, theirs = both.ask("loglikelihood", *pairs)
    for pair, (logp, is_greedy), (wanted, wanted_greedy) in zip(pairs, ours, theirs, strict=True):
        assert logp == pytest.approx(wanted, rel=1e-4) and is_greedy == wanted_greedy, pair


def test_whole_texts_have_the_same_likelihoods_in_windows(both):
    texts = [(text,) for text in (*TEXTS, TEXTS[0] * 12, TEXTS[1] * 3)]
    assert len(both.ours.tok_encode(texts[3][0])) > 3 * MAX_LENGTH
    ours, theirs = both.ask("loglikelihood_rolling", *texts)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_empty_text_has_the_likelihood_one(both):
    if not both.loaded.tokenizer.adds_bos:  # else its BOS is predicted
        assert both.ask("loglikelihood_rolling", ("",), ("a",))[0][0] == 0.0


def test_the_same_texts_are_written(both):
    options = {"until": ["e ", "\n\n"], "max_gen_toks": 12}
    contexts = [*TEXTS, "The", " ".join(TEXTS) * 2]
    ours, theirs = both.ask("generate_until", *[(text, options) for text in contexts])
    assert ours == theirs and len(set(ours)) > 1
    stop = next(text for text in ours if len(text) > 2)[1:3]
    shorter, theirs = both.ask("generate_until", *[(text, options | {"until": stop}) for text in contexts])
    assert shorter == theirs and shorter != ours and not any(stop in text for text in shorter)


def test_draws_differ_between_batches_and_repeat_with_the_seed(both):
    if both.loaded.tokenizer.adds_bos:
        return  # it draws alike
    options = {"do_sample": True, "temperature": 3.0, "top_k": 50, "top_p": 0.9, "max_gen_toks": 6}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=("The", options), idx=n, metadata=("t", n, 1))
        for n in range(6)
    ]
    first, again, other = (
        HarnessModel(both.loaded, MAX_LENGTH, 3, seed, no_progress).generate_until(requests) for seed in (0, 0, 7)
    )
    assert first == again and first != other
    assert len(set(first)) > 3 and first[:3] != first[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "my_task: num_beams = 4 is not supported; allowed: until, do_sample, temperature, top_k"),
        ({"until": ["a", 3]}, r"my_task: until = \['a', 3\]; allowed: a string or a list of strings"),
        ({"until": {"a": "b"}}, r"my_task: until = \{'a': 'b'\}; allowed"),
        ({"max_gen_toks": 0}, "my_task: max_gen_toks = 0: must be at least 1"),
        ({"max_gen_toks": 48}, "--max_length=48: my_task wants 48 new tokens .* leaves none for the context"),
        ({"max_gen_toks": "many"}, "my_task: .*many"),
        ({"do_sample": True}, "my_task: do_sample with temperature = 0.0: must be above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_options_that_cannot_be_are_refused(both, options, message):
    one = Instance("generate_until", {}, ("The", {"max_gen_toks": 8} | options), 0, ("my_task", 0, 1))
    with pytest.raises(UserError, match=message):
        both.ours.generate_until([one])


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        (
            "The",
            " cat" * 60,
            r"my_task: the continuation ' cat cat.*' of document 5 has \d+ tokens; allowed: 1 to",
        ),
        ("The", "", "my_task: the continuation '' of document 5 has 0 tokens"),
        ("", "", "my_task: the continuation '' of document 5 has 0 tokens"),
    ],
)
def test_continuations_that_cannot_be_are_refused(both, context, continuation, message):
    with pytest.raises(UserError, match=message):
        both.ours.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0, ("my_task", 5, 1))])


def test_chat_templates_write_the_same_conversations(both):
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who sat on the mat? "}]
    begun = [*question, {"role": "assistant", "content": "The "}]
    if both.loaded.tokenizer.chat_template is None:
        with pytest.raises(UserError, match="--apply_chat_template: this model's tokenizer has no chat template"):
            both.ours.apply_chat_template(question)
        return
    assert both.ours.chat_template(True) == CHATML
    for messages, prompt in ((question, True), (begun, False)):
        written = both.ours.apply_chat_template(messages, prompt)
        assert written == both.theirs.apply_chat_template(messages, prompt)
        assert both.ours.tok_encode(written) == both.theirs.tok_encode(written)
    assert written.endswith("<|im_start|>assistant\nThe ")


def test_a_space_is_no_context(both):
    ours = both.ours.loglikelihood([Instance("loglikelihood", {}, (" ", "The"), 0, ("t", 0, 1))])
    wanted, _ = both.ask("loglikelihood", ("", " The"))
    if not both.loaded.tokenizer.adds_bos:
        assert ours == wanted
