"""Two real tasks in GLUE's released formats, made of what package registries carry, because GLUE itself is on none.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    apt-get download anarchism && dpkg -x anarchism_*.deb faq
    python -m benchmarks.glue_like --reviews=vaderSentiment-3.3.2.tar.gz --faq=faq/usr/share/doc/anarchism/markdown \\
        --out=glue_like
    python -m darkformer_jax.prepare_data --source=glue --task=sst2 --files=glue_like --out=data/sst2
    python -m darkformer_jax.prepare_data --source=glue --task=qnli --files=glue_like --out=data/qnli

SST-2: sentences of film reviews (Hutto and Gilbert 2014), whose label is the sign of the mean of twenty ratings. The
last tenth of a shuffled order is the development split. QNLI: a question of An Anarchist FAQ and a paragraph. The label
is entailment if the paragraph begins the answer, not_entailment if it begins that of another question of the same part.
Every tenth question is held out with its answer.
"""

import argparse
import gzip
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
HEADING = re.compile(r"#+ ([A-J](?:\.\d+)+) (.*\?)$")
PARAGRAPHS = 8  # of an answer that become examples
SHORTEST, LONGEST = 250, 900  # characters of a paragraph, so that many pairs are longer than a window and its chunk

Rows = list[Sequence[object]]


def reviews(sdist: Path) -> list[tuple[str, int]]:
    """(sentence, 1 if its mean rating is above 0); those of 0 are left out."""
    with tarfile.open(sdist) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            path = next(path for path in inner.getnames() if path.endswith(RATINGS.rpartition("/")[2]))
            file = inner.extractfile(path)
            lines = [] if file is None else file.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines]
    rated = {text.strip(): float(rating) for _, rating, text in rows if "\t" not in text}
    return [(text, int(rating > 0)) for text, rating in rated.items() if rating and text]


def answers(directory: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(part, question, the first paragraphs of its answer) of every question of the FAQ."""
    for path in sorted(directory.glob("sec*.md*")):
        text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
        pieces = re.split(r"^(#+ .*)$", text, flags=re.MULTILINE)
        for heading, body in zip(pieces[1::2], pieces[2::2], strict=True):
            found = HEADING.match(heading)
            paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
            chosen = [part for part in paragraphs if SHORTEST <= len(part) <= LONGEST][:PARAGRAPHS]
            if found and chosen:
                yield found[1][0], found[2], chosen


def pairs(of_questions: list[tuple[str, str, list[str]]], rng: random.Random) -> Rows:
    """Rows of (index, question, paragraph, label), half of each label."""
    rows: Rows = []
    for part, question, own in of_questions:
        others = [p for other, q, paragraphs in of_questions if other == part and q != question for p in paragraphs]
        for paragraph in own if others else ():
            rows.append((len(rows), question, paragraph, "entailment"))
            rows.append((len(rows), question, rng.choice(others), "not_entailment"))
    return rows


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A released .tsv: no quoting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) + "\n" for row in (header, *rows)]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Writes both directories and says how many rows they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", required=True, type=Path, help="the source distribution of vaderSentiment")
    parser.add_argument("--faq", required=True, type=Path, help="the directory of the FAQ's sec*.md.gz")
    parser.add_argument("--out", required=True, type=Path, help="directory of SST-2 and QNLI")
    args = parser.parse_args()
    rng = random.Random(0)
    rated = reviews(args.reviews)
    rng.shuffle(rated)
    held = len(rated) // 10
    for split, part in (("train", rated[held:]), ("dev", rated[:held])):
        write(args.out / "SST-2" / f"{split}.tsv", ("sentence", "label"), part)
    write(args.out / "SST-2" / "test.tsv", ("index", "sentence"), ((i, text) for i, (text, _) in enumerate(rated[:9])))
    questions = list(answers(args.faq))
    if not questions:
        sys.exit(f"error: {args.faq} has no question of the FAQ (sec*.md.gz)")
    header = ("index", "question", "sentence", "label")
    train = pairs([q for i, q in enumerate(questions) if i % 10], rng)
    dev = pairs(questions[::10], rng)
    for split, rows in (("train", train), ("dev", dev)):
        write(args.out / "QNLI" / f"{split}.tsv", header, rows)
    write(args.out / "QNLI" / "test.tsv", header[:-1], (row[:-1] for row in dev[:9]))
    print(f"{args.out}: SST-2 {len(rated) - held:,} and {held:,} sentences, QNLI {len(train):,} and {len(dev):,} pairs")


if __name__ == "__main__":
    main()
