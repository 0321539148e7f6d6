"""An exported DARK model in PyTorch is the model that it was here: in logits, decoding, padding and gradients."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from darkformer_jax.model.sampling import Sampler
from tests.pretrained.exported_models import MODELS, TOKENS, VOCAB, exported, load, torch_logits
from tests.pretrained.tiny_models import our_logits, torch, transformers

TOLERANCE = 1e-4
HYBRIDS = ("llama-hybrid-tied", "gates-hybrid", "gemma2-caps")

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


def cache_of(output):
    return output["cache" if "cache" in output else "past_key_values"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_this_package(name):
    model = exported(name)
    wanted = our_logits(model.ours, TOKENS)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(torch_logits(model.theirs), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(name):
    model, pieces, cache = exported(name).theirs, [], None
    for start, stop in ((0, 1), (1, 9), (9, 10), (10, 30), (30, 31), (31, 37)):
        with torch.no_grad():
            out = model(torch.as_tensor(TOKENS[:, start:stop]).long(), past_key_values=cache, use_cache=True)
        cache = cache_of(out)
        pieces.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(pieces, 1), torch_logits(model), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_either_side_changes_nothing(name):
    model = exported(name).theirs
    ids, mask = np.full((3, 41), 9), np.zeros((3, 41), np.int64)
    places = (slice(4, 41), slice(21, 41), slice(0, 20))  # left, more on the left, right
    rows = (TOKENS[0], TOKENS[1, :20], TOKENS[1, :20])
    for row, (place, tokens) in enumerate(zip(places, rows, strict=True)):
        ids[row, place], mask[row, place] = tokens, 1
    padded = torch_logits(model, ids, attention_mask=torch.as_tensor(mask))
    for row, (place, tokens) in enumerate(zip(places, rows, strict=True)):
        np.testing.assert_allclose(padded[row, place], torch_logits(model, tokens[None])[0], atol=TOLERANCE, rtol=0)


def generate(model, tokens, new=24, **options):
    ids = torch.as_tensor(tokens).long()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids)} | greedy | options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", HYBRIDS)
def test_greedy_text_is_that_of_this_package(name):
    model = exported(name)
    sampler = Sampler(model.ours.network, model.ours.params, model.ours.projections, temperature=0)
    ours = [int(token[0]) for token in sampler.stream(TOKENS[:1, :9].tolist(), 24)]
    assert generate(model.theirs, TOKENS[:1, :9])[0].tolist() == ours


@pytest.mark.parametrize("name", HYBRIDS)
def test_three_beams_with_the_cache_are_those_without(name):
    model = exported(name).theirs
    ids, mask = torch.as_tensor(TOKENS[:, :9]).long(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "num_beams": 3, "new": 12}
    assert generate(model, ids, **options).tolist() == generate(model, ids, use_cache=False, **options).tolist()


def test_the_cache_of_linear_layers_does_not_grow():
    model, sizes = exported("llama-hybrid-tied").theirs, []
    for length in (5, 30):
        with torch.no_grad():
            cache = cache_of(model(torch.as_tensor(TOKENS[:, :length]).long(), use_cache=True))
        sizes.append(sum(x.numel() for layer in cache.layers for x in layer.state.values()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["gates", "gates-hybrid", "llama-hybrid-tied", "gemma3-local-rope"])
def test_gradients_are_those_of_this_package(name):
    model = exported(name)
    tokens = jnp.asarray(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(37, dtype=jnp.int32), tokens.shape)

    def loss(params):
        logits = model.ours.network.bind(params, model.ours.projections)(tokens, jnp.ones_like(tokens), positions)[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    ours = jax.jit(jax.grad(loss))(model.ours.params)
    ids = torch.as_tensor(TOKENS).long()
    model.theirs.zero_grad()
    model.theirs(ids, labels=ids).loss.backward()
    theirs = {name: p.grad.numpy() for name, p in model.theirs.named_parameters() if p.grad is not None}
    pairs = [(ours["embedding"], "model.embed_tokens.weight")]
    for place in range(len(model.ours.network.spec.pattern)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(ours[f"blocks_{place}"]["attention"]):
            inner = ".".join(str(key.key) for key in path)
            if inner.split(".")[0] in ("mechanism", "convolution", "forgetting"):
                pairs.append((leaf[0], f"model.layers.{place}.self_attn.{inner}"))
    assert len(pairs) > 1
    for ours_grad, place in pairs:
        scale = np.abs(ours_grad).max()
        assert scale > 0, place
        np.testing.assert_allclose(theirs[place], ours_grad, atol=2e-4 * scale, rtol=0, err_msg=place)


def test_a_small_loss_has_the_gradients_of_a_large_one():
    model, ids, grads = exported("gates").theirs, torch.as_tensor(TOKENS).long(), []
    for scale in (1.0, 2.0**-30):
        model.zero_grad()
        (scale * model(ids, labels=ids).loss).backward()
        grads.append({name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5 * float(grad.abs().max()), rtol=0, msg=name)


def test_rows_of_the_cache_can_be_reordered_repeated_selected_moved_and_forgotten():
    model = exported("gates-hybrid").theirs
    first, then = (torch.as_tensor(part).long() for part in (TOKENS[:, :20], TOKENS[:, 20:]))

    def after(change, tokens):
        with torch.no_grad():
            cache = cache_of(model(first, use_cache=True))
            change(cache)
            return model(tokens, past_key_values=cache).logits.numpy()

    wanted = torch_logits(model)[:, 20:]
    close = {"atol": TOLERANCE, "rtol": 0}
    swap = torch.tensor([1, 0])
    np.testing.assert_allclose(after(lambda cache: cache.reorder_cache(swap), then[swap]), wanted[[1, 0]], **close)
    twice = after(lambda cache: cache.batch_repeat_interleave(2), then.repeat_interleave(2, 0))
    np.testing.assert_allclose(twice, wanted[[0, 0, 1, 1]], **close)
    second = after(lambda cache: cache.batch_select_indices(torch.tensor([1])), then[1:])
    np.testing.assert_allclose(second, wanted[1:], **close)
    moved = after(lambda cache: [layer.offload() for layer in cache.layers], then)
    np.testing.assert_allclose(moved, wanted, **close)
    np.testing.assert_allclose(after(lambda cache: cache.reset(), then), torch_logits(model, TOKENS[:, 20:]), **close)


def test_half_precision_keeps_the_kernels_arrays_in_float32():
    model = load(exported("gates-hybrid").directory, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if ".mechanism." in name or ".forgetting." in name}
    wanted = torch_logits(exported("gates-hybrid").theirs)
    assert np.abs(torch_logits(model) - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_a_model_can_be_made_half_as_wide_after_loading():
    """Then M and the balanced coordinates are rounded, too."""
    name = "llama-hybrid-tied"
    wanted = torch_logits(exported(name).theirs)
    found = torch_logits(load(exported(name).directory).to(torch.bfloat16))
    assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).mean()


@pytest.mark.parametrize("name", ["llama-dark", "llama-hybrid-tied", "gates", "alibi"])
def test_float16_holds_features_and_their_gradients(name):
    """Features and their products pass its largest number, 65,504."""
    wide, half = exported(name).theirs, load(exported(name).directory, dtype=torch.float16)
    ids = torch.as_tensor(TOKENS).long()
    np.testing.assert_allclose(torch_logits(half), torch_logits(wide), atol=0.02, rtol=0)
    for model in (wide, half):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (parameter, grad), other in zip(gradients(wide), gradients(half), strict=True):
        assert (grad - other[1]).abs().max() < 0.05 * grad.abs().max(), parameter
    wide.zero_grad()


def gradients(model):
    return [(name, parameter.grad.float()) for name, parameter in model.named_parameters()]


def test_a_stop_string_ends_a_text():
    """`generate` passes its tokenizer on to the model."""
    model, ids = exported("gates-hybrid").theirs, torch.as_tensor(TOKENS[:1, :9]).long()
    letters = "abcdef" + "".join(chr(0x4E00 + number) for number in range(VOCAB - 6))  # transformers tries "abcdef"
    spelling = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    spelling.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=spelling)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    prompt = {"attention_mask": torch.ones(1, 9, dtype=torch.long)} | options
    text = model.generate(ids, **prompt)[0, 9:].tolist()
    stopped = model.generate(ids, stop_strings=[letters[text[1]]], tokenizer=tokenizer, **prompt)[0, 9:].tolist()
    assert stopped == text[: text.index(text[1]) + 1]


def test_the_code_needs_torch_and_transformers_alone():
    """In a process in which darkformer_jax and jax cannot be imported."""
    directory = exported("llama-dark").directory
    program = f"""
import sys
sys.modules["darkformer_jax"] = sys.modules["jax"] = sys.modules["flax"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
import torch
print(round(float(model(torch.arange(20)[None]).logits.sum()), 2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = exported("llama-dark").theirs
    assert float(done.stdout) == pytest.approx(torch_logits(theirs, np.arange(20)[None]).sum(), abs=0.02)


def test_without_trust_nothing_loads():
    import transformers

    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(str(exported("llama-dark").directory))
