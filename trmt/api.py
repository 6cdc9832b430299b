"""What joins for Python what the core keeps apart: training that validates, averages that are checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from trmt.averaging import AverageOptions
from trmt.config import refuse_string
from trmt.errors import ConfigError
from trmt.sets.shards import PreparedSet
from trmt.training.planning import TrainOptions
from trmt.training.validation import TranslateDevSet


def train(
    data: TrainOptions | PreparedSet | Path | str | None = None,
    translate: TranslateDevSet | None = None,
    *,
    run: Path | str | None = None,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    init_from: Path | str | None = None,
    device: str | None = None,
    dry_run: bool = False,
    trust_code: bool = False,
) -> Path:
    """Train or resume as `trmt train` does, and return the run folder.

    `data` is a prepared set or its folder, or all options at once. The other arguments are those of the
    command, and None stands for the same defaults. `translate` translates and scores the dev set, by default
    as the command does.
    """
    from trmt.training import run as training
    from trmt.validating import validate

    if isinstance(data, TrainOptions):
        if run or recipe or settings or init_from or device or dry_run or trust_code:
            raise ConfigError("TrainOptions hold all options; set them there and leave other arguments out")
        options = data
    else:
        refuse_string(settings, "settings")
        options = TrainOptions(
            run=_path(run, "run"),
            data=data.folder if isinstance(data, PreparedSet) else _path(data, "data"),
            recipe=None if recipe is None else str(recipe),
            settings=[*settings, *([f'training.device="{device}"'] if device else [])],
            init_from=_path(init_from, "init_from"),
            dry_run=dry_run,
            trust_code=trust_code,
        )
    return training.train(options, translate or (None if options.pretrain else validate))


def average(
    paths: AverageOptions | Path | str | Sequence[Path | str] = (),
    *,
    best: int | None = None,
    last: int | None = None,
    out: Path | str | None = None,
) -> Path:
    """Average checkpoints as `trmt average` does, and return the folder of the bundle.

    `paths` is a run folder or a list of checkpoints, by default the newest run; or it is all options.
    """
    from trmt import averaging

    if isinstance(paths, AverageOptions):
        if best is not None or last is not None or out:
            raise ConfigError("AverageOptions hold all options; set them there and leave other arguments out")
        return averaging.average(paths)
    chosen = (paths,) if isinstance(paths, Path | str) else paths
    return averaging.average(
        AverageOptions(paths=cast(Sequence[Path], chosen), best=best, last=last, out=_path(out, "out"))
    )


def _path(location: Path | str | None, name: str) -> Path | None:
    if not isinstance(location, Path | str | None):
        raise ConfigError(f"{name} is a path and not {location!r}")
    return None if location is None else Path(location)
