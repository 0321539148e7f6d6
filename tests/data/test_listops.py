import itertools
import json
import statistics

import pytest

from darkformer_jax import prepare_data
from darkformer_jax.data.listops import (
    OPERATIONS,
    SCALES,
    Expression,
    Scale,
    draw_expressions,
    listops_tokenizer,
    write_listops,
)
from darkformer_jax.data.tokenizers import load_tokenizer
from darkformer_jax.errors import UserError

TINY = Scale(5, 4, 10, 40, {"train": 60, "val": 20, "test": 20})


def drawn(scale, count, seed=0):
    return list(itertools.islice(draw_expressions(scale, seed), count))


def value_of(source):
    """The value of nested pairs, as the files hold them: brackets are read as Python's lists, and none of our code."""
    words = source.replace("(", "").replace(")", "").split()
    names = {"[MIN": "min", "[MAX": "max", "[MED": "median", "[SM": "sum"}
    nested = ", ".join(f"({names[word]!r}" if word in names else ")" if word == "]" else word for word in words)
    return reduced(eval(nested.replace(", )", ")")))


def reduced(item):
    if isinstance(item, int):
        return item
    name, values = item[0], sorted(map(reduced, item[1:]))
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
    return {"min": values[0], "max": values[-1], "median": middle, "sum": sum(values) % 10}[name]


def test_every_expression_has_the_value_that_another_reader_finds():
    for expression in [*drawn(SCALES["small"], 300), *drawn(SCALES["paper"], 20)]:
        assert value_of(expression.source) == expression.value


def test_an_expression_is_nested_pairs_as_in_the_published_files():
    assert Expression(["[MAX", "1", "4", "]"], 4).source == "( ( ( [MAX 1 ) 4 ) ] )"
    nested = Expression(["[SM", "1", "[MIN", "2", "3", "]", "]"], 3).source
    assert nested == "( ( ( [SM 1 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )"
    for expression in drawn(TINY, 50):  # n symbols make n - 1 pairs
        assert len(expression.source.split()) == 3 * len(expression.symbols) - 2


@pytest.mark.parametrize("scale", [TINY, SCALES["small"]])
def test_expressions_keep_the_limits_and_are_new(scale):
    expressions = drawn(scale, 500)
    assert all(scale.min_length < len(e.symbols) < scale.max_length for e in expressions)
    assert len({e.source for e in expressions}) == 500
    depths = [max(itertools.accumulate((s in OPERATIONS) - (s == "]") for s in e.symbols)) for e in expressions]
    assert max(depths) == scale.max_depth - 1


def test_lengths_and_values_are_spread_as_in_the_published_set():
    expressions = drawn(SCALES["paper"], 300)
    lengths = [len(e.symbols) for e in expressions]
    # 1,035 and a standard deviation of 390 in 2,000 of another writing of the grammar: four standard errors
    assert abs(statistics.mean(lengths) - 1035) < 4 * 390 / 300**0.5
    extremes = sum(e.value in (0, 9) for e in expressions) / 300
    assert abs(extremes - 0.309) < 4 * (0.309 * 0.691 / 300) ** 0.5


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_listops(str(tmp_path / name), TINY, seed)
    files = {name: (tmp_path / name / "basic_test.tsv").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    rows = {
        split: (tmp_path / "a" / f"basic_{split}.tsv").read_text().splitlines()[1:]
        for split in ("train", "val", "test")
    }
    assert [len(rows[split]) for split in rows] == [60, 20, 20]
    assert len(set(itertools.chain.from_iterable(rows.values()))) == 100  # no expression is in two splits
    saved = json.loads((tmp_path / "a" / "statistics.json").read_text())
    labels = [row.partition("\t")[2] for row in rows["val"]]
    assert saved["val"]["majority_class"] == max(map(labels.count, labels)) / 20


def test_the_tokenizer_reads_symbols_and_refuses_others(tmp_path):
    tokenizer = listops_tokenizer()
    expression = drawn(TINY, 1)[0]
    assert tokenizer.decode(tokenizer.encode(expression.source)).split() == expression.symbols
    assert len(tokenizer.encode(expression.source)) == len(expression.symbols) and tokenizer.vocab_size == 16
    tokenizer.save(str(tmp_path))
    assert load_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="the tokenizer has no ids for a word of the text"):
        tokenizer.encode_batch(["( ( [FIRST 1 ) ] )"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=listops", "--tokenizer=bytes"], "--tokenizer=bytes: --source=listops does not use it"),
        (["--source=stdlib", "--seed=1"], "--seed=1: --source=stdlib does not use it"),
        (["--source=listops", "--files=x"], "--files=x: --source=listops does not use it; allowed: text, news"),
        (["--source=listops", "--seed=-1"], "--seed=-1: must be from 0"),
    ],
)
def test_a_flag_that_the_source_does_not_use_is_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(prepare_data.parse_flags(["prepare_data", *flags, f"--out={tmp_path}/out"]))
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
