"""Other toolkits trained as trmt is: the same network, the same pieces, the same budget, the same clock.

Each adapter runs inside its toolkit's own environment and imports nothing of trmt:

    python -m peers.fairseq prepare job.json     once: the corpus in the toolkit's own format
    python -m peers.fairseq train job.json       trains by the toolkit's own training program, measured

`peers.trmt` is trmt itself, measured by the same probe.
"""
