"""Averaging the weights of checkpoints, which often gains BLEU ("Attention Is All You Need", section 6.1).

Which checkpoints are averaged is chosen on the dev set, as in a greedy soup ("Model soups", Wortsman et al.,
2022): from the best checkpoint on, the next best one is added if that makes the average better. Each of them
costs one validation. So an average is never worse on the dev set than the best checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trmt import clock, console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import AverageRecord, DevScore, Manifest, first_score
from trmt.bundles.checkpoints import AVERAGE, CONFIG, Checkpoint
from trmt.bundles.schema import StoredScore
from trmt.config import Options
from trmt.errors import BundleError, ConfigError, DataError
from trmt.training import describing
from trmt.training.history import LABELS
from trmt.training.models import newest_run
from trmt.training.run_validator import RunValidator
from trmt.validating import validate
from trmt.verifying import record

MAX_CANDIDATES = 10  # checkpoints that are tried, the best ones
MAX_NEIGHBOURS = 5  # checkpoints that are averaged where there is no dev set to choose on
NEIGHBOUR_SHARE = 0.2  # of the steps of the run, at its end: where these must be

Scores = tuple[StoredScore, ...]


@dataclass(frozen=True, kw_only=True)
class AverageOptions(Options):
    """What `trmt average` takes."""

    paths: Sequence[Path] = ()  # a run folder or several bundles; empty: the newest run
    best: int | None = None  # average exactly so many checkpoints with the best scores
    last: int | None = None  # average exactly so many of the newest checkpoints
    out: Path | None = None  # the folder to write; None: average/ in the run folder
    data: Path | None = None  # the prepared set of the run; None: where it was when the run was started
    device: str = "auto"  # on which to validate
    trust_code: bool = False  # allow the run folder to name code outside trmt


@dataclass(frozen=True)
class _Chosen:
    """Checkpoints to average, their average, and the scores of both if they were validated."""

    folders: list[Path]
    mean: _Mean
    scores: Scores = ()
    best_scores: Scores = ()  # of the best single checkpoint
    rejected: list[Path] = field(default_factory=list)
    rejected_score: DevScore | None = None  # of the best average that was not better
    beam: int = 0  # of the translations that were scored; 0: none were


def average(options: AverageOptions) -> Path:
    """Average checkpoints into a bundle and return its folder.

    Of a run folder alone, the checkpoints are chosen on the dev set. The golden sentences of the checkpoints
    are translated with the new bundle and stored in it.
    """
    if options.best is not None and options.last is not None:
        raise ConfigError("--best and --last exclude each other; choose one")
    if any(count is not None and count < 1 for count in (options.best, options.last)):
        raise ConfigError("--best and --last take a number of at least 1")
    paths = [checkpoints.find_folder(path) for path in options.paths] or [newest_run()]
    if len(paths) == 1 and not bundles.is_bundle(paths[0]):
        return _average_run(paths[0], options)
    if options.best is not None or options.last is not None:
        raise ConfigError("--best and --last select checkpoints of one run folder; name that folder")
    if options.out is None:
        raise ConfigError("several checkpoints need --output, the folder in which to write their average")
    _check_out(options.out, paths)
    parents = {path.parent for path in paths}
    is_one_run = len(parents) == 1 and describing.is_run(paths[0].parent)
    _average_as_told(paths, paths[0].parent if is_one_run else None, options.out, options)
    return options.out


def _check_out(out: Path, chosen: Sequence[Path]) -> None:
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; choose another folder with --output")
    if out.resolve() in [path.resolve() for path in chosen] or (out / checkpoints.TRAINING).exists():
        raise BundleError(f"{out} is a checkpoint, which would be lost; choose another folder with --output")


def _average_run(run: Path, options: AverageOptions) -> Path:
    """Average checkpoints of a run: those that are asked for, or those that are best together."""
    out = options.out or run / AVERAGE
    if options.best is not None or options.last is not None:
        told = select_checkpoints(run, best=options.best, last=options.last)
        _check_out(out, told)
        _average_as_told(told, run, out, options)
        return out
    found = checkpoints.list_checkpoints(run)
    if not found:
        raise BundleError(f"there are no checkpoints in {run}; train first, or name another run folder")
    _check_out(out, [checkpoint.folder for checkpoint in found])
    ranked = checkpoints.ranked(found)
    validator = _open_validator(run, options) if ranked else ""
    if isinstance(validator, RunValidator):
        began = clock.now()
        chosen = _choose_on_dev_set(ranked[:MAX_CANDIDATES], validator)
        _write(chosen, found, out, best=ranked[0])
        _report_choice(chosen, out, ranked, seconds=clock.now() - began)
    elif ranked:
        best, scores = [ranked[0].folder], ranked[0].manifest.scores
        _write(_Chosen(best, _Mean.of(best), scores, scores), found, out, best=ranked[0])
        console.warn(
            f"{out} is the best checkpoint, {ranked[0].folder.name}, because no average can be scored "
            f"({validator}); name the prepared set of the run with --data"
        )
    else:
        last = [checkpoint.folder for checkpoint in neighbours(found)]
        _write(_Chosen(last, _Mean.of(last)), found, out)
        console.say(
            f"{run} has no scores on a dev set to choose by: only checkpoints of the last fifth of its steps "
            f"are averaged, because earlier ones may be worse ({len(last)} of {len(found)}: "
            f"{_names(last)}) -> {out}"
        )
    return out


def neighbours(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The last checkpoint of a run and those that are close to it, newest first."""
    begin = (1 - NEIGHBOUR_SHARE) * found[-1].step
    return [checkpoint for checkpoint in reversed(found) if checkpoint.step >= begin][:MAX_NEIGHBOURS]


def select_checkpoints(run: Path, *, best: int | None = None, last: int | None = None) -> list[Path]:
    """The best or the last checkpoints of a run; a warning if there are fewer."""
    found = checkpoints.list_checkpoints(run)
    if not found:
        raise BundleError(f"there are no checkpoints in {run}; train first, or name another run folder")
    wanted = best if best is not None else last if last is not None else len(found)
    order = checkpoints.ranked(found) if best is not None else found[::-1]
    if best is not None and not order:
        raise BundleError(f"no checkpoint in {run} was ever validated; use --last instead of --best")
    if len(order) < wanted:
        console.warn(f"{run} has {len(order)} such checkpoints, not {wanted}; averaging those")
    return [checkpoint.folder for checkpoint in order[:wanted]]


# Scores


def _open_validator(run: Path, options: AverageOptions) -> RunValidator | str:
    """What validates weights on the dev set of the run; or why it cannot, as the beginning of a sentence."""
    try:
        if not describing.is_run(run):
            raise DataError(f"{run} has no {CONFIG}")
        data = describing.dev_set(run, options.data)
        if data is None:
            return f"{run} has no dev set"
        validator = RunValidator(run, data, validate, device=options.device, trust_code=options.trust_code)
        if validator.tokenizer != checkpoints.list_checkpoints(run)[-1].manifest.tokenizer:
            raise DataError(f"{data.folder} has another tokenizer than {run}")
    except DataError as error:
        if options.data:
            raise
        return str(error)
    return validator


def _choose_on_dev_set(ranked: Sequence[Checkpoint], validator: RunValidator) -> _Chosen:
    """Start from the best checkpoint, and add each of the others that makes the average better."""
    best, *others = ranked
    with console.progress("validating averages", len(ranked), unit="averages") as progress:
        mean = _Mean.of([best.folder])
        found = validator.validate(mean.weights(), where=str(best.folder))
        scores = best_scores = found or best.manifest.scores
        progress.advance()
        chosen, rejected, rejected_score = [best.folder], [], None
        for checkpoint in others:
            wider = mean.plus(checkpoint.folder)
            found = validator.validate(wider.weights(), where=str(checkpoint.folder))
            progress.advance()
            if _is_better(found, scores):
                mean, scores = wider, found
                chosen.append(checkpoint.folder)
                continue
            rejected.append(checkpoint.folder)
            score = first_score(found)
            if score and (rejected_score is None or score.cost < rejected_score.cost):
                rejected_score = score
    return _Chosen(chosen, mean, scores, best_scores, rejected, rejected_score, validator.beam)


def _is_better(scores: Scores, than: Scores) -> bool:
    return bundles.is_worse(first_score(than), first_score(scores))


def _report_choice(chosen: _Chosen, out: Path, ranked: Sequence[Checkpoint], *, seconds: float) -> None:
    """Print what is averaged, both scores, and what choosing has cost."""
    tried = len(chosen.folders) + len(chosen.rejected)
    cost = f"{tried} validations in {console.duration(seconds)}"
    best = ranked[0].folder.name
    single = _shown(chosen.best_scores)
    if len(chosen.folders) == 1:
        if not chosen.rejected:
            why = "there is no other validated checkpoint"
        elif chosen.rejected_score:
            why = f"no average is better on the dev set (best single {single}, best average "
            why += f"{_format(chosen.rejected_score)}; {cost})"
        else:
            why = "averages could not be validated"
        console.say(f"the best checkpoint alone, {best}: {why} -> {out}")
        return
    left_out = f", left out: {_names(chosen.rejected)}" if chosen.rejected else ""
    console.say(f"average of {_names(chosen.folders)}{left_out} -> {out}")
    console.say(f"{_compared(chosen, best)}; {cost}")


def _average_as_told(paths: list[Path], run: Path | None, out: Path, options: AverageOptions) -> None:
    """Average these checkpoints; where the dev set of their run is known, score the average and the best."""
    chosen = _Chosen(paths, _Mean.of(paths))
    found = checkpoints.list_checkpoints(run) if run else []
    ranked = checkpoints.ranked(found)
    why_not = "these are not checkpoints of one run"
    if run:
        validator = _open_validator(run, options)
        if not isinstance(validator, RunValidator):
            why_not = validator
        elif not ranked:
            why_not = f"no checkpoint in {run} was ever validated"
        else:
            best, why_not = ranked[0].folder, ""
            best_scores = validator.validate(_Mean.of([best]).weights(), where=str(best))
            scores = validator.validate(chosen.mean.weights(), where=str(out))
            chosen = replace(chosen, scores=scores, best_scores=best_scores, beam=validator.beam)
            if out == run / AVERAGE:
                _keep_better(out, scores)
    _write(chosen, found, out, best=ranked[0] if chosen.scores else None)
    console.say(f"average of {_names(paths)} -> {out}")
    if not chosen.scores:
        console.say(f"it was not scored: {why_not or 'the dev set could not be validated'}")
        return
    console.say(_compared(chosen, ranked[0].folder.name))
    if _is_better(chosen.best_scores, chosen.scores):
        console.warn(
            f"{out} is worse on the dev set than the best checkpoint and is not used by default; trmt "
            f"average {run} chooses checkpoints that make it better"
        )


def _keep_better(out: Path, scores: Scores) -> None:
    """Refuse to replace an average that is better on the dev set."""
    if bundles.is_bundle(out) and _is_better(before := bundles.read_manifest(out).scores, scores):
        raise BundleError(
            f"{out} is better on the dev set, {_shown(before)}, than this average, {_shown(scores)}; write "
            "this one elsewhere with --output"
        )


def _compared(chosen: _Chosen, best: str) -> str:
    """The scores of the average and of the best checkpoint."""
    how = f"dev set with beam {chosen.beam}" if chosen.beam else "dev set"
    single = _shown(chosen.best_scores)
    return f"{how}: average {_shown(chosen.scores)}, best single checkpoint ({best}) {single}"


def _shown(scores: Scores) -> str:
    score = first_score(scores)
    return _format(score) if score else "unknown"


def _format(score: DevScore) -> str:
    return f"{LABELS.get(score.metric, score.metric)} {score.value:.5g}"


def _names(folders: Iterable[Path]) -> str:
    return ", ".join(folder.name for folder in folders)


# Weights


@dataclass(frozen=True)
class _Mean:
    """The mean of the weights of some bundles, taken in double precision."""

    paths: tuple[Path, ...]
    manifest: Manifest  # of the first one
    total: Mapping[str, Tensor]  # the sum, each tensor once
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> _Mean:
        """The mean of these bundles, which must have one architecture and one tokenizer."""
        if not paths:
            raise BundleError("there is nothing to average; name a run folder or checkpoints")
        _check_compatible(paths, [bundles.read_manifest(path) for path in paths])
        manifest = bundles.read_manifest(paths[0])
        weights = _without_tied(paths[0], manifest)
        total = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }
        mean = cls((paths[0],), manifest, total, {name: tensor.dtype for name, tensor in weights.items()})
        for path in paths[1:]:
            mean = mean.plus(path)
        return mean

    def plus(self, path: Path) -> _Mean:
        """The mean with one more bundle."""
        manifest = bundles.read_manifest(path)
        _check_compatible([self.paths[0], path], [self.manifest, manifest])
        weights = _without_tied(path, manifest)
        if _shapes(weights) != _shapes(self.total):
            raise BundleError(f"{path} and {self.paths[0]} differ in weights; average checkpoints of one run")
        total = {
            name: tensor + weights[name] if tensor.is_floating_point() else tensor
            for name, tensor in self.total.items()
        }
        return replace(self, paths=(*self.paths, path), total=total)

    def stored(self) -> dict[str, Tensor]:
        """The mean in the original precision, each tensor once."""
        return {
            name: (tensor / len(self.paths)).to(self.dtypes[name]) if tensor.is_floating_point() else tensor
            for name, tensor in self.total.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """The mean with all names, those of tied tensors included."""
        stored = self.stored()
        return stored | {name: stored[first] for name, first in self.manifest.tied.items()}


def _without_tied(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    weights = bundles.read_weights(path, manifest)
    return {name: tensor for name, tensor in weights.items() if name not in manifest.tied}


def _write(
    chosen: _Chosen, found: Sequence[Checkpoint], out: Path, *, best: Checkpoint | None = None
) -> None:
    """Write an average as a bundle; `found` are all checkpoints of the run, `best` the best one if scored."""
    newest = found[-1].folder.name if found else max(path.name for path in chosen.folders)
    kept = AverageRecord(newest, best.folder.name if best else "", chosen.best_scores)
    golden = [bundles.read_manifest(path).golden for path in chosen.folders]
    write_mean(chosen.mean, out, scores=chosen.scores, average=kept)
    record(out, next(filter(None, golden), ()))


def write_mean(mean: _Mean, out: Path, **fields: Any) -> Manifest:
    """Write a mean as a new bundle; `fields` are further ones of its manifest."""
    manifest = replace(
        mean.manifest,
        training={**mean.manifest.training, "averaged": [path.name for path in mean.paths]},
        **{"scores": (), **fields},  # the scores of the checkpoints do not hold for the average
        golden=(),
        created=time.time(),
        shipped=False,
    )
    bundles.save_bundle(out, manifest, mean.stored(), bundles.load_tokenizer(mean.paths[0], mean.manifest))
    return manifest


def average_bundles(paths: Sequence[Path], out: Path) -> Manifest:
    """Write the mean of several bundles' weights as a new bundle."""
    return write_mean(_Mean.of(paths), out)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in weights.items()}


def _check_compatible(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        if (manifest.architecture, manifest.network) != (first.architecture, first.network):
            raise BundleError(f"{path} and {paths[0]} differ in architecture; average checkpoints of one run")
        if manifest.precision != "fp32":
            raise BundleError(f"{path} is quantised; average the checkpoints it was made from, then quantise")
        if manifest.tokenizer != first.tokenizer:
            raise BundleError(f"{path} and {paths[0]} differ in tokenizer; average checkpoints of one run")
