"""Rows that ask for made-up facts, and for the rule behind made-up labels; see `darkformer_jax.data.probe_rows`."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from darkformer_jax.data.probe_rows import ProbeRow, ProbeText
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError

FACTS = 3  # per distance, in a row
MOST_DISTANCES = 8  # as many as there are names for
LEAD = 32  # tokens of text before the first fact or example: the first tokens of a row are sinks in some models


def _words(listed: str) -> list[str]:
    return listed.split()


_TEAMS = _words(
    "Osprey Heron Falcon Badger Otter Lynx Marmot Puffin Raven Salmon Beaver Condor "
    "Panther Gazelle Lobster Cobra Mustang Pelican Walrus Bison Cricket Dolphin Hornet Jackal"
)
_PEOPLE = _words(
    "Clara Hugo Miriam Oscar Nadia Felix Greta Simon Paula Victor Irene Louis "
    "Helen Martin Sophie Daniel Laura Edgar Alice Robert Emma Walter Julia Thomas"
)
_PLACES = _words(
    "kitchen garden cellar attic stable chapel library tower harbour market "
    "forest tunnel theatre museum bakery prison castle hospital station school"
)

KINDS = {
    "animal": _words("wolf horse rabbit tiger goat eagle snake whale mouse sheep bear frog"),
    "tool": _words("hammer saw drill wrench shovel chisel axe pliers rake ladder file screwdriver"),
    "food": _words("bread cheese soup apple rice butter pasta onion cake honey potato salad"),
    "country": _words("France Japan Brazil Egypt Canada India Norway Peru Greece Kenya Spain China"),
}
LABELS = ("blick", "dax", "fep", "wug")  # no two begin alike
EXAMPLES = 4  # per kind, in a row


class Fact(NamedTuple):
    """A sentence of its own paragraph.

    Attributes:
      ids: of the whole paragraph.
      answer: (begin, end) of the tokens among them that only this fact tells.
    """

    ids: list[int]
    answer: tuple[int, int]


def lookup_rows(text: ProbeText, distances: Sequence[int], count: int) -> list[ProbeRow]:
    """Facts inserted in the text, such as "The password of the Osprey team is 48213.", and all asked for at the end.

    There are three facts per distance, half of them of numbers, half of places. The questions are the facts' own
    sentences, in random order of distances; an answer stands `distance` tokens behind the same words in the text.

    Returns:
      Rows with a part per distance, named after it: the answers.

    Raises:
      UserError: the questions are longer than the smallest distance, or than a step between two.
    """
    random = text.random("lookup", max(distances))
    asked = [_draw_questions(text.tokenizer, distances, random) for _ in range(count)]
    begin, end = len(text.begin), len(text.begin) + LEAD + max(distances)
    for questions in asked:
        tail = sum(len(fact.ids) for _, fact in questions)
        nearest = min(far - near for near, far in itertools.pairwise([0, *sorted(distances)]))
        if tail > nearest:
            raise UserError(
                f"lookup: its questions take {tail} tokens, and of the distances {_listed(distances)} the smallest, or "
                f"two neighbours' difference, is {nearest}; allowed: --distances further apart"
            )
        text.require_room("lookup", end + tail)
    num_words = end - begin - min(sum(len(fact.ids) for _, fact in questions) for questions in asked)
    stretches = text.stretches(num_words, count, random)
    return [_lookup_row(text, words, questions, end) for words, questions in zip(stretches, asked, strict=True)]


def _draw_questions(
    tokenizer: Tokenizer, distances: Sequence[int], random: np.random.Generator
) -> list[tuple[int, Fact]]:
    """(distance, fact) of every question, in the order in which they are asked."""
    order = random.permutation(np.repeat(distances, FACTS))
    teams, people = random.permutation(_TEAMS), random.permutation(_PEOPLE)
    questions = []
    for number, distance in enumerate(order):
        if number % 2:
            head, value = f"{people[number // 2]} keeps the letters in the", str(random.choice(_PLACES))
        else:
            head, value = f"The password of the {teams[number // 2]} team is", str(random.integers(10_000, 100_000))
        questions.append((int(distance), _fact(tokenizer, head, value)))
    return questions


def _fact(tokenizer: Tokenizer, head: str, value: str) -> Fact:
    known, sentence = tokenizer.encode(f"\n\n{head}"), tokenizer.encode(f"\n\n{head} {value}")
    return Fact([*sentence, *tokenizer.encode(".\n\n")], (_num_common([known, sentence]), len(sentence)))


def _lookup_row(
    text: ProbeText, words: Int[np.ndarray, "n"], questions: Sequence[tuple[int, Fact]], end: int
) -> ProbeRow:
    """Questions begin at `end`. The text's words fill what the facts leave."""
    tokens = np.full(end + sum(len(fact.ids) for _, fact in questions), -1, np.int32)
    tokens[: len(text.begin)] = text.begin
    parts: dict[str, list[tuple[int, int]]] = {}
    place = end
    for distance, fact in questions:
        for begin in (place - distance, place):
            tokens[begin : begin + len(fact.ids)] = fact.ids
        parts.setdefault(str(distance), []).append((place + fact.answer[0], place + fact.answer[1]))
        place += len(fact.ids)
    free = tokens < 0
    tokens[free] = words[: free.sum()]
    return ProbeRow(tokens, parts)


def class_rows(text: ProbeText, distance: int, count: int) -> list[ProbeRow]:
    """Sixteen examples of a rule, `distance` tokens of text, and a question: "wolf: dax" ... "goat:".

    The rule is the kind of the word (animal, tool, food, country); which label a kind has is drawn for each row. The
    question's word is no example. Its candidates are the labels' first tokens that differ, so that chance is 1/4.

    Raises:
      UserError: the tokenizer has one first token for two labels.
    """
    random = text.random("classes", distance)
    drawn = [_draw_task(text.tokenizer, random) for _ in range(count)]
    for examples, question, _, _ in drawn:
        text.require_room("classes", len(text.begin) + LEAD + len(examples) + distance + len(question) + 1)
    stretches = text.stretches(LEAD + distance, count, random)
    rows = []
    for words, (examples, question, candidates, answer) in zip(stretches, drawn, strict=True):
        pieces = (text.begin, words[:LEAD], examples, words[LEAD:], question)
        rows.append(ProbeRow(np.concatenate([np.asarray(x, np.int32) for x in pieces]), {}, candidates, answer))
    return rows


def _draw_task(tokenizer: Tokenizer, random: np.random.Generator) -> tuple[list[int], list[int], tuple[int, ...], int]:
    """(ids of the examples, ids of the question, its candidates, the index of the right one)."""
    labels = dict(zip(KINDS, random.permutation(LABELS), strict=True))
    words = {kind: random.permutation(words) for kind, words in KINDS.items()}
    pairs = [f"{word}: {labels[kind]}\n" for kind in KINDS for word in words[kind][:EXAMPLES]]
    asked = str(random.choice(list(KINDS)))
    spelt = [tokenizer.encode(f"\n\n{words[asked][EXAMPLES]}: {label}") for label in LABELS]
    known = _num_common(spelt)
    candidates = tuple(int(ids[known]) for ids in spelt)
    if len(set(candidates)) < len(candidates):
        raise UserError(f"classes: this tokenizer begins two of the labels {_listed(LABELS)} with the same token")
    examples = tokenizer.encode("\n\n" + "".join(random.permutation(pairs)))
    return examples, list(spelt[0][:known]), candidates, LABELS.index(labels[asked])


def _num_common(sequences: Sequence[Sequence[int]]) -> int:
    """How many first ids all the sequences share."""
    same = [len(set(ids)) == 1 for ids in zip(*sequences, strict=False)]
    return same.index(False) if False in same else len(same)


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names))
