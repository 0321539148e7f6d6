"""An exported model learns with PEFT and with transformers' Trainer, is saved there, and comes back into JAX."""

import json
import shutil

import numpy as np
import pytest

from tests.pretrained.exported_models import TOKENS, VOCAB, exported, load, torch_logits
from tests.pretrained.tiny_models import our_logits, torch, transformers
from tests.pretrained.tiny_sources import import_source, write_tokenizer

NAMES = ("gates-hybrid", "llama-hybrid-tied")  # all parts of attention; tied, one key/value head

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer
IDS = torch.as_tensor(TOKENS).long()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_in_jax(directory, workdir, source):
    """Those of a directory that PyTorch saved; its tokenizer is that of the export, unless one was saved."""
    if not (directory / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(exported(source).directory / name, directory)
    return our_logits(import_source(directory, workdir), TOKENS)


def train(model, steps=3):
    """The losses of some steps of AdamW on two rows."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"], ids=["q-v", "all-linear"])
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_lora_adapter_comes_back_into_jax(name, modules, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(exported(name).directory), config)
    losses = train(model)
    assert losses[-1] < losses[0]
    wanted = torch_logits(model)
    assert np.abs(wanted - torch_logits(exported(name).theirs)).max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(exported(name).directory), tmp_path / "adapter").eval()
    np.testing.assert_array_equal(torch_logits(again), wanted)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged), wanted, atol=1e-4, rtol=0)
    ours = logits_in_jax(tmp_path / "merged", tmp_path / "run", name)
    np.testing.assert_allclose(ours, torch_logits(merged), atol=1e-4, rtol=0)


def test_what_trainer_saves_comes_back_into_jax(tmp_path):
    model = load(exported("gates-hybrid").directory)
    before = {name: array.clone() for name, array in model.state_dict().items()}
    write_tokenizer(tmp_path, VOCAB)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<s>", eos_token="</s>"
    )
    rows = [{"input_ids": TOKENS[i % 2, i : 24 + 2 * i].tolist()} for i in range(6)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    still = {name for name, array in model.state_dict().items() if torch.equal(array, before[name])}
    fixed = {name for name in before if name.endswith("projections") or ".coordinates." in name}
    assert still == fixed and len(fixed) == 4
    trainer.save_model(str(tmp_path / "saved"))
    ours = logits_in_jax(tmp_path / "saved", tmp_path / "run", "gates-hybrid")
    np.testing.assert_allclose(ours, torch_logits(model.eval()), atol=1e-4, rtol=0)


def test_a_saved_model_is_whole_and_the_same_bit_for_bit(tmp_path):
    model = exported("gates-hybrid")
    model.theirs.save_pretrained(tmp_path)
    code = {file.name for file in model.directory.glob("*.py")}
    assert {file.name for file in tmp_path.glob("*.py")} == code != set()
    maps = [json.loads((path / "config.json").read_text())["auto_map"] for path in (tmp_path, model.directory)]
    assert maps[0] == maps[1]
    again, arrays = load(tmp_path), model.theirs.state_dict()
    assert again.state_dict().keys() == arrays.keys()
    assert all(torch.equal(array, arrays[name]) for name, array in again.state_dict().items())


def test_shards_that_torch_saved_come_back_into_jax(tmp_path):
    model = exported("gates-hybrid").theirs
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    ours = logits_in_jax(tmp_path / "saved", tmp_path / "run", "gates-hybrid")
    np.testing.assert_allclose(ours, torch_logits(model), atol=1e-4, rtol=0)


def test_a_model_saved_in_bfloat16_keeps_its_mechanism_in_float32(tmp_path):
    model = load(exported("gates-hybrid").directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    saved, before = load(tmp_path / "saved").state_dict(), exported("gates-hybrid").theirs.state_dict()
    own = {name for name in before if ".mechanism." in name or ".forgetting." in name}
    assert all(torch.equal(saved[name], before[name]) for name in own)
    assert all(array.dtype == torch.bfloat16 for name, array in saved.items() if name not in own)
    ours = logits_in_jax(tmp_path / "saved", tmp_path / "run", "gates-hybrid")  # it computes in float32, as before
    wide = load(tmp_path / "saved", dtype=torch.float32)
    np.testing.assert_allclose(ours, torch_logits(wide), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_that_grew_in_torch_comes_back_into_jax(name, tmp_path):
    model = load(exported(name).directory)
    model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    ours = logits_in_jax(tmp_path / "saved", tmp_path / "run", name)
    assert ours.shape[-1] == VOCAB + 7
    np.testing.assert_allclose(ours, torch_logits(model), atol=1e-4, rtol=0)


def padded(side):
    """Two rows of 20 and 37 tokens, with labels -100 at the padding."""
    ids, mask = torch.zeros(2, 37, dtype=torch.long), torch.zeros(2, 37, dtype=torch.long)
    place = slice(17, 37) if side == "left" else slice(0, 20)
    ids[0, place], mask[0, place] = IDS[0, :20], 1
    ids[1], mask[1] = IDS[1], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_loss_of_rows_alone(side):
    model = exported("gates-hybrid").theirs
    alone = [model(row[None], labels=row[None]).loss for row in (IDS[0, :20], IDS[1])]
    wanted = (19 * alone[0] + 36 * alone[1]) / 55
    assert model(**padded(side)).loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_a_row_of_padding_alone_changes_nothing():
    model, mask = exported("gates-hybrid").theirs, torch.ones_like(IDS)
    mask[1] = 0
    model.zero_grad()
    out = model(IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100))
    assert out.loss.item() == pytest.approx(model(IDS[:1], labels=IDS[:1]).loss.item(), abs=1e-5)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_training_builds_no_cache_unless_one_is_asked_for():
    model = load(exported("gates-hybrid").directory).train()
    cache = "cache" if hasattr(model(IDS), "cache") else "past_key_values"
    assert getattr(model(IDS), cache) is None
    assert getattr(model(IDS, use_cache=True), cache) is not None
    assert getattr(model.eval()(IDS), cache) is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_learn_the_same(reentrant):
    model = load(exported("gates-hybrid").directory).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_kernel_in_float32(dtype):
    """What attention makes of q, k and v under autocast is what it makes of them without."""
    model, calls = exported("gates-hybrid").theirs, []
    attention = model.model.layers[0].self_attn
    hook = attention.attend.register_forward_hook(lambda module, inputs, output: calls.append((inputs, output[0])))
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        model(IDS)
    hook.remove()
    ((inputs, out),) = calls
    assert inputs[1].dtype == dtype
    assert inputs[5].dtype == torch.float32  # the decays
    with torch.no_grad():
        assert torch.equal(attention.attend(*inputs)[0], out)


def test_hidden_states_tuples_and_last_logits_are_as_in_transformers():
    model, wanted = load(exported("gates-hybrid").directory), torch_logits(exported("gates-hybrid").theirs)
    out = model(IDS, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    np.testing.assert_allclose(torch_logits(model, logits_to_keep=3), wanted[:, -3:], atol=1e-6)
    np.testing.assert_allclose(torch_logits(model, logits_to_keep=torch.tensor([0, 5])), wanted[:, [0, 5]], atol=1e-6)
    loss, logits = model(IDS, labels=IDS, use_cache=False, return_dict=False)
    np.testing.assert_allclose(logits.detach().numpy(), wanted, atol=1e-6)
    assert loss.shape == ()
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)
    assert isinstance(model.model(IDS), tuple)


def test_text_continues_embeddings_several_times_and_with_an_offloaded_cache():
    model = exported("gates-hybrid").theirs
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    prompt = {"attention_mask": torch.ones(2, 9, dtype=torch.long)} | greedy
    wanted = model.generate(IDS[:, :9], **prompt)[:, 9:].tolist()
    embedded = model.get_input_embeddings()(IDS[:, :9])
    assert model.generate(inputs_embeds=embedded, **prompt).tolist() == wanted
    assert model.generate(IDS[:, :9], cache_implementation="offloaded", **prompt)[:, 9:].tolist() == wanted
    several = model.generate(IDS[:, :9], num_beams=3, num_return_sequences=3, **prompt)
    best = model.generate(IDS[:, :9], num_beams=3, **prompt)
    assert several.shape == (6, 15)
    assert several[::3].tolist() == best.tolist()


def test_layers_may_be_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    model = load(exported("gates-hybrid").directory, device_map=places, offload_folder=str(tmp_path))
    assert model.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    wanted = torch_logits(exported("gates-hybrid").theirs)
    np.testing.assert_allclose(torch_logits(model), wanted, atol=1e-6, rtol=0)
