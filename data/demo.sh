#!/bin/sh
# The main job from nothing: phrasebook, tokenizer, prepared set, training, averaging, translation, score.
# `make demo` runs it; with trmt and python on the PATH it runs from any checkout.
set -eu
cd "$(dirname "$0")/.."
run=models/demo
# What an earlier demo with other settings left would be another run.
rm -rf "$run"

python data/phrasebook.py data/phrasebook
trmt tokenizer data/tokenizer --train data/phrasebook/train --from en --to de --size 2400
trmt prepare data/phrasebook-en-de --train data/phrasebook/train --dev data/phrasebook/dev
trmt train "$run" --data data/phrasebook-en-de --recipe phrasebook
trmt average "$run"
python data/demo_report.py "$run"
