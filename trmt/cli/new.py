"""`trmt new`: from parallel text to a scored translator, by the commands that it prints.

The folder is a run folder, which also holds the tokenizer and the prepared set. `new.json` has the commands
that have ended, with checksums of what they read and wrote: the same command line repeats those of which
anything has changed, and goes on with the others.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trmt import console
from trmt.cli.common import Threads
from trmt.cli.prepare import CORPUS
from trmt.cli.train import RecipeName, RecipeSettings, TrainDevice
from trmt.errors import BundleError, ConfigError
from trmt.training.history import NEW

if TYPE_CHECKING:
    from trmt.text.corpus import Corpus

FORMAT = 1
Checksums = Mapping[str, str]  # of files by their names


@dataclass(frozen=True)
class Text:
    """The corpora that a translator is made of."""

    train: tuple[str, ...]  # as typed
    dev: str | None
    test: Corpus | None
    languages: tuple[str, str]
    checksum: str  # of the training and the validation pairs, and their languages and weights


@dataclass(frozen=True)
class Step:
    """A command of trmt."""

    about: str  # what it does, and its defaults
    arguments: tuple[str, ...]
    files: Callable[[], Checksums] | None = None  # what it reads and writes; None: it is always run
    text: str = ""  # the checksum of the text, for a command that reads it, wherever it lies

    @property
    def line(self) -> str:
        """The command line."""
        return shlex.join(["trmt", *self.arguments])

    def facts(self) -> Checksums:
        """What has to be the same for the command to be done."""
        return {"command": self.text or self.line, **(self.files() if self.files else {})}


def command(
    name: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of the new translator, or a name in models/.")
    ],
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
    from trmt.bundles.checkpoints import named_folder
    from trmt.devices.choice import named_device
    from trmt.training.recipe import fitting_recipe, load_recipe

    text = _find_text(train, dev, test, source, target)
    load_recipe(recipe or fitting_recipe(0, gpu=False), settings)  # a wrong option is refused at once
    if device:
        named_device(device)
    folder = named_folder(name)
    done = _read_record(folder, text)
    machine = [*(["--device", device] if device else []), *(["--threads", str(threads)] if threads else [])]
    chosen = ["--recipe", recipe] if recipe else []
    chosen += [word for each in settings or () for word in ("--set", each)]
    steps = [
        *_data_steps(folder, text),
        *_training_steps(folder, chosen, machine),
        *_score_steps(folder, text, machine),
    ]
    if dry_run:
        for number, step in enumerate(steps, start=1):
            print(f"# [{number}/{len(steps)}] {step.about}\n{step.line}")
        return
    try:
        _run_all(folder, steps, text, done)
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on")
        raise


def _find_text(
    train: Sequence[str], dev: str | None, test: str | None, source: str | None, target: str | None
) -> Text:
    from trmt.text.corpus import find_languages, parse_corpus, unknown_languages

    source, target = find_languages(train, source, target)
    if not (source and target):
        raise unknown_languages(train)
    corpora = [parse_corpus(each, source, target) for each in (*train, *([dev] if dev else []))]
    tested = parse_corpus(test, source, target) if test else None
    if tested and tested.format != "two files":
        raise ConfigError(f"--test {test} is not two files; name SOURCE,TARGET or their prefix")
    facts = [[*map(_fingerprint, corpora)], len(train), source, target]
    checksum = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Text(tuple(train), dev, tested, (source, target), checksum)


def _fingerprint(corpus: Corpus) -> list[object]:
    from trmt.text.pairs import corpus_fingerprint

    found = corpus_fingerprint(corpus)
    if found is None:
        raise ConfigError(f"{corpus.name} can be read only once, trmt new reads it again; write it to a file")
    return [found, corpus.weight, corpus.columns]


# The commands


def _data_steps(folder: Path, text: Text) -> Iterator[Step]:
    corpora = [word for each in text.train for word in ("--train", each)]
    tokenizer, data = folder / "tokenizer", folder / "data"
    pair = ["--from", text.languages[0], "--to", text.languages[1]]
    made = tokenizer / "tokenizer.json", data / "index.json"
    yield Step(
        "8,000 subword pieces for both languages, fewer for little text (trmt tokenizer -h)",
        ("tokenizer", "-o", str(tokenizer), *corpora, *pair),
        lambda: _checksums(made[0]),
        text.checksum,
    )
    how = f"{text.dev} is for validation" if text.dev else "5 % of them, at most 500, are for validation"
    yield Step(
        f"pairs are filtered and encoded; {how} (trmt prepare -h)",
        (
            *("prepare", "-o", str(data), *corpora, *(["--dev", text.dev] if text.dev else [])),
            *("--tokenizer", str(tokenizer)),
        ),
        lambda: _checksums(*made),
        text.checksum,
    )


def _training_steps(folder: Path, chosen: Sequence[str], machine: Sequence[str]) -> Iterator[Step]:
    how = "" if "--recipe" in chosen else "the size of the data chooses the recipe (trmt recipes); "
    yield Step(
        f"{how}training ends when validations bring no gain, or with the steps of the recipe (trmt train -h)",
        ("train", str(folder), "--data", str(folder / "data"), *chosen, *machine),
        lambda: _checksums(folder / "data" / "index.json", *_newest_checkpoint(folder)),
    )
    yield Step(
        "the weights of those checkpoints are averaged that are better together (trmt average -h)",
        ("average", str(folder), *machine),
        lambda: _checksums(*_newest_checkpoint(folder), *_bundle(folder)),
    )


def _score_steps(folder: Path, text: Text, machine: Sequence[str]) -> Iterator[Step]:
    dev = str(folder / "data" / "dev.source.txt"), str(folder / "data" / "dev.target.txt")
    source, reference = text.test.paths if text.test else dev
    what = "test" if text.test else "dev"
    hypotheses = folder / f"hypotheses-{what}.{text.languages[1]}"
    yield Step(
        f"the {what} set is translated with beam search, which validations in training do without",
        ("translate", str(folder), "-i", source, "-o", str(hypotheses), *machine),
        lambda: _checksums(*_bundle(folder), Path(source), hypotheses),
    )
    yield Step(
        f"a first score, on the {what} set"
        + ("" if text.test else "; text that training never saw needs --test"),
        ("score", str(hypotheses), "--ref", reference, "--to", text.languages[1]),
    )


def _checksums(*paths: Path) -> Checksums:
    from trmt.storage.files import checksum

    return {str(path): checksum(path) for path in paths}


def _newest_checkpoint(folder: Path) -> list[Path]:
    from trmt.bundles import bundles, checkpoints

    return [each.folder / bundles.MANIFEST for each in checkpoints.list_checkpoints(folder)[-1:]]


def _bundle(folder: Path) -> list[Path]:
    """The manifest of the bundle that a run stands for."""
    from trmt.bundles import bundles, checkpoints

    return [checkpoints.bundle_of(folder)[0] / bundles.MANIFEST]


# The record of the folder


def _read_record(folder: Path, text: Text) -> dict[str, Any]:
    """The commands that have ended, each with its checksums; a folder for something else is refused."""
    from trmt.bundles import checkpoints
    from trmt.storage.files import PARTIAL
    from trmt.trees import TreeError, read_json, verified

    path = folder / NEW
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the new translator")
    if not path.is_file():
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        if other := next((each for each in found if not each.name.startswith(PARTIAL)), None):
            raise ConfigError(
                f"{folder} holds {other.name} and was not begun by trmt new; name an empty or a new folder"
            )
        return {}
    try:
        record = verified(read_json(path))
        done = {str(name): dict(facts) for name, facts in record["done"].items()}
        begun_with = str(record["text"])
    except (OSError, TreeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: {reason}; name another folder") from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise BundleError(f"{path} was not written by this trmt; name another folder") from error
    if begun_with != text.checksum and checkpoints.list_checkpoints(folder):
        raise ConfigError(
            f"{folder} was trained on other text, another dev set or other languages; name another folder "
            "for another translator"
        )
    return done


def _write_record(folder: Path, text: Text, done: Mapping[str, Checksums]) -> None:
    from trmt.storage.files import write_verified_json

    write_verified_json(folder / NEW, {"format": FORMAT, "text": text.checksum, "done": done})


# Running


def _run_all(folder: Path, steps: Sequence[Step], text: Text, before: Mapping[str, Any]) -> None:
    from trmt.sets.shards import PreparedSet

    done = dict(before)
    if not (folder / NEW).is_file():
        _write_record(folder, text, done)
    for number, step in enumerate(steps, start=1):
        name = step.arguments[0]
        if step.files and _is_done(step, done.get(name)):
            console.say(f"[{number}/{len(steps)}] done: {step.line}")
            continue
        if name == "translate" and not text.test and "dev" not in PreparedSet.open(folder / "data").splits:
            console.say("there is neither --test nor a dev set, so there is no score")
            break
        console.say(f"[{number}/{len(steps)}] {step.about}")
        console.say(step.line)
        _run(step)
        if step.files:
            done[name] = step.facts()
            _write_record(folder, text, done)
    console.say(f"translate with it: {shlex.join(['trmt', 'translate', str(folder)])} < FILE")


def _is_done(step: Step, recorded: Checksums | None) -> bool:
    """Whether a command has ended, and nothing that it read or wrote has changed since."""
    from trmt.errors import TrmtError

    try:
        return recorded is not None and step.facts() == recorded
    except (OSError, TrmtError):
        return False


def _run(step: Step) -> None:
    from trmt.cli import app

    quiet = ["--quiet"] if console.is_quiet() else []
    if code := app([*quiet, *step.arguments], prog_name="trmt", standalone_mode=False):
        raise typer.Exit(code)
