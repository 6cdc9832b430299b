"""`trmt translate`: standard input to standard output, line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn, cast

import typer

from trmt.cli.options import Model

if TYPE_CHECKING:
    from trmt.streaming import StreamReport


def command(
    model: Model = None,
    beam: Annotated[
        int | None, typer.Option("--beam", help="Size of the beam; 1 is greedy search. [default: 4]")
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option("--length-penalty", help="Exponent of the length penalty of Wu et al. [default: 0.6]"),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw translations instead of searching.")] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="For --sample. [default: 1]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="For --sample: only the k most probable. [default: all]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="For --sample: only the nucleus. [default: 1]")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="For --sample. [default: 1]")] = None,
    n_best: Annotated[
        int, typer.Option("--n-best", help="So many translations of a line, with tabs between them.")
    ] = 1,
    prefixed: Annotated[
        bool,
        typer.Option("--prefixed", help="Lines are a source, a tab, and what the translation begins with."),
    ] = False,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Tokens of a translation. [default: those of the source + 50]")
    ] = 0,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", help="Sentences translated together. [default: 64, on a GPU 512]", show_default=False
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines with scores.")] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu, cuda, cuda:1, mps or auto; several, as cuda:0,cuda:1; all: every GPU."
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="fp32, bf16 or fp16 (GPU), int8 (CPU), or auto: as the bundle is; on a GPU bf16.",
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all]")
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            help="Processes of one core or GPU each, for many lines; auto: as many as there are. "
            "[default: 1; all that a Ray cluster has room for]",
        ),
    ] = None,
    source_files: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="PLACE", help="A file, or all files in a folder, instead of standard input."
        ),
    ] = None,
    out_folder: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where the parts go; the same command goes on with the missing.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Have a Ray cluster do it: host:port, auto, or local for one here.",
        ),
    ] = None,
    part_size: Annotated[
        float | None, typer.Option("--part-size", help="MiB of text in each part. [default: 1; 4 on GPUs]")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Let the bundle name code outside trmt.")
    ] = False,
) -> None:
    """Translate standard input to standard output: one line out for one line in."""
    searching = {"beam": beam, "length_penalty": length_penalty}
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    asked = _asked(searching, drawing, sample=sample)
    in_parts = _in_parts(source_files, out_folder, ray, part_size)

    from contextlib import ExitStack
    from dataclasses import replace

    import torch

    from trmt import console
    from trmt.errors import ConfigError
    from trmt.scale.devices import devices_for
    from trmt.scale.parallel_translator import ParallelTranslator
    from trmt.streaming import translate_stream, window_size
    from trmt.translating import TranslateOptions, Translator, find_model

    if in_parts and threads:
        raise ConfigError("files are translated by workers of one thread each; leave out --threads")
    options = TranslateOptions(
        search="sampling" if sample else "greedy" if beam == 1 and n_best == 1 else "beam",
        n_best=n_best,
        max_length=max_length,
        batch=batch,
        device=device,
        precision=cast(Any, precision),  # checked there
        **asked,
    )
    if in_parts:
        from trmt.cli import corpus

        files = corpus.TextFiles(*in_parts, as_json=as_json, prefixed=prefixed, trust_code=trust_code)
        corpus.translate(model, options, files, ray=ray, workers=workers)
        return
    devices = devices_for(device, workers)
    if threads and len(devices) > 1:
        raise ConfigError("processes that translate together have one thread each; leave out --threads")
    if threads:
        torch.set_num_threads(threads)
    source, out = streams()
    with ExitStack() as ends:
        translator: Translator | ParallelTranslator
        if len(devices) == 1:
            options = replace(options, device=devices[0])
            translator = Translator.load(model, options=options, trust_code=trust_code)
        else:
            folder = find_model(model)
            translator = ends.enter_context(
                ParallelTranslator(folder, devices=devices, options=options, trust_code=trust_code)
            )
        if source.isatty():
            console.say("type a line to have it translated, Ctrl-D to end")
        try:
            report = translate_stream(
                translator,
                source,
                out,
                as_json=as_json,
                prefixed=prefixed,
                window=window_size(devices, batch),
            )
        except OSError as error:
            leave(error)
    _warn(report)


def _in_parts(
    source: str | None, out: str | None, ray: str | None, size: float | None
) -> tuple[str, str, float | None] | None:
    """Input and output, if they are files; what asks for half of that is an error."""
    from trmt.errors import ConfigError

    if source and out:
        return source, out, size
    for name, value in {"--input": source, "--output": out, "--ray": ray, "--part-size": size}.items():
        if value:
            raise ConfigError(f"{name} is for files translated in parts; give both --input and --output")
    return None


def _asked(searching: dict[str, Any], drawing: dict[str, Any], *, sample: bool) -> dict[str, Any]:
    """The options that were given; those of the other way to translate must not be among them."""
    from trmt.errors import ConfigError

    for name, value in (searching if sample else drawing).items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} and --sample exclude each other; leave one out"
                if sample
                else f"{flag} is only for drawing; add --sample or leave it out"
            )
    return {name: value for name, value in {**searching, **drawing}.items() if value is not None}


def streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output as streams of bytes."""
    import sys

    from trmt.errors import DataError

    if None in (sys.stdin, sys.stdout):
        raise DataError("standard input or output is closed; connect it to a file, a pipe or a terminal")
    # Without its buffer, so that a thread which still waits for input cannot keep Python from exiting.
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer), sys.stdout.buffer


def leave(error: OSError, what: str = "translations") -> NoReturn:
    """End after a failed write: quietly if the reader has gone."""
    import os
    import sys

    from trmt.errors import DataError

    # What the buffer still holds cannot be written either, and Python would try again when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        raise typer.Exit(141) from error
    raise DataError(
        f"cannot write the {what}: {error.strerror}; free some space or choose another place"
    ) from error


def _warn(report: StreamReport) -> None:
    from trmt import console

    for numbers, one, several in (
        (
            report.split,
            "is longer than anything in training and was translated in pieces",
            "are longer than anything in training and were translated in pieces",
        ),
        (
            report.undecodable,
            "is not valid UTF-8; what could not be read was replaced",
            "are not valid UTF-8; what could not be read was replaced",
        ),
        (
            report.prefix_cut,
            "has a prefix longer than any translation; its end was left out",
            "have prefixes longer than any translation; their ends were left out",
        ),
    ):
        if len(numbers) == 1:
            console.warn(f"line {numbers[0]} {one}")
        elif numbers:
            shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            console.warn(f"{len(numbers):,} lines {several}: {shown}")
