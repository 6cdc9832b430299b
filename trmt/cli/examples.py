"""Two examples of each command, for its help and its section of docs/commands.md."""

from __future__ import annotations

from collections.abc import Mapping

Example = tuple[str, str]  # a command line, and what it does

EXAMPLES: Mapping[str, tuple[Example, Example]] = {
    "new": (
        (
            "trmt new en-de --train corpus.en,corpus.de",
            "tokenizer, prepared set, training, averaging and a score; again: go on",
        ),
        (
            "trmt new en-sw --train web.en-sw.tsv.gz --dev dev.en,dev.sw --dry-run",
            "the commands, as a shell script; nothing is run",
        ),
    ),
    "recipes": (
        ("trmt recipes", "all recipes"),
        ("trmt recipes transformer-tiny > my.toml", "a recipe of your own, with all keys"),
    ),
    "models": (
        ("trmt models", "what is in models/, and which model is the default"),
        ("trmt models --json", "the same for programs"),
    ),
    "tokenizer": (
        (
            "trmt tokenizer --train data/train --from en --to de",
            "one of 8,000 pieces from data/train.en and .de",
        ),
        (
            "trmt tokenizer -o data/zh-en-tokenizer --train corpus.zh,corpus.en --from zh --to en --separate",
            "one for each side, from two files",
        ),
    ),
    "prepare": (
        (
            "trmt prepare --train data/train --dev data/dev",
            "data/train.en and .de, in the tokenizer's languages",
        ),
        (
            "trmt prepare -o data/all --train web.tsv.gz --train clean.en,clean.de@2 --dev dev.en,dev.de",
            "two corpora, pairs of the second sampled twice as often",
        ),
    ),
    "vectors": (
        ("trmt vectors -o vectors.en --text mono.en", "for --set vectors.source=vectors.en"),
        (
            "trmt vectors -o vectors.de --text mono.de --target --width 256",
            "for the target side of d_model 256",
        ),
    ),
    "train": (
        ("trmt train", "the newest set in data/, with a recipe for its size; again: resume"),
        (
            "trmt train models/big --data data/en-de --recipe transformer-big --set training.steps=50000",
            "a run folder, a set, a recipe and a setting",
        ),
    ),
    "pretrain": (
        ("trmt pretrain models/bert --data data/documents --recipe bert-tiny", "an encoder"),
        (
            "trmt pretrain models/bart --data data/documents --recipe bart-base --dry-run",
            "what it would take",
        ),
    ),
    "check-resume": (
        ("trmt check-resume models/my-run", "with a kill in the middle of 20 steps"),
        (
            "trmt check-resume models/my-run --steps 100 --set training.deterministic=true",
            "more steps; on a GPU with deterministic kernels",
        ),
    ),
    "average": (
        ("trmt average", "of the newest run in models/"),
        ("trmt average models/my-run --last 8 -o models/last-8", "of the last eight checkpoints"),
    ),
    "translate": (
        ("trmt translate models/my-run < test.en > test.de", "standard input to standard output"),
        ("trmt translate models/my-run -i test.en.gz -o test.de", "a file, here a compressed one, to a file"),
    ),
    "quantize": (
        ("trmt quantize models/my-run -o models/my-run-int8", "of a run folder, its average"),
        ("trmt quantize -o models/int8", "the default model"),
    ),
    "inspect": (
        ("trmt inspect models/my-run", "a run folder"),
        ("trmt inspect models/my-run/average --json", "a bundle, for programs"),
    ),
    "verify": (
        ("trmt verify models/my-run", "after a copy or an update"),
        ("trmt verify models/my-run --device cuda", "on a GPU"),
    ),
    "export": (
        ("trmt export models/my-run --to ctranslate2", "to models/my-run-ctranslate2"),
        ("trmt export models/my-run --to huggingface -o marian-en-de", "to another folder"),
    ),
    "import": (
        ("trmt import opus-mt-en-de", "a Marian model in a Hugging Face folder, to models/opus-mt-en-de"),
        ("trmt import opus-mt-en-de -o models/opus --no-check", "without comparing the outputs"),
    ),
    "align": (
        ("trmt align models/my-run --pairs test.en,test.de > test.align", "with the attention of a model"),
        ("trmt align --ibm-model1 data/en-de < pairs.tsv", "with IBM Model 1, trained on a prepared set"),
    ),
    "score": (
        ("trmt score output.de --ref test.de", "BLEU, chrF and TER"),
        ("trmt score base.de new.de --ref test.de -m chrf", "two systems, and whether they differ by chance"),
    ),
    "attend": (
        ('trmt attend models/my-run --source "The soup is hot."', "a map on the terminal"),
        ("trmt attend models/my-run -o maps.html < dev.en", "a page with all layers and heads"),
    ),
    "plot": (
        ("trmt plot", "the newest run in models/, on the terminal"),
        ("trmt plot models/a models/b -o curves.svg --x hours", "two runs, as a figure"),
    ),
    "compare": (
        ("trmt compare models/base models/new --test test.en,test.de", "translate and score a test set"),
        ("trmt compare models/base models/new --log-only", "settings, speed and curves only"),
    ),
    "env": (
        ("trmt env", "on the terminal"),
        ("trmt env > environment.txt", "to a file, for a bug report"),
    ),
    "bert import": (
        ("trmt bert import bert-base-cased -o models/bert", "a folder of transformers, with data/tokenizer"),
        ("trmt bert import bert-base-cased -o models/bert --tokenizer data/other", "with another tokenizer"),
    ),
    "bert export": (
        ("trmt bert export models/bert -o bert-folder", "of a run folder, its best checkpoint"),
        ("trmt bert export models/bert/step-00010000 -o bert-folder", "of one checkpoint"),
    ),
}
