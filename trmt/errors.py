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

import re
import unicodedata

LONGEST_WORD, SHORTENED = 1000, 200  # characters of a word, such as a path, and what is left of a longer one


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; of a compiler's, that of the error inside."""
    error = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:;")


class TrmtError(Exception):
    """Something that the user can correct; the message says what, where and how."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line, whatever it quotes: control characters are spelled, huge words are cut."""
        text = "".join(map(_spelled, super().__str__()))
        return re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:SHORTENED]}...", text)


def _spelled(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) not in ("Cc", "Zl", "Zp"):
        return letter
    return letter.encode("unicode_escape").decode("ascii")


class ConfigError(TrmtError):
    """A recipe, a flag, or a combination of options that cannot work."""


class DataError(TrmtError):
    """Text, shards or a prepared set that cannot be used."""


class BundleError(TrmtError):
    """A checkpoint, run folder or bundle that cannot be used."""
