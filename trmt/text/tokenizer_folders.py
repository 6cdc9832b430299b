"""Where tokenizers are if no folder is named: data/tokenizer-SOURCE-TARGET, one for each direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trmt import console
from trmt.errors import BundleError
from trmt.text.tokenizer import SETTINGS_FILE, read_languages

DATA = Path("data")
FORMER = DATA / "tokenizer"  # the only folder of older versions


def tokenizer_folder(source: str, target: str) -> Path:
    """The folder of the tokenizer for two languages."""
    return DATA / f"tokenizer-{source}-{target}"


def find_tokenizer(*languages: str | None) -> Path:
    """The folder of the only tokenizer in data/ for these languages; it is printed.

    Two languages are source and target, one is either; None stands for any.
    """
    if len(languages) == 2 and all(languages):
        folder = tokenizer_folder(str(languages[0]), str(languages[1]))
        if (folder / SETTINGS_FILE).is_file():
            console.say(f"tokenizer: {folder}")
            return folder
    found = [path.parent for path in sorted(DATA.glob(f"{FORMER.name}*/{SETTINGS_FILE}"))]
    fitting = [folder for folder in found if _fits(read_languages(folder) or ("", ""), languages)]
    if len(fitting) == 1:
        console.say(f"tokenizer: {fitting[0]}")
        return fitting[0]
    if fitting:
        names = ", ".join(map(str, fitting))
        raise BundleError(f"there are several tokenizers, {names}; name one with --tokenizer")
    wanted = " to ".join(filter(None, languages))
    what = f"tokenizer for {wanted}" if wanted else "tokenizer"
    raise BundleError(
        f"there is no {what} in {DATA}/; train one with `trmt tokenizer`, or name its folder with --tokenizer"
    )


def _fits(known: tuple[str, str], wanted: Sequence[str | None]) -> bool:
    """Whether a tokenizer's languages are those that are wanted; one without languages fits all."""
    if not all(known):
        return True
    if len(wanted) == 1:
        return wanted[0] is None or wanted[0] in known
    return all(one is None or one == other for one, other in zip(wanted, known, strict=True))
