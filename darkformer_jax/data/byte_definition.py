"""The tokenizer of bytes as a tokenizer.json, for programs that read no other form.

It is byte-level BPE without merges: token i stands for byte i, and the token after them separates documents.
"""

import tokenizers as hf

NUM_BYTES = 256


def byte_definition(separator: str) -> bytes:
    """A tokenizer.json with id i for byte i of UTF-8, and id 256 for `separator`, which precedes every text."""
    signs = _sign_of_bytes()
    tokenizer = hf.Tokenizer(hf.models.BPE({sign: byte for byte, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([separator])
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{separator} $A", special_tokens=[(separator, NUM_BYTES)]
    )
    return tokenizer.to_str(pretty=True).encode("utf-8")


def is_byte_definition(definition: bytes, separator: str) -> bool:
    """Whether a tokenizer.json gives every text the ids of `byte_definition`, perhaps truncated or padded."""
    return _mapping(definition) == _mapping(byte_definition(separator))


def _mapping(definition: bytes) -> str:
    tokenizer = hf.Tokenizer.from_str(definition.decode("utf-8"))
    first = tokenizer.encode("").ids[:1]  # transformers writes the post-processor in other words
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    return f"{first} {tokenizer.to_str()}"


def _sign_of_bytes() -> list[str]:
    """The sign that the library's byte-level parts have for each byte: itself where it is visible, as in GPT-2."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(NUM_BYTES) if byte not in visible]
    return [chr(byte if byte in visible else NUM_BYTES + others.index(byte)) for byte in range(NUM_BYTES)]
