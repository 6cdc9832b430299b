"""Two corpora of other kinds, trained to convergence on one GPU: short everyday sentences, and laws.

    python bench/corpora.py FOLDER --experiment tatoeba [--device cuda] [--budget 9m]
    python bench/corpora.py FOLDER --experiment laws [--device cuda] [--budget 9m]

FOLDER holds train, dev and test, plain or .gz, one file for each language. Run again, it goes on where the
time ran out.

tatoeba    English-German, 162,420 pairs of the Tatoeba project (https://tatoeba.org, CC BY 2.0) as
           https://www.manythings.org/anki exported them; dev and test of 2,500 lines share no sentence with
           train on either side. dev.allrefs.de.tsv and test.allrefs.de.tsv have every known translation of
           a line, with tabs between them. English does not tell du, ihr and Sie apart, which limits scores.
laws       English-French, 250,000 pairs of the consolidated Acts and regulations of Canada
           (https://github.com/justicecanada/laws-lois-xml, Open Government Licence - Canada), aligned by the
           structure of the documents; dev and test are other documents.
"""

from __future__ import annotations

from experiment import Experiment, main

EXPERIMENTS = (
    Experiment(
        name="tatoeba",
        recipe="tatoeba",
        languages=("en", "de"),
        dev="dev",
        tests=("test",),
        tokenizer=("--size", "10000"),
        averages=(("best", 1), ("best", 5)),
        forms=("detokenised", "all references"),
    ),
    Experiment(
        name="laws",
        recipe="laws",
        languages=("en", "fr"),
        dev="dev",
        tests=("test",),
        tokenizer=("--size", "16000"),
        averages=(("best", 1), ("best", 5)),
    ),
)

if __name__ == "__main__":
    main("Tatoeba English-German and the laws of Canada, to convergence.", EXPERIMENTS, seeds=1)
