"""Make what is no translation: reports and their summaries, remarks and what they are about, documents.

    python data/beyond.py summaries [FOLDER] [--seed N]
    python data/beyond.py topics [FOLDER] [--seed N]
    python data/beyond.py documents [FOLDER] [--seed N]

The first two write train, dev and test to FOLDER (data/summaries, data/topics), each as .text and .answer,
the third train.txt and dev.txt (data/documents). Only the standard library is needed. The first two are
closed little worlds in which every answer follows from its text:

    summaries   a report of two to five sentences with the mark ¶ between them, most of them about somebody
                who sold something, some of them idle talk; the answer says who sold the most and who sold
                the least: N words become M
    topics      a remark about two things, of which it recommends one; the answer is the kind of thing that
                is recommended: N words become 1

and documents are for `trmt pretrain`: four to eight choices between things, all of one kind, so that whether
a text goes on with another can be told, but for the one time in five that the other's kind is the same.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path

Pair = tuple[str, str]

MARK = "¶"
CHOICES = (
    "The {one} or the {other}?",
    "Not the {one}, the {other}.",
    "First the {one}, then the {other}!",
    "A {one} is no {other}.",
)
SIZES = {"train": 12_000, "dev": 300, "test": 500}
DOCUMENTS = {"train": 4_000, "dev": 400}
NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hana Ines Jon Kim Lea".split()
GOODS = "apples pears plums leeks beans figs melons onions".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
IDLE = (
    "The weather on {day} was fine.",
    "{name} was late again.",
    "Nobody bought any {good}.",
    "On {day} the market was full.",
)
SALES = (
    "{name} sold {count} {good}.",
    "On {day}, {count} {good} were sold by {name}.",
    "It was {name} who sold {count} {good}.",
)
KINDS = {
    "food": "soup bread cheese salad rice cake stew pie".split(),
    "music": "song opera concert waltz ballad hymn tune sonata".split(),
    "travel": "train ferry bus tram cruise flight ride hike".split(),
    "clothes": "coat scarf hat shirt dress jacket glove sock".split(),
    "books": "novel poem atlas diary comic essay memoir fable".split(),
}
REMARKS = (
    "I liked the {good}, but not the {bad}.",
    "The {bad} was poor; take the {good} instead.",
    "Forget the {bad}. The {good} is what you want!",
    "Nobody who knows the {good} would choose the {bad}.",
    "Compared with the {good}, the {bad} is nothing.",
    "Not the {bad} but the {good} was worth the money.",
)


def report(chooser: random.Random) -> Pair:
    """A report and its summary."""
    sellers = chooser.sample(NAMES, chooser.randint(1, 3))
    counts = chooser.sample(range(1, 10), len(sellers))
    sales = [(count, name, chooser.choice(GOODS)) for count, name in zip(counts, sellers, strict=True)]
    sentences = [
        chooser.choice(SALES).format(name=name, count=count, good=good, day=chooser.choice(DAYS))
        for count, name, good in sales
    ]
    for _ in range(chooser.randint(1, 2)):
        idle = chooser.choice(IDLE).format(
            name=chooser.choice(NAMES), good=chooser.choice(GOODS), day=chooser.choice(DAYS)
        )
        sentences.insert(chooser.randint(0, len(sentences)), idle)
    most, best, what = max(sales)
    least, last, poor = min(sales)
    answer = f"{best} sold the most: {most} {what}. {last} sold the least: {least} {poor}."
    return f" {MARK} ".join(sentences), answer


def remark(chooser: random.Random) -> Pair:
    """A remark and the kind of thing that it recommends."""
    kind, other = chooser.sample(sorted(KINDS), 2)
    good, bad = chooser.choice(KINDS[kind]), chooser.choice(KINDS[other])
    return chooser.choice(REMARKS).format(good=good, bad=bad), kind


def document(chooser: random.Random) -> str:
    """Choices between things of one kind, one on a line."""
    things = KINDS[chooser.choice(sorted(KINDS))]
    pairs = (chooser.sample(things, 2) for _ in range(chooser.randint(4, 8)))
    return "".join(f"{chooser.choice(CHOICES).format(one=one, other=other)}\n" for one, other in pairs)


TASKS: dict[str, Callable[[random.Random], Pair]] = {"summaries": report, "topics": remark}


def generate(task: str, seed: int) -> dict[str, list[Pair]]:
    """The three parts; no text is in two of them, or twice in one."""
    chooser = random.Random(f"{task} {seed}")
    seen: set[str] = set()
    parts: dict[str, list[Pair]] = {}
    for part in ("test", "dev", "train"):
        # There are not many more remarks than this.
        wanted = min(SIZES[part], 6_000) if task == "topics" else SIZES[part]
        pairs: list[Pair] = []
        while len(pairs) < wanted:
            text, answer = TASKS[task](chooser)
            if text not in seen:
                seen.add(text)
                pairs.append((text, answer))
        parts[part] = pairs
    return parts


def generate_documents(seed: int) -> dict[str, list[str]]:
    """Documents to train with and others to look at."""
    chooser = random.Random(f"documents {seed}")
    return {part: [document(chooser) for _ in range(count)] for part, count in DOCUMENTS.items()}


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(text.encode())
    partial.replace(path)


def write_pairs(folder: Path, parts: dict[str, list[Pair]]) -> None:
    """Write each part as two files."""
    for part, pairs in parts.items():
        for side, name in enumerate(("text", "answer")):
            write(folder / f"{part}.{name}", "".join(f"{pair[side]}\n" for pair in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a task that is no translation.")
    parser.add_argument("task", choices=sorted([*TASKS, "documents"]))
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (data/TASK)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(__file__).parent / arguments.task
    if arguments.task == "documents":
        texts = generate_documents(arguments.seed)
        for part, documents in texts.items():
            write(folder / f"{part}.txt", "\n".join(documents))
        counts = {part: len(documents) for part, documents in texts.items()}
    else:
        parts = generate(arguments.task, arguments.seed)
        write_pairs(folder, parts)
        counts = {part: len(pairs) for part, pairs in parts.items()}
    made = "documents" if arguments.task == "documents" else "pairs"
    print(f"{folder}: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()) + f" {made}")


if __name__ == "__main__":
    main()
