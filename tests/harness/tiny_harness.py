"""A tiny exact Llama with a tokenizer that has spaces, and tasks of the harness on local files."""

import json
from pathlib import Path
from typing import Any

from darkformer_jax.data.tokenizers import train_bpe
from tests.pretrained.tiny_models import SIZES, torch, transformers

TEXTS = ("The cat sat on the mat, and the dog sat on the log.", "A rose is a rose. Is it red? It is — ü.", "One\nTwo\n")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 300
TASKS = ("next", "text", "write")


def write_llama(directory: Path, bos: bool) -> Path:
    """A Hugging Face directory. bos: its family puts a BOS before texts; else it names one, and has a chat template."""
    config = transformers.AutoConfig.for_model("llama", **(SIZES | {"vocab_size": VOCAB, "eos_token_id": 0}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    train_bpe(VOCAB - 2, TEXTS).save(str(directory))
    if not bos:
        _without_bos(directory)
    return directory


def _without_bos(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    for number, token in enumerate(("<|im_start|>", "<|im_end|>"), VOCAB - 2):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": number, "content": token, "special": True, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names})
    )


def write_tasks(directory: Path) -> Path:
    """`next` chooses, `text` is a perplexity, `write` generates: four documents each. `chosen` is a group of `next`."""
    choices = [{"q": text[:20], "choices": [" dog", " cat", "."], "gold": n % 3} for n, text in enumerate(TEXTS * 2)]
    (directory / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices[:4]))
    texts = [{"text": text * n} for n, text in enumerate((*TEXTS, TEXTS[0]), 1)]
    (directory / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    common = {"dataset_path": "json", "test_split": "test", "num_fewshot": None}
    metrics = {
        "next": {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices"}
        | {"doc_to_target": "gold", "fewshot_split": "test", "metric_list": [{"metric": "acc"}]},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        | {"metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]},
        "write": {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[gold]}}"}
        | {"generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "chrf"}]},
    }
    for name, own in metrics.items():
        data = directory / ("text.jsonl" if name == "text" else "next.jsonl")
        write_task(directory, task=name, dataset_kwargs={"data_files": {"test": str(data)}}, **common, **own)
    group = {"group": "chosen", "task": ["next"], "aggregate_metric_list": [{"metric": "acc"}]}
    (directory / "chosen.yaml").write_text(json.dumps(group))
    return directory


def write_task(directory: Path, **fields: Any) -> None:
    """One YAML file; JSON is YAML."""
    (directory / f"{fields['task']}.yaml").write_text(json.dumps(fields))
