"""`trmt translate`: standard input to standard output, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        Path | None,
        typer.Argument(help="Bundle or run folder. [default: $TRMT_MODEL, else the newest in models/]"),
    ] = None,
    beam: Annotated[int, typer.Option("--beam", help="Size of the beam; 1 is greedy search.")] = 4,
    length_penalty: Annotated[
        float, typer.Option("--length-penalty", help="Exponent of the length penalty of Wu et al.")
    ] = 0.6,
    sample: Annotated[bool, typer.Option("--sample", help="Draw translations instead of searching.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="For --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="For --sample: only the k most probable.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="For --sample: only the nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="For --sample.")] = 1,
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
    batch: Annotated[int, typer.Option("--batch", help="Sentences translated together.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines with scores.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", help="CPU threads. [default: all]")] = 0,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Let the bundle name code outside trmt.")
    ] = False,
) -> None:
    """Translate standard input to standard output: one line out for one line in."""
    import sys

    import torch

    from trmt import console
    from trmt.translating import TranslateOptions, Translator, translate_stream

    if threads:
        torch.set_num_threads(threads)
    options = TranslateOptions(
        search="sampling" if sample else "greedy" if beam == 1 and n_best == 1 else "beam",
        beam=beam,
        length_penalty=length_penalty,
        n_best=n_best,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_length=max_length,
        batch=batch,
        device=device,
    )
    translator = Translator.load(model, options=options, trust_code=trust_code)
    if sys.stdin.isatty():
        console.say("type a line to have it translated, Ctrl-D to end")
    report = translate_stream(
        translator, sys.stdin.buffer, sys.stdout.buffer, as_json=as_json, prefixed=prefixed
    )
    for what, numbers in (
        ("were longer than anything in training and were translated in pieces", report.split),
        ("were not valid UTF-8; what could not be read was replaced", report.undecodable),
    ):
        if numbers:
            first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            console.warn(f"{len(numbers)} lines {what} (line {first})")
