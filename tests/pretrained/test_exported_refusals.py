"""What a state of constant size cannot do, an exported model refuses in PyTorch, each with one line that says what."""

import copy
import re
import runpy
import sys

import pytest

from tests.pretrained.exported_models import TOKENS, exported
from tests.pretrained.tiny_models import random_model, torch, transformers

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer
IDS = torch.as_tensor(TOKENS).long()
SHAPE = tuple(IDS.shape)
EXACT = random_model("llama", {"num_hidden_layers": 1, "vocab_size": 257})


@pytest.fixture
def model():
    return exported("gates-hybrid").theirs


def mask_with(*zeros):
    mask = torch.ones(SHAPE, dtype=torch.long)
    mask[0, list(zeros)] = 0
    return mask


def cache_of(model, ids=IDS):
    out = model(ids, use_cache=True)
    return out["cache" if "cache" in out else "past_key_values"]


def quantised_cache():
    """One whose back end is not installed: nothing of it is called."""
    from transformers.cache_utils import QuantoQuantizedLayer

    cache = transformers.DynamicCache()
    cache.layers = [QuantoQuantizedLayer.__new__(QuantoQuantizedLayer)]
    return cache


ARGUMENTS = {
    "attention weights": ({"output_attentions": True}, "output_attentions=True: linear attention has no"),
    "a mask with a hole": ({"attention_mask": mask_with(5)}, "attention_mask has holes"),
    "padding on both sides of a hole": ({"attention_mask": mask_with(0, 5, 36)}, "attention_mask has holes"),
    "a mask per pair": (
        {"attention_mask": torch.ones(2, 1, 37, 37)},
        "attention_mask has shape [2, 1, 37, 37]; expected [2, 37]",
    ),
    "a mask per kind of layer": ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict; expected a"),
    "a short mask": ({"attention_mask": torch.ones(2, 36)}, "attention_mask has shape [2, 36]; expected [2, 37]"),
    "a mask of documents": ({"attention_mask": 1 + mask_with(3)}, "attention_mask has numbers other than 0 and 1"),
    "an added mask": ({"attention_mask": -1e4 * mask_with(3)}, "attention_mask has numbers other than 0 and 1"),
    "several documents in a row": (
        {"position_ids": torch.cat([torch.arange(20), torch.arange(17)])[None]},
        "several documents in one row",
    ),
    "another first position": ({"position_ids": torch.arange(1, 38)[None]}, "position_ids are not the count"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(2, 37, 32)}, "exactly one of input_ids and inputs_embeds"),
    "an unknown argument": ({"cu_seq_lens_q": torch.arange(2)}, "cu_seq_lens_q is not an argument of a DARKFormer"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_call_is_refused_with(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(IDS, **arguments)


@pytest.mark.parametrize("ids", [IDS[0], IDS[:, :0]], ids=["one text without rows", "no tokens"])
def test_ids_are_refused_that_are(model, ids):
    with pytest.raises(ValueError, match=re.escape(f"the input has shape {list(ids.shape)}; expected [rows, tokens]")):
        model(ids)


CONFIGS = {
    "another number of heads": (lambda c: setattr(c, "num_key_value_heads", 4), "num_key_value_heads = 4, but"),
    "another epsilon": (lambda c: setattr(c, "rms_norm_eps", 0.5), "rms_norm_eps = 0.5, but darkformer.model.norm_eps"),
    "another format": (lambda c: c.darkformer.update(format=3), "darkformer.format = 3; this code reads 2"),
    "an unknown kind": (lambda c: c.darkformer["pattern"][0].update(kind="mamba2"), "kind = 'mamba2': must be one of"),
    "half a chunk": (
        lambda c: c.darkformer["pattern"][0].update(window=10),
        "window = 10: must be a multiple of chunk_size = 4",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused_with(model, change, message):
    config = copy.deepcopy(model.config)
    change(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        type(model)(config)


def test_a_transformers_that_is_too_old_is_named(model, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")  # loading a model may have replaced it
    with pytest.raises(ImportError, match=re.escape("needs transformers 5.0 or later; this is 4.57.1")):
        runpy.run_path(str(exported("gates-hybrid").directory / "configuration_darkformer.py"))


def test_attention_weights_are_refused_by_the_config_too(model, monkeypatch):
    monkeypatch.setattr(model.config, "_output_attentions", True, raising=False)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(IDS)


CACHES = {
    "static": (
        lambda: transformers.StaticCache(EXACT.config, max_cache_len=64),
        "a DARKFormer model cannot use a cache of StaticLayer",
    ),
    "quantised": (quantised_cache, "a DARKFormer model cannot use a cache of QuantoQuantizedLayer"),
    "filled by a Llama": (lambda: cache_of(EXACT), "the cache holds tokens in a DynamicLayer"),
    "filled by a model with more layers": (
        lambda: cache_of(exported("gemma2-caps").theirs),
        "the cache has 4 layers, the model 3",
    ),
    "of other rows": (lambda: cache_of(exported("gates-hybrid").theirs, IDS[:1]), "the cache holds 1 rows, the new"),
    "a tuple": (lambda: ((torch.zeros(1), torch.zeros(1)),), "a DARKFormer model cannot use a cache of tuple"),
}


@pytest.mark.parametrize(("make", "message"), CACHES.values(), ids=CACHES)
def test_a_cache_is_refused_that_is(model, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(IDS, past_key_values=make())


def test_a_mask_other_than_that_of_the_cache_is_refused(model):
    cache = cache_of(model)
    with pytest.raises(ValueError, match="attention_mask is not the one that the tokens in the cache had"):
        model(IDS[:, :1], past_key_values=cache, attention_mask=torch.cat([mask_with(0), torch.ones(2, 1)], 1))


def test_a_cache_of_padded_rows_needs_its_mask(model):
    out = model(IDS, attention_mask=mask_with(0, 1), use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]
    with pytest.raises(ValueError, match="attention_mask is needed: the cache holds rows with padding"):
        model(IDS[:, :1], past_key_values=cache)


def test_a_cache_cannot_be_cropped(model):
    with pytest.raises(NotImplementedError, match="a DARKFormer cache cannot be cropped"):
        cache_of(model).crop(5)


ASSISTED = {"another model": {"assistant_model": EXACT}, "the prompt": {"prompt_lookup_num_tokens": 3}}


@pytest.mark.parametrize("options", ASSISTED.values(), ids=ASSISTED)
def test_decoding_is_refused_with_drafts_of(model, options):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(IDS[:1, :9], attention_mask=torch.ones(1, 9), pad_token_id=0, max_new_tokens=4, **options)


def test_text_with_a_static_cache_is_refused(model):
    if transformers.__version__ == "5.0.0":
        pytest.skip("it ignores cache_implementation for stateful models, with a warning")
    prompt = {"attention_mask": torch.ones(2, 9), "pad_token_id": 0, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="cannot use a cache of Static"):
        model.generate(IDS[:, :9], cache_implementation="static", **prompt)
