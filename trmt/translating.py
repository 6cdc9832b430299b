"""Translation of text: a network, a tokenizer and a search behind one call.

A line that is longer than anything the network was trained on is split at sentence ends and translated in
segments. Blank lines stay blank. Whatever the network outputs, one line of input becomes one line of output,
and no line can stop the translation of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from trmt import console
from trmt.bundles import bundles, quantised
from trmt.bundles.bundles import Bundle
from trmt.config import MAX_LENGTH, Options, check_strings, check_type
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.engine import Engine, Runs
from trmt.decoding.request import Batching, Request
from trmt.devices.abilities import abilities
from trmt.devices.choice import choose_device
from trmt.devices.memory import is_device_error, is_out_of_memory
from trmt.errors import BundleError, ConfigError, TrmtError, first_line
from trmt.nets.base import Seq2Seq, to_half
from trmt.registry import RANKERS, SEARCHES, resolve
from trmt.text.splitting import joiner_for, split_text
from trmt.text.tokenizer import Tokenizer
from trmt.training.models import find_model

EXTRA = 50  # tokens a translation may be longer than its source (Attention Is All You Need, 6.1)
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
CHECKED = 8  # sentences that show whether a network's numbers are within the range of fp16
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Whatever some program takes for the end of a line or of a field, and the other control characters.
BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, kw_only=True)
class TranslateOptions(Options):
    """How to search and how to batch; the defaults are those of "Attention Is All You Need"."""

    search: Literal["beam", "greedy", "sampling"] = "beam"
    beam: int = 4
    length_penalty: float = 0.6
    n_best: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    max_length: int = 0  # tokens of a translation, a longer prefix aside; 0: 50 more than the source has
    batch: int = 0  # sentences translated together; 0: 64, on a GPU 512
    runs: Runs = "auto"  # decoding steps: auto takes CUDA graphs on a GPU, "direct" and "graphs" choose
    device: str = "auto"
    precision: Precision = "auto"  # auto: that of the bundle, on a GPU bf16, or fp16 without it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in get_args(Precision):
            raise ConfigError(
                f"there is no precision {self.precision!r} to translate in; choose one of "
                f"{', '.join(get_args(Precision))}"
            )
        if not (0 <= self.batch <= MAX_LENGTH and 0 <= self.max_length <= MAX_LENGTH):
            raise ConfigError(f"--batch and --max-length are from 0 to {MAX_LENGTH:,}")
        if self.n_best > 1 and self.search == "greedy":
            raise ConfigError("--n-best needs --beam or --sample; greedy search has one translation")
        self.build_search()  # which refuses what it cannot do, before a network is loaded

    def build_search(self) -> Search:
        """The search these options describe."""
        kind = resolve(SEARCHES, self.search)
        if self.search == "beam":
            return kind(size=self.beam, length_penalty=self.length_penalty, n_best=self.n_best)
        if self.search == "greedy":
            return kind()
        return kind(
            samples=self.n_best,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Candidate:
    """One translation of a line."""

    text: str
    score: float  # natural logarithm of its probability
    normalised: float  # what the search ranks by; for a line in segments, their mean


@dataclass(frozen=True)
class Translation:
    """The translation of a line."""

    text: str
    status: Literal["ok", "blank", "split"]  # split: longer than in training, translated in segments
    candidates: tuple[Candidate, ...] = ()  # the best first
    prefix_cut: bool = False  # whether its prefix was longer than any translation can be


@dataclass
class _Line:
    """A line while it is translated: its segments, and their hypotheses that are there."""

    prefix_cut: bool
    joiners: list[str] = field(default_factory=list)  # what follows the translation of each segment
    hypotheses: list[list[Hypothesis]] = field(default_factory=list)
    missing: int = 0  # segments that are not translated yet


class Translator:
    """A network, a tokenizer and a search, ready to translate."""

    def __init__(
        self,
        net: Seq2Seq,
        tokenizer: Tokenizer,
        *,
        longest: int,
        options: TranslateOptions = TranslateOptions(),
        checksum: str = "",
    ) -> None:
        """`longest`: the most source tokens of a segment; `checksum`: that of the weights' file."""
        self.tokenizer, self.options = tokenizer, options
        device = next(net.parameters()).device
        source, target = tokenizer.source, tokenizer.target
        # One position is for the end-of-sentence token.
        self.max_positions = net.max_positions
        self.longest = max(min(longest, self.max_positions - 1), 1)
        self.eos = source.eos
        self.ranker = resolve(RANKERS, "best")()
        self._in_fp32: Callable[[], Translator] | None = None  # for fp16 until its range is known to do
        padding = range(target.vocabulary, len(net.output.weight))
        self.engine = Engine(
            net,
            options.build_search(),
            bos=target.bos,
            eos=target.eos,
            banned=target.banned_ids | set(padding),
            batching=Batching.on(device.type, options.batch),
            precision="int8" if options.precision == "int8" else "fp32",
            checksum=checksum,
            runs=options.runs,
        )

    @classmethod
    def load(
        cls,
        folder: Path | str | None = None,
        *,
        options: TranslateOptions = TranslateOptions(),
        trust_code: bool = False,
    ) -> Translator:
        """The translator in a bundle or run folder; without a name, the default one."""
        check_type(options, TranslateOptions, "options")
        path = find_model(folder)
        device = choose_device(options.device)
        bundle = bundles.load_bundle(path, device=device, trust_code=trust_code)
        options = replace(options, precision=_precision(options.precision, bundle, device))
        if options.precision in HALVES:
            to_half(bundle.net, HALVES[options.precision])
        longest = bundle.manifest.longest.get("source")
        if not longest:
            raise BundleError(f"the manifest of {path} does not say longest.source; copy the bundle again")
        checksum = str(bundle.manifest.weights.get("sha256", ""))
        made = cls(bundle.net, bundle.tokenizer, longest=longest, options=options, checksum=checksum)
        if options.precision == "fp16":
            in_fp32 = replace(options, precision="fp32")
            made._in_fp32 = lambda: cls.load(path, options=in_fp32, trust_code=trust_code)
        return made

    def translate(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, first_key: int = 0
    ) -> list[Translation]:
        """The translations of some lines, in order.

        `prefixes` are what each translation must begin with. `first_key` numbers the lines for sampling.
        """
        return [done for _, done in sorted(self.ready(texts, prefixes=prefixes, first_key=first_key))]

    def ready(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, first_key: int = 0
    ) -> Iterator[tuple[int, Translation]]:
        """(number of the line, its translation) as they become ready."""
        check_strings(texts, "texts")
        if prefixes is not None:
            check_strings(prefixes, "prefixes")
            if len(prefixes) != len(texts):
                raise ConfigError(
                    f"there are {len(prefixes):,} prefixes for {len(texts):,} texts; give one each"
                )
        lines: list[_Line] = []
        requests: list[Request] = []
        sources = self.tokenizer.source.encode(texts)
        forced = self.tokenizer.target.encode([""] * len(texts) if prefixes is None else prefixes)
        for number, (text, ids, prefix) in enumerate(zip(texts, sources, forced, strict=True)):
            line = _Line(prefix_cut=len(prefix) >= self.max_positions)
            for segment, (segment_ids, joiner) in enumerate(self._segments(text, ids)):
                # The key names line and segment.
                key = (first_key + number) << 32 | segment
                requests.append(self._request(segment_ids, prefix if segment == 0 else [], key=key))
                line.joiners.append(joiner)
                line.hypotheses.append([])
                line.missing += 1
            lines.append(line)
            if not line.missing:
                yield number, Translation("", "blank")
        for request, hypotheses in self._searched(requests):
            number, segment = (request.key >> 32) - first_key, request.key & 0xFFFFFFFF
            line = lines[number]
            line.hypotheses[segment] = self._ranked(hypotheses)
            line.missing -= 1
            if not line.missing:
                yield number, self._joined(line)

    def _searched(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[Hypothesis]]]:
        """The hypotheses of all requests; should memory be short, with fewer sentences at a time."""
        left = {request.key: request for request in requests}
        while left:
            try:
                self._check_range(requests)
                for request, hypotheses in self.engine.translate([*left.values()]):
                    del left[request.key]
                    yield request, hypotheses
            except (MemoryError, RuntimeError) as error:
                if is_device_error(error):
                    raise TrmtError(
                        f"the GPU failed ({first_line(error)}); try again, or with --device cpu, "
                        "and see what trmt env says of it"
                    ) from error
                if not is_out_of_memory(error):
                    raise
                if not self.engine.shrink():
                    raise TrmtError(
                        "memory is too short to translate a single sentence; free some of it, or choose "
                        "another --device"
                    ) from error
                console.warn("memory is short: translating goes on with fewer sentences at a time")

    def _check_range(self, requests: Sequence[Request]) -> None:
        """Go on in fp32 if numbers of the encoder are beyond what fp16 can hold; the first batch shows it."""
        if not self._in_fp32:
            return
        longest = sorted(requests, key=lambda request: -len(request.source))[:CHECKED]
        if not self.engine.encodes_finitely(longest):
            console.say("numbers of this network are too large for fp16: it translates in fp32, slower")
            self.options = replace(self.options, precision="fp32")
            self.engine = self._in_fp32().engine
        self._in_fp32 = None

    def translate_ids(self, sources: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The ids of translations; sources are ids too, none empty, none longer than the network allows."""
        requests = [self._request(list(ids), [], key=number) for number, ids in enumerate(sources)]
        self._check_range(requests)
        found = {request.key: hypotheses for request, hypotheses in self.engine.translate(requests)}
        return [self.ranker.pick(found[number]).ids for number in range(len(sources))]

    def _segments(self, text: str, ids: list[int]) -> Iterator[tuple[list[int], str]]:
        """The ids of each segment of a line, and what goes between its translation and the next one's."""
        if len(ids) <= self.longest:
            if ids:
                yield ids, ""
            return
        tag, text = self.tokenizer.source.split_tag(self.tokenizer.source.normalise(text))
        for segment in split_text(text, lambda part: len(self._encoded(tag + part)) <= self.longest):
            ids = self._encoded(tag + segment.text)
            # A single character can have more bytes than a very small network has positions.
            for begin in range(0, len(ids), self.longest):
                last = begin + self.longest >= len(ids)
                joiner = joiner_for(segment, self.tokenizer.languages[1]) if last else ""
                yield ids[begin : begin + self.longest], joiner

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.source.encode([text])[0]

    def _request(self, ids: list[int], prefix: list[int], *, key: int) -> Request:
        prefix = prefix[: self.max_positions - 1]
        max_tokens = max(self.options.max_length or len(ids) + EXTRA, len(prefix))
        max_tokens = max(min(max_tokens, self.max_positions - 1), 1)
        return Request((*ids, self.eos), max_tokens, prefix=tuple(prefix[:max_tokens]), key=key)

    def _joined(self, line: _Line) -> Translation:
        # The first candidate has the best hypothesis of every segment, the second all the second ones.
        candidates = tuple(
            Candidate(
                _join([self._text(each.ids) for each in segments], line.joiners),
                sum(each.score for each in segments),
                sum(each.normalised for each in segments) / len(segments),
            )
            for segments in zip(*line.hypotheses, strict=False)
        )
        status: Literal["ok", "split"] = "ok" if len(line.hypotheses) == 1 else "split"
        return Translation(candidates[0].text, status, candidates, line.prefix_cut)

    def _ranked(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """The ranker's choice, then the others by their scores."""
        best = self.ranker.pick(hypotheses)
        others = [hypothesis for hypothesis in hypotheses if hypothesis is not best]
        return [best, *sorted(others, key=lambda hypothesis: -hypothesis.normalised)]

    def _text(self, ids: Sequence[int]) -> str:
        return BREAKS.sub(" ", self.tokenizer.target.decode(ids)).strip()


def _precision(asked: Precision, bundle: Bundle, device: torch.device) -> Precision:
    """The precision to compute in; for int8, the weights of the network are rounded to what int8 can hold."""
    if asked == "int8" and device.type != "cpu":
        raise ConfigError(
            f"int8 is for the CPU, not for {device.type}; add --device cpu or leave --precision out"
        )
    if asked in HALVES and device.type == "cpu":
        raise ConfigError(f"{asked} is for GPUs, not for the CPU; choose fp32 or int8 there")
    if asked == "int8" and bundle.manifest.precision == "fp32":
        quantised.round_weights(bundle.net)
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "int8" if bundle.manifest.precision == "int8" else "fp32"
    if device.type != "cuda":
        return "fp32"
    return "bf16" if abilities(device).use("bf16") else "fp16"


def _join(texts: Sequence[str], joiners: Sequence[str]) -> str:
    out = ""
    for text, joiner in zip(texts, joiners, strict=True):
        out += text + (joiner if text else "")
    return out.strip()
