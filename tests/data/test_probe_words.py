import re

import pytest

from darkformer_jax.data.probe_rows import ProbeText, RowsTooLong, fingerprint
from darkformer_jax.data.probe_words import EXAMPLES, FACTS, KINDS, LABELS, LEAD, class_rows, lookup_rows
from darkformer_jax.data.tokenizers import BytesTokenizer, train_bpe
from darkformer_jax.errors import UserError

TEXTS = ["it was the best of times, it was the worst of times, and the queen had a plain face. " * 200]
DISTANCES = (600, 1200)
FACT = r"\n\n(The password of the \w+ team is|\w+ keeps the letters in the) (\w+)\.\n\n"


def text(tokenizer=None, context=4096, seed=0):
    return ProbeText.of(TEXTS, tokenizer or BytesTokenizer(), context, seed)


def bpe():
    words = " ".join(word for kind in KINDS.values() for word in kind)
    return train_bpe(400, [*TEXTS, words, "The password of the team is: keeps the letters in the " + " ".join(LABELS)])


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), bpe()], ids=["bytes", "bpe"])
def test_an_answer_and_its_question_stand_the_distance_behind_the_fact(tokenizer):
    for row in lookup_rows(text(tokenizer), DISTANCES, 4):
        for distance in DISTANCES:
            assert len(row.parts[str(distance)]) == FACTS
            for begin, end in row.parts[str(distance)]:
                around = slice(begin - 4, end + 2)
                before = row.tokens[around.start - distance : around.stop - distance]
                assert (row.tokens[around] == before).all()
                assert re.fullmatch(r" ?(\d{5}|[a-z]+)", tokenizer.decode(row.tokens[begin:end]))


def test_every_fact_is_told_and_asked_once_and_only_its_own_answer_is_scored():
    for row in lookup_rows(text(), DISTANCES, 4):
        told = re.findall(FACT, BytesTokenizer().decode(row.tokens).replace(".\n\n", ".\n\n\n\n"))
        assert len(told) == 4 * FACTS and len({head for head, _ in told}) == 2 * FACTS
        answers = dict(told)
        assert told == [(head, answers[head]) for head, _ in told]
        asked = told[2 * FACTS :]
        spans = sorted(span for spans in row.parts.values() for span in spans)
        assert [BytesTokenizer().decode(row.tokens[slice(*span)]).strip() for span in spans] == [v for _, v in asked]
        assert row.tokens[0] == 256 and 256 not in row.tokens[1:]
        assert BytesTokenizer().decode(row.tokens[1 : 1 + LEAD]) in TEXTS[0]


def test_between_the_facts_stands_the_text_without_a_gap():
    (row,) = lookup_rows(text(), DISTANCES, 1)
    rest = re.sub(FACT, "", BytesTokenizer().decode(row.tokens).replace(".\n\n", ".\n\n\n\n")).replace("\n", "")
    assert len(rest) > 900 and rest in TEXTS[0]


def test_the_order_of_the_distances_differs_from_row_to_row():
    orders = set()
    for row in lookup_rows(text(), DISTANCES, 8):
        spans = sorted((span, distance) for distance, spans in row.parts.items() for span in spans)
        orders.add(tuple(distance for _, distance in spans))
    assert len(orders) > 1


def test_questions_that_reach_back_to_a_fact_are_refused():
    for distances in ((128,), (600, 700)):
        with pytest.raises(UserError, match="lookup: its questions take .* tokens.*allowed: --distances further apart"):
            lookup_rows(text(), distances, 1)
    with pytest.raises(RowsTooLong, match="lookup needs rows of 1,[0-9]{3} tokens, and the context is 1,300"):
        lookup_rows(text(context=1300), DISTANCES, 1)


def test_the_labels_follow_a_rule_that_the_question_obeys():
    asked = set()
    for row in class_rows(text(), 100, 12):
        shown = BytesTokenizer().decode(row.tokens)
        pairs = dict(re.findall(r"(\w+): (\w+)\n", shown))
        kind_of = {word: kind for kind, words in KINDS.items() for word in words}
        rule = {(kind_of[word], label) for word, label in pairs.items()}
        assert len(pairs) == 4 * EXAMPLES and len(rule) == 4 and {label for _, label in rule} == set(LABELS)
        question = shown.rsplit("\n", 1)[1].removesuffix(": ")
        assert question not in pairs
        right = dict(rule)[kind_of[question]]
        assert chr(row.candidates[row.answer]) == right[0] and len(set(row.candidates)) == 4
        asked.add((kind_of[question], right))
    assert len(asked) > 4  # another rule in another row


@pytest.mark.parametrize("distance", [0, 100])
def test_so_much_text_stands_between_examples_and_question(distance):
    for row in class_rows(text(), distance, 3):
        shown = BytesTokenizer().decode(row.tokens)
        examples_end = [match.end() for match in re.finditer(r"\w+: \w+\n", shown)][-1]
        assert shown.rindex("\n\n") - examples_end == distance
        assert shown[:LEAD] in TEXTS[0] and shown[examples_end : examples_end + distance] in TEXTS[0]


def test_rows_of_words_are_those_of_the_seed():
    for make in (lambda own: lookup_rows(own, DISTANCES, 3), lambda own: class_rows(own, 50, 3)):
        assert fingerprint(make(text())) == fingerprint(make(text()))
        assert fingerprint(make(text())) != fingerprint(make(text(seed=1)))


def test_labels_that_a_tokenizer_begins_alike_are_refused():
    class OneLetter(BytesTokenizer):
        def encode(self, text):
            return list(re.sub(r"[bd](?=lick|ax)", "?", text).encode())

    with pytest.raises(UserError, match="classes: this tokenizer begins two of the labels blick, dax, fep, wug"):
        class_rows(text(OneLetter()), 0, 1)
