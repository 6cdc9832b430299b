"""The claims that everybody repeats about translation networks, as data, and what it takes to measure them.

`scale` says how large everything is, `texts` and `data` make what is trained on, `systems` names the
networks, `run` trains and tests one of them, `speed` and `computed` measure what needs no training. `asking`
is how claims are written, `on_recurrence` and `on_transformers` hold them, `sayings` all of them, `verdicts`
the rule that judges; `figures` and `page` show what came out. `bench/lineage.py` runs it all.
"""
