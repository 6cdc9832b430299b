"""Searches choose tokens, rankers choose among finished hypotheses; neither knows text or networks."""
