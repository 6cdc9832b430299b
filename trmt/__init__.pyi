from collections.abc import Sequence
from pathlib import Path

from trmt import averaging as _averaging
from trmt.api import average as average
from trmt.api import train as train
from trmt.errors import TrmtError as TrmtError
from trmt.scoring import ScoreOptions as ScoreOptions
from trmt.scoring import score as score
from trmt.sets import preparing as _preparing
from trmt.sets.preparing import prepare as prepare
from trmt.text.filters import LengthLimits
from trmt.text.tokenizer import Tokenizer as Tokenizer
from trmt.text.tokenizer_training import TokenizerOptions as TokenizerOptions
from trmt.text.tokenizer_training import train_tokenizer as train_tokenizer
from trmt.training import planning as _planning
from trmt.translating import TranslateOptions as TranslateOptions
from trmt.translating import Translator as Translator

__version__: str

# Options that take strings where their fields are paths.

class PrepareOptions(_preparing.PrepareOptions):
    def __init__(
        self,
        train: Sequence[Path | str],
        dev: Path | str | None = ...,
        out: Path | str | None = ...,
        dev_size: int | None = ...,
        tokenizer: Path | str | None = ...,
        languages: tuple[str | None, str | None] = ...,
        columns: tuple[str | None, str | None] = ...,
        limits: LengthLimits = ...,
        keep_duplicates: bool = ...,
        alignments: Sequence[Path | str] = ...,
        workers: int | None = ...,
        force: bool = ...,
    ) -> None: ...

class TrainOptions(_planning.TrainOptions):
    def __init__(
        self,
        *,
        run: Path | str | None = ...,
        data: Path | str | None = ...,
        recipe: Path | str | None = ...,
        settings: Sequence[str] = ...,
        init_from: Path | str | None = ...,
        dry_run: bool = ...,
        trust_code: bool = ...,
        pretrain: bool = ...,
    ) -> None: ...

class AverageOptions(_averaging.AverageOptions):
    def __init__(
        self,
        *,
        paths: Sequence[Path | str] = ...,
        best: int | None = ...,
        last: int | None = ...,
        out: Path | str | None = ...,
        data: Path | str | None = ...,
        device: str = ...,
        trust_code: bool = ...,
    ) -> None: ...
