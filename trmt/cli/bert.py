"""`trmt bert`: pretrained encoders from and to the folders of Hugging Face's BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Pretrained encoders from and to Hugging Face's BertForPreTraining.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("import")
def bring(
    folder: Annotated[Path, typer.Argument(help="With config.json, vocab.txt and model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="The bundle to write.")],
    tokenizer: Annotated[
        Path,
        typer.Option(help="What the encoder is to read with; shared pieces keep their rows."),
    ] = Path("data/tokenizer"),
) -> None:
    """Make a bundle of a BERT, for trmt train --init-from OUT:encoder."""
    from trmt.interop.bert_folder import import_bert
    from trmt.text.tokenizer import Tokenizer

    import_bert(folder, out, Tokenizer.load(tokenizer))


@app.command("export")
def take(
    model: Annotated[Path, typer.Argument(help="A bundle or run folder of trmt pretrain.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write a pretrained encoder as a folder that BertForPreTraining.from_pretrained loads."""
    from trmt.bundles.checkpoints import find_bundle
    from trmt.interop.bert_folder import export_bert

    export_bert(find_bundle(model), out)
