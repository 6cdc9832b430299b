"""The claims that everybody repeats about translation networks, as data, and what it takes to measure them.

`scale` says how large everything is, `texts` makes the data, `systems` names the networks, `run` trains and
tests one of them, `speed` and `computed` measure what needs no training, `sayings` holds the claims,
`verdicts` the rule that judges them, `figures` and `page` show what came out. `bench/lineage.py` runs it all.
"""
