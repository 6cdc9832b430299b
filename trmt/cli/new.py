"""`trmt new`: from parallel text to a scored translator, by the commands that it prints.

The folder is a run folder, which also holds the tokenizer and the prepared set. `new.json` has the corpora
and the commands that have ended: the same command line goes on with the others.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trmt import console
from trmt.cli.common import Threads
from trmt.cli.prepare import CORPUS
from trmt.cli.train import RecipeName, RecipeSettings, TrainDevice
from trmt.errors import ConfigError, DataError
from trmt.training.history import NEW

if TYPE_CHECKING:
    from trmt.text.corpus import Corpus

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """A command of trmt."""

    about: str  # what it does, and its defaults
    arguments: tuple[str, ...]
    makes: Path | None = None  # the file or folder that it writes
    source: Path | None = None  # standard input
    out: Path | None = None  # standard output

    @property
    def line(self) -> str:
        """The command line."""
        streams = [("<", self.source), (">", self.out)]
        redirected = "".join(f" {sign} {shlex.quote(str(path))}" for sign, path in streams if path)
        return shlex.join(["trmt", *self.arguments]) + redirected


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new translator.")],
    train: Annotated[
        list[str], typer.Option("--train", metavar="CORPUS", help=f"Training pairs, repeatable: {CORPUS}.")
    ],
    dev: Annotated[
        str | None,
        typer.Option(
            "--dev",
            metavar="CORPUS",
            help="Validation pairs. [default: 5 % of the training pairs, at most 500]",
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="SOURCE,TARGET", help="Two files to score on. [default: the validation pairs]"
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="LANGUAGE", help="Source language. [default: the file's ending]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--to", metavar="LANGUAGE", help="Target language. [default: the file's ending]"),
    ] = None,
    recipe: RecipeName = None,
    settings: RecipeSettings = None,
    device: TrainDevice = None,
    threads: Threads = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
) -> None:
    """Train a new translator from text. Prints and runs all commands; the same line goes on after a stop."""
    from trmt.text.corpus import find_languages, unknown_languages

    languages = find_languages(train, source, target)
    if not (languages[0] and languages[1]):
        raise unknown_languages(train)
    pair = languages[0], languages[1]
    tested = _test_files(test, pair)
    machine = [*(["--device", device] if device else []), *(["--threads", str(threads)] if threads else [])]
    chosen = ["--recipe", recipe] if recipe else []
    chosen += [word for each in settings or () for word in ("--set", each)]
    steps = [
        *_data_steps(folder, train, dev, pair),
        *_training_steps(folder, [*chosen, *machine]),
        *_score_steps(folder, tested, pair, machine),
    ]
    if dry_run:
        for number, step in enumerate(steps, start=1):
            _announce(step, number, len(steps))
        return
    record = _open_record(folder, train, dev, pair)
    _run_all(folder, steps, record, has_test=tested is not None)


def _data_steps(
    folder: Path, train: Sequence[str], dev: str | None, languages: tuple[str, str]
) -> Iterator[Step]:
    corpora = [word for each in train for word in ("--train", each)]
    tokenizer, data = folder / "tokenizer", folder / "data"
    yield Step(
        "8,000 subword pieces for both languages, fewer for little text (trmt tokenizer -h)",
        ("tokenizer", str(tokenizer), *corpora, "--from", languages[0], "--to", languages[1]),
        makes=tokenizer,
    )
    validated = ["--dev", dev] if dev else []
    how = f"{dev} is for validation" if dev else "5 % of them, at most 500, are taken for validation"
    yield Step(
        f"pairs are filtered and encoded; {how} (trmt prepare -h)",
        ("prepare", str(data), *corpora, *validated, "--tokenizer", str(tokenizer)),
        makes=data,
    )


def _training_steps(folder: Path, options: Sequence[str]) -> Iterator[Step]:
    yield Step(
        "without --recipe, the size of the data chooses the recipe (trmt recipes); it is trained to its end",
        ("train", str(folder), "--data", str(folder / "data"), *options),
        makes=folder / "config.toml",
    )
    yield Step(
        "the weights of the best checkpoints are averaged (trmt average -h)",
        ("average", str(folder)),
        makes=folder / "average",
    )


def _score_steps(
    folder: Path, test: tuple[Path, Path] | None, languages: tuple[str, str], machine: Sequence[str]
) -> Iterator[Step]:
    dev = folder / "data" / "dev.source.txt", folder / "data" / "dev.target.txt"
    source, reference = test or dev
    what = "test" if test else "dev"
    hypotheses = folder / f"hypotheses-{what}.{languages[1]}"
    yield Step(
        f"the {what} set is translated with beam search",
        ("translate", str(folder), *machine),
        makes=hypotheses,
        source=source,
        out=hypotheses,
    )
    yield Step(
        f"a first score, on the {what} set" + ("" if test else "; text that training never saw needs --test"),
        ("score", str(hypotheses), "--ref", str(reference), "--to", languages[1]),
    )


def _test_files(test: str | None, languages: tuple[str, str]) -> tuple[Path, Path] | None:
    from trmt.text.corpus import parse_corpus

    if test is None:
        return None
    found = parse_corpus(test, *languages)
    if found.format != "two files" or any(path.lower().endswith(".gz") for path in found.paths):
        raise ConfigError(f"--test {test} is not two plain text files; name SOURCE,TARGET or their prefix")
    return Path(found.paths[0]), Path(found.paths[1])


# The record of the folder


def _open_record(
    folder: Path, train: Sequence[str], dev: str | None, languages: tuple[str, str]
) -> dict[str, Any]:
    """The record of the folder, which is begun if there is none; another text or direction is refused."""
    from trmt.storage.files import write_verified_json
    from trmt.text.corpus import parse_corpus
    from trmt.trees import read_json, verified

    corpora = [parse_corpus(each, *languages) for each in (*train, *([dev] if dev else []))]
    wanted = {
        "format": FORMAT,
        "train": list(train),
        "dev": dev,
        "languages": list(languages),
        "content": [_checksums(corpus) for corpus in corpora],
    }
    path = folder / NEW
    try:
        record = verified(read_json(path))
        done = [str(each) for each in record.get("done", ())]
    except FileNotFoundError:
        _check_empty(folder)
        write_verified_json(path, {**wanted, "done": []})
        return {**wanted, "done": []}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}; restore it, or name another folder") from error
    for key, value in wanted.items():
        if record.get(key) != value:
            what = f"{key} {_shown(record.get(key))}, not {_shown(value)}"
            what = "text that has changed since" if key == "content" else what
            raise ConfigError(f"{folder} was begun with {what}; name another folder for another translator")
    return {**wanted, "done": done}


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _checksums(corpus: Corpus) -> list[str]:
    from trmt.text.pairs import corpus_fingerprint

    found = corpus_fingerprint(corpus)
    if found is None:
        raise ConfigError(f"{corpus.name} can be read only once, trmt new reads it again; write it to a file")
    return found


def _check_empty(folder: Path) -> None:
    from trmt.storage.files import PARTIAL

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the new translator")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    other = next((path for path in found if not path.name.startswith(PARTIAL)), None)
    if other is not None:
        raise ConfigError(
            f"{folder} holds {other.name} and was not begun by trmt new; name an empty or a new folder"
        )


# Running


def _run_all(folder: Path, steps: Sequence[Step], record: dict[str, Any], *, has_test: bool) -> None:
    from trmt.sets.shards import PreparedSet
    from trmt.storage.files import write_verified_json

    done: list[str] = []
    for number, step in enumerate(steps, start=1):
        unscored = step.arguments[0] == "translate" and not has_test
        if unscored and "dev" not in PreparedSet.open(folder / "data").splits:
            console.say("there is neither --test nor a dev set, so there is no score")
            break
        # A step is done if its line has ended after the same lines as this time.
        known = record["done"][:number] == [*done, step.line] and step.makes and step.makes.exists()
        _announce(step, number, len(steps), skipped=bool(known))
        if not known:
            _run(step)
            record["done"] = [*done, step.line]
            if step.makes:
                write_verified_json(folder / NEW, record)
        done.append(step.line)
    console.say(f"translate with it: {shlex.join(['trmt', 'translate', str(folder)])} < FILE")


def _announce(step: Step, number: int, count: int, *, skipped: bool = False) -> None:
    if skipped:
        console.say(f"[{number}/{count}] done: {step.line}")
        return
    console.say(f"[{number}/{count}] {step.about}")
    console.say(step.line)


def _run(step: Step) -> None:
    from trmt.cli import app

    quiet = ["--quiet"] if console.is_quiet() else []
    with _redirected(step):
        code = app([*quiet, *step.arguments], prog_name="trmt", standalone_mode=False)
    if code:
        raise typer.Exit(code)


@contextmanager
def _redirected(step: Step) -> Iterator[None]:
    """Standard input and output from and to the files of a step."""
    import io
    import sys

    from trmt.storage.files import atomic_file

    if step.source is None or step.out is None:
        yield
        return
    before = sys.stdin, sys.stdout
    try:
        with step.source.open(encoding="utf-8") as source, atomic_file(step.out) as out:
            sys.stdin, sys.stdout = source, io.TextIOWrapper(out, encoding="utf-8")
            yield
            sys.stdout.flush()
            sys.stdout.detach()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {error.filename}; run trmt new again") from error
    finally:
        sys.stdin, sys.stdout = before
