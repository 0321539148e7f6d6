"""An exported classifier in PyTorch is the model that it was here, reads the same ids, learns there and comes back."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import scipy.special
import sentencepiece
import tokenizers

from darkformer_jax import predict
from darkformer_jax.config import base
from darkformer_jax.data.labelled import Columns, LabelledRows, read_examples
from darkformer_jax.data.tokenizers import (
    BytesTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    save_for_transformers,
    train_bpe,
)
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.classifiers import fit_tokenizer
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.load import plan_import
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classes
from tests.data.chats import chat_tokenizer
from tests.pretrained import exported_models
from tests.pretrained.exported_classifiers import (
    LENGTH,
    MODELS,
    NAMES,
    TEXTS,
    batch_of,
    exported,
    load,
    our_outputs,
    tokenizer_of,
    torch_outputs,
)
from tests.pretrained.tiny_models import torch, transformers
from tests.pretrained.tiny_sources import import_source
from tests.tiny_runs import saved_arrays

LABELS = {"dark": [1, 0, 2, 1], "number-of-gemma": [0.5, -1.0, 3.0, 2.0]}

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close_to(wanted):
    return {"atol": 1e-5 * np.abs(wanted).max(), "rtol": 0}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_this_package(name, side):
    model = exported(name)
    assert np.ptp(model.outputs, axis=0).min() > 0.1
    found = torch_outputs(model.theirs, batch_of(model, side))
    np.testing.assert_allclose(found, model.outputs, **close_to(model.outputs))


@pytest.mark.parametrize("name", ["dark", "mean"])
def test_a_text_alone_has_its_logits_of_the_batch(name):
    model = exported(name)
    for text, wanted in zip(TEXTS, model.outputs, strict=True):
        ids = torch.tensor([model.tokenizer(text, truncation=True)["input_ids"]])
        np.testing.assert_allclose(torch_outputs(model.theirs, {"input_ids": ids})[0], wanted, **close_to(wanted))


@pytest.mark.parametrize("name", ["dark", "mean"])
def test_a_row_of_padding_alone_has_the_bias_as_here(name):
    model = exported(name)
    batch = batch_of(model)
    batch["attention_mask"][1] = 0
    found = torch_outputs(model.theirs, batch)
    np.testing.assert_array_equal(found[1], model.theirs.score.bias.detach().numpy())
    np.testing.assert_allclose(found[[0, 2, 3]], model.outputs[[0, 2, 3]], **close_to(model.outputs))


@pytest.mark.parametrize("name", LABELS)
def test_the_loss_is_that_of_the_task(name):
    model, labels = exported(name), np.array(LABELS[name])
    outputs = model.outputs.astype(np.float64)
    if name == "dark":
        wanted = -np.mean(scipy.special.log_softmax(outputs, axis=1)[np.arange(4), labels])
    else:
        wanted = np.mean(np.square(outputs[:, 0] - labels))
    loss = model.theirs(**batch_of(model), labels=torch.tensor(LABELS[name])).loss
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_half_precision_keeps_the_head_in_float32():
    model = exported("dark")
    half = load(model.directory, dtype=torch.bfloat16)
    assert half.score.weight.dtype == half.score.bias.dtype == torch.float32
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    found = torch_outputs(half, batch_of(model))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - model.outputs).max() < 0.05 * np.abs(model.outputs).max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.theirs(**batch_of(model)).logits.dtype == torch.float32


PAIRS = [
    {"first": "a man plays ", "second": " <|im_end|> the flute", "label": "x"},
    {"first": "two\n", "second": "\n\nthree", "label": "x"},
    {"first": " ".join(map(str, range(40))), "second": "never read", "label": "x"},
    {"first": "Käfer <|doc|>", "second": "日本", "label": "y"},
]


def sentencepiece_tokenizer():
    """As an old Llama has: no tokenizer.json, and a config that does not say whether a BOS begins a text."""
    model, words = io.BytesIO(), "a man plays the flute two three never read one"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 9),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue(), {"tokenizer_class": "LlamaTokenizer"})


TOKENIZERS = {
    "bytes": BytesTokenizer,
    "BPE with a BOS": lambda: train_bpe(300, [f"{pair['first']}\n{pair['second']}" for pair in PAIRS]),
    "published, without a BOS": chat_tokenizer,
    "published, with one": lambda: chat_tokenizer(adds_bos=True),
    "SentencePiece": sentencepiece_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_and_pairs_have_the_ids_of_the_task(name, tmp_path):
    tokenizer, files = TOKENIZERS[name](), tmp_path / "data.jsonl"
    files.write_text("\n".join(map(json.dumps, PAIRS)))
    save_for_transformers(tokenizer, str(tmp_path))
    fit_tokenizer(tmp_path, tokenizer, 16)
    theirs = tokenizer_of(tmp_path)
    theirs.padding_side = "right"
    texts = {
        "first": [pair["first"] for pair in PAIRS],
        "first,second": [f"{pair['first']}\n{pair['second']}" for pair in PAIRS],
    }
    for column, joined in texts.items():
        rows = LabelledRows(read_examples(str(files), Columns(column, "label")), np.zeros(4), tokenizer, 16)
        assert 0 < rows.cut_share < 1
        batch, found = rows.read(np.arange(4)), theirs(joined, padding="max_length", truncation=True)
        np.testing.assert_array_equal(found["attention_mask"], batch["segment_ids"])
        np.testing.assert_array_equal(np.where(batch["segment_ids"], found["input_ids"], 0), batch["inputs"])


def test_a_tokenizer_that_puts_a_token_after_a_text_is_refused(tmp_path):
    tokenizer = chat_tokenizer(adds_bos=True)
    tokenizer.save(str(tmp_path))
    definition = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ends = [("<|doc|>", 0), ("<|im_end|>", 301)]
    definition.post_processor = tokenizers.processors.TemplateProcessing("<|doc|> $A <|im_end|>", None, ends)
    definition.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=re.escape("puts <|doc|> <|im_end|> around a text; in training there was")):
        fit_tokenizer(tmp_path, load_tokenizer(str(tmp_path)), 16)


def test_a_pair_that_the_tokenizer_joins_is_refused():
    model = exported("exact")
    pair = model.tokenizer("A man plays.", "No.", return_tensors="pt")
    with pytest.raises(ValueError, match=re.escape('a line feed between both: tokenizer(f"{first}\\n{second}")')):
        model.theirs(**pair)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_refused_because_pooling_would_miss_its_tokens(name):
    model = exported("exact").theirs
    cache, ids = transformers.DynamicCache(), torch.tensor([[1, 2, 3]])
    model.model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=f"{name}: a classifier reads whole texts at once and has no cache"):
        model(ids, **{name: cache})


def test_use_cache_may_be_false_alone():
    model, ids = exported("exact").theirs, torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids, use_cache=False).logits, model(ids).logits)
    with pytest.raises(ValueError, match="use_cache=True: a classifier reads whole texts at once and has no cache"):
        model(ids, use_cache=True)


def test_the_pipeline_names_the_classes_and_gives_the_probabilities_of_predict():
    model = exported("dark")
    ours = Classes(exported_models.VOCAB, LENGTH, NAMES).answer(model.outputs[0])
    classify = transformers.pipeline("text-classification", model=str(model.directory), trust_remote_code=True)
    answers = classify(list(TEXTS), truncation=True, top_k=None, batch_size=4)
    assert answers[0][0]["label"] == ours["label"]
    assert {answer["label"]: answer["score"] for answer in answers[0]} == pytest.approx(ours["probabilities"], abs=1e-5)
    numbers = exported("number-of-gemma")
    estimate = transformers.pipeline("text-classification", model=str(numbers.directory), trust_remote_code=True)
    assert estimate(TEXTS[0], truncation=True)[0]["score"] == pytest.approx(numbers.outputs[0, 0].item(), rel=1e-4)


@pytest.mark.parametrize("name", ["dark", "number-of-gemma"])
def test_an_export_comes_back_bit_for_bit(name, tmp_path):
    model = exported(name)
    again = import_source(model.directory, tmp_path / "run")
    before, after = (saved_arrays(path) for path in (model.workdir, tmp_path / "run"))
    kept = {path for path in before if path.startswith(("['params']", "['projections']"))}
    assert kept and all(after[path] == before[path] for path in kept)
    assert again.config.task.to_dict() == model.ours.config.task.to_dict()
    assert (again.config.sequence_length, again.config.data.source) == (LENGTH, "labelled")
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "again"))
    files = {path.name for path in model.directory.iterdir()}
    assert files == {path.name for path in (tmp_path / "again").iterdir()}
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (model.directory / file).read_bytes(), file


def test_what_trainer_saves_comes_back_and_predicts_here(tmp_path, capsys):
    model, theirs = exported("dark"), load(exported("dark").directory)
    ids = model.tokenizer(list(TEXTS), truncation=True)["input_ids"]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, LABELS["dark"], strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        theirs, arguments, train_dataset=rows, eval_dataset=rows, processing_class=model.tokenizer
    )
    assert not trainer.model_accepts_loss_kwargs  # else it would not divide by the accumulated batches
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * start
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {p.name for p in model.directory.glob("*.py")}
    found = torch_outputs(load(tmp_path / "saved"), batch_of(model))
    np.testing.assert_array_equal(found, torch_outputs(theirs.eval(), batch_of(model)))
    import_source(tmp_path / "saved", tmp_path / "run")
    capsys.readouterr()  # what Trainer prints
    predict.main(predict.parse_flags(["predict", f"--workdir={tmp_path}/run", f"--input={TEXTS[0]}"]))
    answer = json.loads(capsys.readouterr().out)["probabilities"]
    assert list(answer) == list(NAMES)
    np.testing.assert_allclose(list(answer.values()), scipy.special.softmax(found[0]), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_a_merged_lora_adapter_of_a_regression_comes_back(tmp_path):
    peft = pytest.importorskip("peft")
    model = exported("number-of-gemma")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    tuned = peft.get_peft_model(load(model.directory), config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = tuned(**batch_of(model), labels=torch.tensor(LABELS["number-of-gemma"])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = tuned.eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    model.tokenizer.save_pretrained(tmp_path / "merged")
    found = torch_outputs(merged, batch_of(model))
    assert not np.allclose(merged.score.weight.detach(), model.theirs.score.weight.detach(), atol=1e-3)
    ours = our_outputs(import_source(tmp_path / "merged", tmp_path / "run"))
    np.testing.assert_allclose(ours, found, **close_to(found))


def test_an_exported_language_model_becomes_a_classifier_in_torch_and_comes_back(tmp_path):
    source = exported_models.exported("llama-dark").directory
    load_classifier = transformers.AutoModelForSequenceClassification.from_pretrained
    model, report = load_classifier(source, num_labels=3, trust_remote_code=True, output_loading_info=True)
    assert {"score.weight", "score.bias"} == set(report["missing_keys"])
    model.score.bias.data += torch.tensor([1.0, -1.0, 0.5])
    model.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "saved")
    ours = import_source(tmp_path / "saved", tmp_path / "run")
    assert (ours.config.task.name, ours.config.task.pooling) == ("classification", "last")
    assert json.loads((tmp_path / "run/labels.json").read_text()) == {"labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "again"))
    batch = batch_of(exported("dark"))  # of the same tokenizer
    np.testing.assert_array_equal(torch_outputs(load(tmp_path / "again"), batch), torch_outputs(model.eval(), batch))


def changed(directory, to, **values):
    """A copy of a directory whose config.json has other values; `a__b` is b in the section a."""
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    for name, value in values.items():
        *sections, field = name.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


REFUSED = {
    "an encoder": ({"model__causal": False}, False, "model.causal = False: the exported code is causal"),
    "exact attention": ({}, True, "is a classification, whose head has a bias; LlamaForSequenceClassification"),
    "no family": ({"model__scale_embeddings": True}, False, "no Hugging Face family has this model; the nearest"),
}


@pytest.mark.parametrize(("values", "as_exact", "message"), REFUSED.values(), ids=REFUSED)
def test_an_export_is_refused_for(values, as_exact, message, tmp_path):
    workdir = Workdir(changed(exported("exact").workdir, tmp_path / "run", **values))
    with pytest.raises(UserError, match=message):
        export_workdir(workdir, str(tmp_path / "out"), as_exact=as_exact)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    workdir = Workdir(changed(exported("exact").workdir, tmp_path / "run"))
    (tmp_path / "run/labels.json").write_text('{"labels": ["a", "b"]}')
    with pytest.raises(UserError, match="its checkpoint has 3 outputs per text, its classification 2"):
        export_workdir(workdir, str(tmp_path / "out"))


UNREADABLE = {
    "labels with a gap": ({"id2label": {"0": "a", "2": "b"}}, "id2label = .* must name the labels 0 to 1"),
    "labels that are the same": ({"id2label": {"0": "a", "1": "a"}}, "must have a different name for each label"),
    "several labels per text": (
        {"problem_type": "multi_label_classification"},
        "problem_type = .* allowed: single_label_classification, regression",
    ),
    "a regression of three numbers": ({"problem_type": "regression"}, "must be single_label_classification for"),
    "another number of labels": ({"id2label": {"0": "a", "1": "b"}}, r"score.bias has shape \[3\]"),
    "another pooling": ({"darkformer__task": {"pooling": "cls"}}, "task.pooling"),
    "no task": ({"darkformer__task": []}, "task = .* must be a section with fields"),
}


@pytest.mark.parametrize(("values", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_directory_is_refused_with(values, message, tmp_path):
    directory = changed(exported("exact").directory, tmp_path / "changed", **values)
    with pytest.raises(UserError, match=message):
        plan_import(open_source(str(directory)), base.get_config())


def test_the_code_refuses_a_pooling_that_it_does_not_have(tmp_path):
    directory = changed(exported("exact").directory, tmp_path / "changed", darkformer__task={"pooling": "cls"})
    with pytest.raises(ValueError, match="darkformer.task.pooling = 'cls': must be one of last, mean"):
        load(directory)


def test_a_classifier_does_not_load_as_a_language_model(tmp_path):
    directory = changed(exported("exact").directory, tmp_path / "new")  # of another name no class is registered
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
