"""What can go wrong, as one tree.

    TrmtError          a user's mistake or a broken file: one sentence saying what, where, and what to do
      ConfigError      a recipe, a flag or a combination of options
      DataError        text, shards or prepared sets
      BundleError      checkpoints, run folders and bundles

The command line turns any of them into one line on standard error and exit code 1. Anything else that
escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations


class TrmtError(Exception):
    """Something the user can mend; the message says what, where and how."""

    exit_code = 1


class ConfigError(TrmtError):
    """A recipe, a flag, or a combination of options that cannot work."""


class DataError(TrmtError):
    """Text, shards or a prepared set that cannot be used."""


class BundleError(TrmtError):
    """A checkpoint, run folder or bundle that cannot be used."""
