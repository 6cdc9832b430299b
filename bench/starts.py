"""What a translator of little data gains from a start: `python bench/starts.py [--seeds 3]`.

The phrasebook recipe learns from 3,000 of the phrasebook's pairs, and begins with chance, with the encoder
of a network that has read the English of all 40,000 (BERT), or with word vectors of that English. Each
start is made once; what differs between seeds is the rest of the network and the order of the pairs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from provenance import RESULTS, record
from recipes import READS, Workshop

PAIRS = 3_000
STEPS = 300
SETTINGS = ("network.dropout=0.1", "optim.warmup=100", "validation.sentences=100")
READING = (*READS, "batches.tokens=2048", "loss.next_sentence=false")
READING_STEPS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what pretrained starts gain on little data.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        figures = compared(shop, given.seeds)
    command = f"OMP_NUM_THREADS=1 python bench/starts.py --seeds {given.seeds}"
    print(record("starts", figures, command=command, folder=given.out))


def compared(shop: Workshop, seeds: int) -> dict:
    """The scores of every start and seed, the starts in turn."""
    documents = shop.documents()
    little_data(shop)
    reading = shop.train("pretrain", "models/bert", documents, "bert-tiny", READING_STEPS, READING)
    shop.trmt("vectors", "vectors.txt", "--width", "128", "--text", TEXT, "--tokenizer", PIECES)
    # One width and one kind of network for all: the encoder decides.
    starts: dict[str, tuple[str, ...]] = {
        "chance": SAME,
        "word vectors": (*SAME, "--set", "vectors.source=vectors.txt"),
        "encoder": ("--init-from", "models/bert:encoder"),
    }
    found: dict[str, list[dict]] = {name: [] for name in starts}
    for seed in range(1, seeds + 1):
        for name, begin in starts.items():
            model = f"models/{name.replace(' ', '-')}-{seed}"
            settings = (*SETTINGS, f"training.seed={seed}")
            learned = shop.train("train", model, "data/little", "phrasebook", STEPS, settings, begin=begin)
            found[name].append({"seed": seed, **learned, **shop.scored(model, "phrasebook")})
            print(name, seed, found[name][-1]["scores"]["bleu"]["value"], flush=True)
    return {"pairs": PAIRS, "reading": reading, "starts": found}


PIECES = "data/pieces-phrasebook"
TEXT = "texts/phrasebook/train.en"
SAME = tuple(
    word
    for setting in (
        "encoder_layers=2",
        "heads=2",
        "activation=gelu",
        "positions=learned",
        "embedding_norm=true",
        "embedding_scale=false",
        "max_positions=512",
        "norm_epsilon=1e-12",
    )
    for word in ("--set", f"network.{setting}")
)


def little_data(shop: Workshop) -> None:
    """A prepared set of some of the phrasebook's pairs, spread evenly over it."""
    for language in shop.prepared("phrasebook"):
        lines = (shop.folder / f"texts/phrasebook/train.{language}").read_text("utf-8").splitlines()
        some = (lines[number * len(lines) // PAIRS] for number in range(PAIRS))
        path = shop.folder / f"texts/little.{language}"
        path.write_text("".join(f"{line}\n" for line in some), encoding="utf-8")
    given = ("--train", "texts/little", "--dev", "texts/phrasebook/dev", "--tokenizer", PIECES)
    shop.trmt("prepare", "data/little", *given)


if __name__ == "__main__":
    main()
