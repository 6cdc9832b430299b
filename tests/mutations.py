"""Bundles that somebody changed: sizes, ids, types and numbers, with checksums that are right again.

    python -m tests.mutations FOLDER COUNT SEED

makes so many from tiny networks and the tokenizer of the prepared set FOLDER/set, translates with most and
trains some, by kernels and in plain PyTorch, and prints what should not have happened: anything but an error
of one sentence, or the same text and the same losses. Only manifests are written, so a bundle takes some
milliseconds, in one process, which a sanitizer can watch.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests import toy
from tests.fakes import small_network
from trmt.bundles import bundles, quantised
from trmt.bundles.bundles import make_manifest
from trmt.config import to_toml, to_tree
from trmt.decoding import engine
from trmt.errors import TrmtError
from trmt.native import build, products
from trmt.nets import layers
from trmt.nets.base import Precision, Product
from trmt.nets.linear import PlainProducts
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.planning import TrainOptions
from trmt.training.run import TrainingRun
from trmt.training.step import train_step
from trmt.training.validation import dev_loss
from trmt.translating import TranslateOptions, Translator

ROWS = 300  # more than the tokenizer has ids, and enough for the kernels of search
LINES = ("ka lomo § 日", "", "saru ne hikado mi wa yone tokuri bu remi ka ti")
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 32, 48, 59, 60, 61, 96, 127, 299, 300, 301, 1024, 65_537)
BEYOND = (-1, -(2**63), 2**18 + 1, 2**31, 2**32 + 1, 2**63, 10**30)
TYPES = (
    *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
)
NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e20, 1e-45, 0.0, -0.0, 1.0, -128.0)
TRAINED = 50  # of so many bundles one is trained, which takes as long as ten translations
TIE = 1e-3  # relative difference of scores below which rounding may choose
LOSSES = (TIE, TIE, 0.05)  # the same of losses, the last one after an update by Adam, which enlarges rounding
ROUNDING = 2**-23  # relative, of fp32
BASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("transformer", {}),
    ("transformer", {"norm_position": "pre", "tied": "none", "output_bias": True}),
    ("transformer", {"norm": "rms", "positions": "learned", "tied": "target", "feed_forward": 21}),
    ("ssru", {}),
    ("ssru", {"norm_position": "pre", "positions": "learned", "heads": 1}),
    ("transformer", {"activation": "gelu"}),
    ("transformer", {"d_model": 32}),  # heads that the kernels of training take
    ("rnn", {}),
)


@dataclass
class Changed:
    """A bundle in memory: its manifest, what is in its weights' file, and its tokenizer."""

    manifest: dict[str, Any]
    weights: dict[str, Tensor]
    tokenizer: Tokenizer

    def copy(self) -> Changed:
        """One that can be changed."""
        manifest = json.loads(json.dumps(self.manifest))
        return Changed(manifest, {name: x.clone() for name, x in self.weights.items()}, self.tokenizer)


def make_bases(tokenizer: Tokenizer) -> list[Changed]:
    """Sound bundles of several networks, each in fp32 and int8."""
    bases = []
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for architecture, options in BASES:
        sizes = (
            {} if architecture == "rnn" else {"max_positions": 24, "encoder_layers": 1, "decoder_layers": 1}
        )
        rows = {"source_vocabulary": ROWS, "target_vocabulary": ROWS}
        net = small_network(architecture, **{**rows, **sizes, **options})
        manifest = make_manifest(net, architecture, tokenizer, longest={"source": 9, "target": 9})
        weights = {name: x for name, x in net.state_dict().items() if name not in manifest.tied}
        for precision in precisions:
            stored = quantised.quantise_weights(weights) if precision == "int8" else weights
            tree = to_tree(replace(manifest, precision=precision, weights={"sha256": ""}))
            bases.append(Changed({"format": bundles.FORMATS[precision], **tree}, dict(stored), tokenizer))
    return bases


# What is changed


def option(bundle: Changed, draw: random.Random) -> None:
    """An option of the network."""
    network = bundle.manifest["network"]
    name = draw.choice(list(network))
    if isinstance(network[name], bool):
        network[name] = not network[name]
    elif isinstance(network[name], int):
        near = network[name] + draw.choice((-8, -1, 1, 8)), network[name] * 2, network[name] // 2
        network[name] = draw.choice((*SIZES, *BEYOND, *near, *near, *near))
    elif isinstance(network[name], float):
        network[name] = draw.choice((0.0, 0.5, 1.0, -0.1, math.nan, math.inf, 1e-300))
    else:
        words = ("pre", "post", "rms", "layer", "learned", "sinusoidal", "rotary", "relu", "swiglu", "gelu")
        network[name] = draw.choice((*words, "all", "none", "target", ""))


def fact(bundle: Changed, draw: random.Random) -> None:
    """Another field of the manifest."""
    manifest = bundle.manifest
    name = draw.choice(("special", "longest", "tied", "precision", "architecture", "weights"))
    if name in ("special", "longest"):
        manifest[name][draw.choice(list(manifest[name]))] = draw.choice((*SIZES, *BEYOND))
    elif name == "tied" and manifest["tied"] and draw.random() < 0.5:
        del manifest["tied"][draw.choice(list(manifest["tied"]))]
    elif name == "tied":
        names = [*bundle.weights]
        manifest["tied"][draw.choice(names)] = draw.choice(names)
    elif name == "precision":
        manifest["precision"] = draw.choice(("fp32", "int8", "fp16"))
    elif name == "architecture":
        manifest["architecture"] = draw.choice(("transformer", "ssru", "rnn", "conv", "transformer-alibi"))


def vocabulary(bundle: Changed, draw: random.Random) -> None:
    """Fewer or more tokens, in the manifest and in all weights that have a row for each."""
    rows = draw.choice((1, 4, 30, 59, 60, 61, 128, 299, 301, 400))
    sides = draw.choice((("source",), ("target",), ("source", "target")))
    for side in sides:
        if f"{side}_vocabulary" in bundle.manifest["network"]:
            bundle.manifest["network"][f"{side}_vocabulary"] = rows
    for name, x in bundle.weights.items():
        if x.shape[:1] == (ROWS,) and (len(sides) == 2 or side_of(name) == sides[0]):
            bundle.weights[name] = torch.cat([x] * 2)[:rows].clone()


def side_of(name: str) -> str:
    return "source" if name.startswith(("encoder", "source")) else "target"


def pieces(bundle: Changed, draw: random.Random) -> None:
    """A tokenizer with a list of pieces of any length, and special ones anywhere in it."""
    count = draw.choice((8, 60, 128, 280, ROWS, ROWS, ROWS + 1, ROWS + 20, 4 * ROWS))
    known = bundle.tokenizer.source.pieces(range(bundle.tokenizer.source.vocabulary))
    listed = [known[n] if 4 <= n < len(known) else f"@{n}" for n in range(count)]
    where = draw.sample(range(count), 3) if draw.random() < 0.7 else [count - 1, 0, 1]
    for place, piece in zip(where, ("<pad>", "<unk>", "</s>"), strict=True):
        listed[place] = piece
    bundle.tokenizer = Tokenizer(bundle.tokenizer.settings, bundle.tokenizer.models, [listed])
    target = bundle.tokenizer.target
    bundle.manifest["special"] = {name: getattr(target, name) for name in ("pad", "unk", "bos", "eos")}


def shape(bundle: Changed, draw: random.Random) -> None:
    """A tensor cut, longer, transposed, with an axis more or less, or empty."""
    name = draw.choice(list(bundle.weights))
    x = bundle.weights[name]
    axis = draw.randrange(max(x.dim(), 1))
    ways: list[Callable[[], Tensor]] = [
        lambda: x.narrow(axis, 0, x.shape[axis] // 2),
        lambda: torch.cat([x, x], axis),
        lambda: x.transpose(0, -1),
        lambda: x[None],
        lambda: x[0],
        lambda: x.flatten(),
        lambda: x[:0],
        lambda: x.sum(),
    ]
    if x.dim():
        bundle.weights[name] = draw.choice(ways)().contiguous()


def dtype(bundle: Changed, draw: random.Random) -> None:
    """A tensor, or all of them, in another type."""
    chosen = draw.choice(TYPES)
    names = [*bundle.weights] if draw.random() < 0.2 else [draw.choice(list(bundle.weights))]
    for name in names:
        bundle.weights[name] = bundle.weights[name].to(chosen)


def numbers(bundle: Changed, draw: random.Random) -> None:
    """One number, a row or all of a tensor."""
    x = bundle.weights[draw.choice(list(bundle.weights))]
    at = x.reshape(-1) if draw.random() < 0.7 or not x.dim() else x[draw.randrange(len(x) or 1) :].reshape(-1)
    number = draw.choice(NUMBERS)
    if not x.is_floating_point():
        number = draw.choice((-128, 127, 0, 1))
    if at.numel() and x.dtype not in (torch.float8_e4m3fn, torch.bool):
        at[draw.randrange(at.numel()) if draw.random() < 0.6 else slice(None)] = number


def scales(bundle: Changed, draw: random.Random) -> None:
    """The scales of an int8 matrix."""
    names = [name for name in bundle.weights if name.endswith(quantised.SCALE)]
    if names:
        x = bundle.weights[draw.choice(names)]
        if x.is_floating_point() and x.dtype != torch.float8_e4m3fn:
            x[... if draw.random() < 0.5 or not x.numel() else draw.randrange(x.numel())] = draw.choice(
                NUMBERS
            )


def names(bundle: Changed, draw: random.Random) -> None:
    """Tensors exchanged, renamed, removed or added."""
    one, other = draw.sample(list(bundle.weights), 2)
    weights = bundle.weights
    match draw.choice(("exchange", "rename", "remove", "add")):
        case "exchange":
            weights[one], weights[other] = weights[other], weights[one]
        case "rename":
            weights[one + draw.choice((".scale", "x"))] = weights.pop(one)
        case "remove":
            del weights[one]
        case "add":
            weights[one + draw.choice((".scale", ".x"))] = weights[other]


MUTATIONS = (option, option, fact, vocabulary, pieces, shape, dtype, numbers, numbers, numbers, scales, names)


def changed(bases: list[Changed], draw: random.Random) -> tuple[Changed, str]:
    """A changed bundle, and what was changed."""
    bundle = draw.choice(bases).copy()
    chosen = draw.choices(MUTATIONS, k=draw.choice((1, 1, 2, 3)))
    for each in chosen:
        if bundle.weights and bundle.weights.keys():
            with suppress(IndexError, RuntimeError):  # what an earlier change has made impossible
                each(bundle, draw)
    return bundle, "+".join(each.__name__ for each in chosen)


# What comes of it


@dataclass(frozen=True)
class Outcome:
    """The translations and their scores, or an error."""

    error: str = ""
    bug: str = ""
    texts: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()


@contextmanager
def in_place_of_files(bundle: Changed, folder: Path) -> Iterator[None]:
    """The loading of `folder` finds this bundle, with a checksum that is right."""
    fingerprint = {"tokenizer": bundle.tokenizer.fingerprint}
    load = Tokenizer.load
    (folder / bundles.MANIFEST).write_text(json.dumps({**bundle.manifest, **fingerprint}))
    with (
        mock.patch.object(bundles, "checksum", lambda path: ""),
        mock.patch.object(bundles, "load_file", lambda path: dict(bundle.weights)),
        mock.patch.object(
            Tokenizer, "load", lambda path: bundle.tokenizer if path.parent == folder else load(path)
        ),
    ):
        yield


def outcome_of(use: Callable[[], Outcome]) -> Outcome:
    """What a use comes to."""
    try:
        return use()
    except TrmtError as error:
        message = str(error)
        sound = message.strip() and "\n" not in message and len(message) < 500
        return Outcome(error=message) if sound else Outcome(bug=f"not one sentence: {message!r}")
    except Exception as error:  # whatever it is, nobody may see it
        return Outcome(bug=f"{type(error).__name__}: {error}")


def translate(folder: Path, options: TranslateOptions, prefixes: list[str] | None) -> Outcome:
    """What becomes of the lines."""
    found = Translator.load(folder, options=options).translate(LINES, prefixes=prefixes)
    texts = tuple(each.text for each in found)
    return Outcome(
        texts=texts, scores=tuple(each.candidates[0].score if each.candidates else 0.0 for each in found)
    )


def learn(folder: Path, data: Path) -> Outcome:
    """The loss of the dev set at first and after two steps of a training that starts from the bundle."""
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(to_toml(toy.BASE))
    options = TrainOptions(run=folder.parent / "run", data=data, recipe=str(recipe), init_from=folder)
    with redirect_stderr(io.StringIO()):
        run = TrainingRun.from_options(options)
        run._initialise_weights()
        assert run.validator
        examples = next(iter(run.batches.iterate_once()))
        losses = [dev_loss(run.state, run.validator.batches).loss]
        for _ in range(2):
            result = train_step(run.state, [examples])
            losses.append(float(result.nll) / result.tokens)
    return Outcome(losses=tuple(losses))


@dataclass(frozen=True)
class BetweenInDouble:
    """Plain products, and double precision between them, as kernels have it: there, less overflows."""

    made: Precision
    precision: Precision = "int8"  # which asks for that

    def __call__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Product:
        return PlainProducts(self.made)(weight, bias, relu=relu)


def disagreement(native: Outcome, plain: Outcome) -> str:
    """What is wrong with the kernels' outcome; nothing if it is an error or the same text or loss."""
    if native.bug or plain.bug:
        return native.bug or f"in plain PyTorch: {plain.bug}"
    losses = zip(native.losses, plain.losses, LOSSES, strict=True) if native.losses and plain.losses else ()
    for mine, theirs, near in losses:
        if math.isfinite(mine) and math.isfinite(theirs) and abs(mine - theirs) > near * max(1, abs(theirs)):
            return f"kernels have losses {native.losses}, PyTorch {plain.losses}"
    if native.error or native.texts == plain.texts:
        return ""
    if plain.error:
        return f"kernels translate {native.texts}, PyTorch says {plain.error}"
    for one, other, mine, theirs in zip(native.texts, plain.texts, native.scores, plain.scores, strict=True):
        if one != other and abs(mine - theirs) > TIE * max(1, abs(mine), abs(theirs)):
            return f"kernels translate {one!r} ({mine}), PyTorch {other!r} ({theirs})"
    return ""


def run(
    folder: Path, data: Path, which: Iterable[int], seed: int, *, trained: int = TRAINED
) -> tuple[list[str], Counter[str]]:
    """Use changed bundles, by their numbers; what went wrong, and how often each outcome came."""
    problems, outcomes = [], Counter[str]()
    bases = make_bases(Tokenizer.load(data / "tokenizer"))
    folder.mkdir(exist_ok=True)
    with mock.patch.object(PreparedSet, "open", functools.cache(PreparedSet.open)):
        for number in which:
            draw = random.Random(seed * 1_000_003 + number)
            bundle, what = changed(bases, draw)
            with in_place_of_files(bundle, folder):
                if number % trained:
                    native, problem = compare_translations(folder, draw, bundle)
                else:
                    native, problem = compare_losses(folder, data, bundle)
            used = "translated" if native.texts else "trained" if native.losses else "refused"
            outcomes[used] += 1
            if problem := native.bug or problem:
                problems.append(f"{number} ({what}): {problem}")
    return problems, outcomes


def compare_translations(folder: Path, draw: random.Random, bundle: Changed) -> tuple[Outcome, str]:
    """What the kernels make of the lines, and how plain PyTorch disagrees."""
    search: dict[str, Any] = draw.choice(({"search": "greedy"}, {"beam": 2}, {"beam": 2, "n_best": 2}))
    precision: Any = draw.choice(("auto", "auto", "int8", "fp32"))
    options = TranslateOptions(max_length=3, device="cpu", precision=precision, **search)
    prefixes = draw.choice((None, None, ["oka §", "", "olomo oti " * 9]))
    processor = draw.choice(products.processors() or (None,))
    use = functools.partial(translate, folder, options, prefixes)
    load = bundles.load_bundle
    with (
        mock.patch.object(products, "best_processor", return_value=processor),
        mock.patch.object(bundles, "load_bundle", functools.cache(load)),
    ):
        native = outcome_of(use)
        if not native.texts:
            return native, ""
        with mock.patch.dict(os.environ, {"TRMT_KERNELS": "0"}):
            plain = outcome_of(use)
            problem = disagreement(native, plain)
            if not problem or plain.bug:
                return native, problem
            # Kernels compute no padding, where there can be numbers that are none.
            with (
                mock.patch.object(engine, "PlainProducts", BetweenInDouble),
                mock.patch.object(layers, "KEY_MULTIPLE", 1),
            ):
                alone = functools.partial(translate, folder, replace(options, batch=1), prefixes)
                problem = disagreement(native, outcome_of(alone))
            with mock.patch.object(bundles, "load_bundle", functools.cache(load)):
                return native, "" if rounding_decides(use, plain, folder, bundle) else problem


def compare_losses(folder: Path, data: Path, bundle: Changed) -> tuple[Outcome, str]:
    """What a training by kernels comes to, and how plain PyTorch disagrees."""
    use = functools.partial(learn, folder, data)
    native = outcome_of(use)
    network = bundle.manifest["network"]
    if not native.losses or network.get("dropout") or network.get("attention_dropout"):
        return native, ""
    with mock.patch.dict(os.environ, {"TRMT_KERNELS": "0"}):
        plain = outcome_of(use)
        problem = disagreement(native, plain)
        if problem and not plain.bug and rounding_decides(use, plain, folder, bundle):
            return native, ""
    return native, problem


def rounding_decides(use: Callable[[], Outcome], plain: Outcome, folder: Path, bundle: Changed) -> bool:
    """Whether plain PyTorch disagrees with itself if all weights are rounded differently."""
    nudged, noise = bundle.copy(), torch.Generator().manual_seed(0)
    for name, x in nudged.weights.items():
        if x.dtype == torch.float32:
            nudged.weights[name] = x * (1 + ROUNDING * torch.randn(x.shape, generator=noise))
    with in_place_of_files(nudged, folder):
        return bool(disagreement(outcome_of(use), plain))


def main() -> None:
    """Called by a test in a process of its own."""
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    build.MINUTES = 30  # a sanitizer makes long work of compiling
    problems, outcomes = run(folder / "changed", folder / "set", range(count), seed)
    print(*problems, sep="\n")
    print(f"{count} bundles, {dict(outcomes)}, {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
