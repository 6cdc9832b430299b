"""What several commands take, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None,
    typer.Argument(help="Bundle or run folder. [default: $TRMT_MODEL, else the newest in models/]"),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Let the bundle name code outside trmt.")]
