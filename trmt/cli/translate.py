"""`trmt translate`: translate standard input line by line, or files in parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from trmt.cli import completion, paths
from trmt.cli.common import (
    Model,
    Threads,
    TrustCode,
    set_threads,
    warn_about_encoding,
    warn_about_lines,
)
from trmt.errors import ConfigError
from trmt.registry import require

if TYPE_CHECKING:
    from trmt.scale.parallel_translator import ParallelTranslator
    from trmt.streaming import StreamReport
    from trmt.translating import TranslateOptions, Translator


def command(
    model: Model = None,
    beam: Annotated[
        int | None, typer.Option("--beam", help="Beam size; 1 is greedy search. [default: 4]")
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option("--length-penalty", help="Alpha of the length penalty of Wu et al. [default: 0.6]"),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample translations instead of searching.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="For --sample. [default: 1]")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="For --sample: only the k most probable tokens. [default: all]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="For --sample: only the nucleus of this probability. [default: 1]"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="For --sample. [default: 1]")] = None,
    n_best: Annotated[
        int, typer.Option("--n-best", help="Number of translations of each line, separated by tabs.")
    ] = 1,
    prefixed: Annotated[
        bool,
        typer.Option("--prefixed", help="Lines are a source, a tab, and a prefix of the translation."),
    ] = False,
    max_length: Annotated[
        int,
        typer.Option(
            "--max-length",
            help="Tokens of a translation. [default: length of the source + 50]",
            show_default=False,
        ),
    ] = 0,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", help="Sentences translated together. [default: 64, on a GPU 512]", show_default=False
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines with scores.")] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, cuda, cuda:1, mps or auto; a list such as cuda:0,cuda:1; or all GPUs: all.",
            autocompletion=completion.devices_and_all,
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="PRECISION",
            autocompletion=completion.among("auto", "fp32", "bf16", "fp16", "int8"),
            help="fp32, bf16 or fp16 (GPU), int8 (CPU), or auto: that of the bundle, on a GPU bf16.",
        ),
    ] = "auto",
    threads: Threads = 0,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Processes with a core or GPU each; auto: one for each core or GPU. "
            "[default: 1; on Ray one for each core or GPU]",
        ),
    ] = None,
    input_path: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            metavar="PATH",
            help="File to translate, or a folder whose files are translated in parts. "
            "[default: standard input]",
        ),
    ] = None,
    output_path: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File to write, which appears when it is complete; for parts a folder, and the same command "
            "continues with missing parts. [default: standard output]",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Translate files on a Ray cluster: host:port, auto, or local for a new one here.",
        ),
    ] = None,
    part_size: Annotated[
        float | None,
        typer.Option("--part-size", help="MiB of source text in a part. [default: 1; on GPUs 4]"),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Translate standard input or files. Each input line gives one output line.

    Input may be compressed with gzip, bzip2, xz or zstandard. An input file is translated in parts if
    --output is an existing folder or ends in a slash, and with --part-size or --ray.
    """
    search = _search_options(
        {"beam": beam, "length_penalty": length_penalty},
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
        sample=sample,
    )
    in_parts = paths.in_parts(input_path, output_path, ray=ray, part_size=part_size)

    from trmt.translating import TranslateOptions

    if in_parts and threads:
        raise ConfigError("files are translated by workers with one thread each; leave out --threads")
    options = TranslateOptions(
        search="sampling" if sample else "greedy" if beam == 1 and n_best == 1 else "beam",
        n_best=n_best,
        max_length=max_length,
        batch=batch,
        device=device,
        precision=cast(Any, precision),  # TranslateOptions checks it
        **search,
    )
    if in_parts:
        from trmt.cli import corpus

        files = corpus.TextFiles(
            *in_parts, part_size, as_json=as_json, prefixed=prefixed, trust_code=trust_code
        )
        corpus.translate(model, options, files, ray=ray, workers=workers)
    else:
        with paths.open_input(input_path) as source:
            translator, window = _make_translator(model, options, workers, threads, trust_code)
            with paths.open_output(output_path, input_path) as out:
                _translate_stream(translator, source, out, window, as_json=as_json, prefixed=prefixed)


def _search_options(beam: dict[str, Any], sampling: dict[str, Any], *, sample: bool) -> dict[str, Any]:
    """The options that were given; an option of the method that is not used is an error."""
    for name, value in (beam if sample else sampling).items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} and --sample exclude each other; leave one out"
                if sample
                else f"{option} is only for sampling; add --sample or leave it out"
            )
    return {name: value for name, value in {**beam, **sampling}.items() if value is not None}


def _make_translator(
    model: Path | None, options: TranslateOptions, workers: str | None, threads: int, trust_code: bool
) -> tuple[Translator | ParallelTranslator, int]:
    """A translator with one process or with several, and how many lines it should get at a time."""
    from dataclasses import replace

    from trmt.devices.choice import choose_device
    from trmt.streaming import window_size
    from trmt.training.models import find_model
    from trmt.translating import Translator

    devices: tuple[str, ...]
    if workers is not None or options.device == "all" or "," in options.device:
        require("trmt.scale", "--workers" if workers is not None else f"--device {options.device}")
        from trmt.scale.devices import devices_for

        devices = devices_for(options.device, workers)
    else:
        devices = (str(choose_device(options.device)),)
    window = window_size(devices, options.batch)
    if len(devices) > 1:
        from trmt.scale.parallel_translator import ParallelTranslator

        if threads:
            raise ConfigError("several processes have one thread each; leave out --threads")
        folder = find_model(model)
        return ParallelTranslator(folder, devices=devices, options=options, trust_code=trust_code), window
    set_threads(threads)
    options = replace(options, device=devices[0])
    return Translator.load(model, options=options, trust_code=trust_code), window


def _translate_stream(
    translator: Translator | ParallelTranslator,
    source: BinaryIO,
    out: BinaryIO,
    window: int,
    *,
    as_json: bool,
    prefixed: bool,
) -> None:
    """Translate a stream; translators with several processes end with it."""
    from contextlib import nullcontext

    from trmt import console
    from trmt.streaming import translate_stream
    from trmt.translating import Translator

    with nullcontext(translator) if isinstance(translator, Translator) else translator as ready:
        if source.isatty():
            console.say("type a line to have it translated, Ctrl-D to end")
        report = translate_stream(ready, source, out, as_json=as_json, prefixed=prefixed, window=window)
    _warn(report)


def _warn(report: StreamReport) -> None:
    warn_about_lines(
        report.split,
        "is longer than anything in training and was translated in pieces",
        "are longer than anything in training and were translated in pieces",
    )
    warn_about_encoding(report.undecodable)
    warn_about_lines(
        report.prefix_cut,
        "has a prefix longer than any translation, which was truncated",
        "have prefixes longer than any translation, which were truncated",
    )
