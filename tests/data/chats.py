"""A small tokenizer with chat templates, and conversations."""

import json
from pathlib import Path

from darkformer_jax.data.tokenizers import HuggingFaceTokenizer, train_bpe

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral: no generation prompt, and a beginning that transformers' tokenizers add by themselves to other texts.
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}{{ raise_exception('only users and assistants') }}"
    "{% endif %}{% endfor %}"
)
START, END, DOC = 300, 301, 0
_TEXT = "What is a kettle for? It boils water, sailor. system user assistant And why? Because. Yes, no.\n\n\n\n"


def chat_tokenizer(template=CHATML, adds_bos=False, plain=()):
    """Bytes and merges, then <|im_start|> and <|im_end|>, and tokens that are not special.

    With `adds_bos`, <|doc|> begins a text.
    """
    definition = json.loads(train_bpe(300, [_TEXT * 9])._definition)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] += [
        {"id": START + number, "content": text, **flags, "special": text not in plain}
        for number, text in enumerate(("<|im_start|>", "<|im_end|>", *plain))
    ]
    if not adds_bos:
        definition["post_processor"] = None
    bos = "<|doc|>" if adds_bos else None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|doc|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    return HuggingFaceTokenizer(json.dumps(definition).encode(), bos, "<|im_end|>", config=config)


def talk(*contents, system=None):
    """The messages of a conversation: questions and answers in turn."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def write_talks(path, conversations):
    """A .jsonl file; returns its path."""
    Path(path).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


def many_talks(count):
    """Different conversations of one to three turns."""
    return [
        talk(*(text for turn in range(1 + number % 3) for text in (f"why {number} {turn}?", f"Because {number}.")))
        for number in range(count)
    ]
