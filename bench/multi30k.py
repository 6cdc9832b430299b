"""Multi30k English-German: the published result reproduced, and a recipe that is to beat it.

    python bench/multi30k.py FOLDER [--experiment multi30k] [--seeds 3] [--device cuda] [--budget 9m]

FOLDER holds train, val, test_2016_flickr, test_2017_flickr and test_2017_mscoco as .en and .de, plain or
.gz, of the data set (Elliott et al. 2016, https://github.com/multi30k/dataset, data/task1/raw). Run again,
it goes on where the time ran out. Published are, for a Transformer of 4 layers of 128 (Wu et al. 2021,
arXiv 2105.14462, and LividWo/Revisit-MMT), with a beam of 5 and the last ten checkpoints averaged, in BLEU
of lowercased words as Moses cuts them:

    test_2016_flickr 41.02    test_2017_flickr 33.36    test_2017_mscoco 29.88

multi30k         trains on such words, by the published recipe
multi30k-plus    the same text by a recipe that aims higher
multi30k-raw     text as it is, with trmt's own tokenizer, by that recipe; its translations are turned into
                 lowercased Moses words only to be compared
"""

from __future__ import annotations

from experiment import Experiment, main

TESTS = ("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
# Moses has cut the words: what is left to do is what the published data did with 10,000 merges. Every
# character of the training text has a piece, so bytes would only take places away.
MERGES = ("--size", "10000", "--no-byte-fallback", "--no-split-digits")
# fairseq, with which the results were made, divides by the length: of the penalties here, 1 is the nearest.
SEARCH = ("--beam", "5", "--length-penalty", "1.0")


def multi30k(
    name: str, recipe: str, *, tokenizer: tuple[str, ...] = MERGES, moses: bool = True
) -> Experiment:
    return Experiment(
        name=name,
        recipe=recipe,
        languages=("en", "de"),
        dev="val",
        tests=TESTS,
        search=SEARCH,
        averages=(("last", 10), ("best", 5)),
        forms=("published", "detokenised"),
        tokenizer=tokenizer,
        moses=moses,
    )


EXPERIMENTS = (
    multi30k("multi30k", "multi30k"),
    multi30k("multi30k-plus", "multi30k-plus"),
    multi30k("multi30k-raw", "multi30k-plus", tokenizer=("--size", "10000"), moses=False),
)

if __name__ == "__main__":
    main("Multi30k English-German to the end.", EXPERIMENTS, seeds=3)
