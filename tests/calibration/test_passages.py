from darkformer_jax.calibration.passages import read_passages
from darkformer_jax.data import load_data
from darkformer_jax.data.tokenizers import BytesTokenizer


def test_passages_come_from_what_a_run_trains_on(tmp_path):
    lines = [f'{{"text": "{chr(97 + i % 26) * 10}{i:010d}"}}' for i in range(100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    text = str(tmp_path / "text.jsonl")
    held_out = load_data("text", text, "bytes", 0.3).heldout_documents
    assert 10 < len(held_out) < 60
    tokenizer, count = BytesTokenizer(), 100 - len(held_out)
    passages, num_test = read_passages(text, "", "text", tokenizer, count, 20, 0, 0.3)
    drawn = {tokenizer.decode(row) for row in passages.tolist()}
    assert len(drawn) == count and not drawn & set(held_out) and num_test == round(0.2 * count)
