"""The errors that users can act on, as one tree.

    TrmtError          a user's mistake or a broken file: one sentence with what, where, and what to do
      ConfigError      a recipe, a flag or a combination of options
      DataError        text, shards or prepared sets
      BundleError      checkpoints, run folders and bundles

The command line prints any of them as one line on standard error and exits with code 1, and so it does with
an error of the operating system that names a file. Any other exception that gets there is a bug of trmt and
shows its traceback.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; of a compiler's, that of the error inside."""
    error = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:;")


class TrmtError(Exception):
    """Something that the user can correct; the message says what, where and how."""

    exit_code = 1


class ConfigError(TrmtError):
    """A recipe, a flag, or a combination of options that cannot work."""


class DataError(TrmtError):
    """Text, shards or a prepared set that cannot be used."""


class BundleError(TrmtError):
    """A checkpoint, run folder or bundle that cannot be used."""
