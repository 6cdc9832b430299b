"""`trmt export`, `trmt import` and `trmt bert`: models of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import Model, OutputFolder, OutputName, required_output
from trmt.cli.framework import Command

bert = typer.Typer(
    help="Convert encoders from and to BertForPreTraining.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def export_command(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="ctranslate2, huggingface or onnx.",
            autocompletion=completion.formats,
        ),
    ],
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder to write. [default: beside the model, named after the format]",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(help="Load the exported model with the other program and compare the outputs."),
    ] = True,
) -> None:
    """Export a model to CTranslate2, Hugging Face or ONNX."""
    from trmt.interop.exporting import ExportOptions, export

    export(ExportOptions(model=model, to=to, out=out, check=check))


def import_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Hugging Face folder with a Marian model, such as those of OPUS-MT.",
            autocompletion=completion.folders,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Bundle to write, or its name in models/. [default: in models/, with the name of FOLDER]",
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option("--from", metavar="LANGUAGE", help="Source language. [default: from the model's files]"),
    ] = "",
    target: Annotated[
        str,
        typer.Option("--to", metavar="LANGUAGE", help="Target language. [default: from the model's files]"),
    ] = "",
    check: Annotated[
        bool, typer.Option(help="Compare the outputs with those of transformers, if it is installed.")
    ] = True,
) -> None:
    """Import a Marian model as a bundle. It can be translated with and fine-tuned."""
    from trmt.bundles.checkpoints import named_folder
    from trmt.interop.importing import ImportOptions, import_model

    written = named_folder(out) if out else None
    import_model(ImportOptions(folder=folder, out=written, languages=(source, target), check=check))


@bert.command("import", cls=Command)
def bert_import(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder with config.json, vocab.txt and model.safetensors.",
            autocompletion=completion.folders,
        ),
    ],
    to: OutputName = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            autocompletion=completion.folders,
            help="Tokenizer of the new encoder; pieces that BERT also has keep their embeddings. "
            "[default: the one in data/]",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Bundle to write, or its name in models/. [required]"
        ),
    ] = None,
) -> None:
    """Import a BERT as a bundle. For trmt train --init-from BUNDLE:encoder."""
    from trmt.bundles.checkpoints import named_folder
    from trmt.interop.bert_folder import import_bert
    from trmt.text.tokenizer import Tokenizer
    from trmt.text.tokenizer_folders import find_tokenizer

    out = named_folder(required_output(to, output))
    import_bert(folder, out, Tokenizer.load(tokenizer or find_tokenizer(None)))


@bert.command("export", cls=Command)
def bert_export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Bundle or run folder of trmt pretrain.",
            autocompletion=completion.models,
        ),
    ],
    to: OutputFolder = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write. [required]"),
    ] = None,
) -> None:
    """Export a pretrained encoder. The folder is for BertForPreTraining.from_pretrained."""
    from trmt.bundles.checkpoints import find_bundle
    from trmt.interop.bert_folder import export_bert

    export_bert(find_bundle(model), required_output(to, output))
