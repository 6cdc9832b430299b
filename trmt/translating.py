"""Translation of text: one line out for one line in, in order, whatever the bytes or the network.

A line that is longer than anything the network was trained on is cut at sentence ends and translated in
pieces. Blank lines stay blank. What the network emits cannot break a line in two.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trmt import bundles, checkpoints, console
from trmt.arch.base import Seq2Seq
from trmt.decode.base import Hypothesis, Search
from trmt.engines.base import Batching, Engine, Request
from trmt.engines.device import choose_device
from trmt.errors import ConfigError
from trmt.registry import ENGINES, RANKERS, SEARCHES, resolve
from trmt.splitting import split_text
from trmt.tokenizer import Tokenizer

EXTRA = 50  # tokens a translation may be longer than its source (Attention Is All You Need, 6.1)
# Whatever some program takes for the end of a line, and the other control characters.
BREAKS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]+")
FIRST_WINDOW, WINDOW = 128, 4096  # lines translated together: few at first, so that the first are soon out
PENDING = 64 << 20  # bytes read ahead of the translation, at most (a single line may be longer)


@dataclass(frozen=True, kw_only=True)
class TranslateOptions:
    """How to search and how to batch; the defaults are those of "Attention Is All You Need"."""

    search: Literal["beam", "greedy", "sampling"] = "beam"
    beam: int = 4
    length_penalty: float = 0.6
    n_best: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    max_length: int = 0  # tokens of a translation; 0: the source's length and 50 more
    batch: int = 64  # sentences translated together
    engine: str = "eager"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_length < 0:
            raise ConfigError("--batch is at least 1 and --max-length at least 0")
        if self.n_best > 1 and self.search == "greedy":
            raise ConfigError("--n-best needs --beam or --sample; greedy search has one translation")

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
    normalised: float  # what the search ranks by; for a line in pieces, their mean


@dataclass(frozen=True)
class Translation:
    """What became of a line."""

    text: str
    status: Literal["ok", "blank", "split"]  # split: longer than in training, translated in pieces
    candidates: tuple[Candidate, ...] = ()


@dataclass
class _Line:
    """A line on its way: the requests it became, and the answers that are there."""

    joiners: list[str] = field(default_factory=list)
    answers: list[list[Hypothesis] | None] = field(default_factory=list)


class Translator:
    """A network, a tokenizer and a search, ready to translate."""

    def __init__(
        self,
        net: Seq2Seq,
        tokenizer: Tokenizer,
        *,
        longest: int,
        options: TranslateOptions = TranslateOptions(),
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        source, target = tokenizer.source, tokenizer.target
        # The network has so many positions; one is for the end-of-sentence token.
        self.positions = int(getattr(net.config, "longest", 1 << 30))
        self.longest = max(min(longest, self.positions - 1), 1)
        self.eos = source.eos
        self.ranker = resolve(RANKERS, "best")()
        self.engine: Engine = resolve(ENGINES, options.engine)(
            net,
            options.build_search(),
            bos=target.bos,
            eos=target.eos,
            banned={target.pad, target.bos, target.unk},
            batching=Batching(sentences=options.batch),
        )

    @classmethod
    def load(
        cls,
        place: Path | None = None,
        *,
        options: TranslateOptions = TranslateOptions(),
        trust_code: bool = False,
    ) -> Translator:
        """The translator in a bundle or run folder; without a name, the default one."""
        folder = checkpoints.find_bundle(place) if place else checkpoints.default_bundle()
        if not place:
            console.say(f"model: {folder}")
        bundle = bundles.load_bundle(folder, device=choose_device(options.device), trust_code=trust_code)
        longest = bundle.manifest.longest["source"]
        return cls(bundle.net, bundle.tokenizer, longest=longest, options=options)

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
        lines: list[_Line] = []
        requests: list[Request] = []
        owners: list[tuple[int, int]] = []
        for number, text in enumerate(texts):
            line = _Line()
            prefix = prefixes[number] if prefixes else ""
            for piece, (ids, joiner) in enumerate(self._pieces(text)):
                key = (first_key + number) << 16 | piece
                owners.append((number, piece))
                requests.append(self._request(ids, prefix if piece == 0 else "", key=key))
                line.joiners.append(joiner)
                line.answers.append(None)
            lines.append(line)
            if not line.answers:
                yield number, Translation("", "blank")
        for index, hypotheses in self.engine.translate(requests):
            number, piece = owners[index]
            lines[number].answers[piece] = hypotheses
            if all(answer is not None for answer in lines[number].answers):
                yield number, self._joined(lines[number])

    def _pieces(self, text: str) -> Iterator[tuple[list[int], str]]:
        """The ids of each piece of a line, and what goes between its translation and the next one's."""
        text = self.tokenizer.source.normalise(text)
        [ids] = self.tokenizer.source.encode([text])
        if len(ids) <= self.longest:
            if ids:
                yield ids, ""
            return
        pieces = split_text(text, lambda part: len(self._encoded(part)) <= self.longest)
        for piece in pieces:
            ids = self._encoded(piece.text)
            # A single character can have more bytes than a very small network has positions.
            for begin in range(0, len(ids), self.longest):
                last = begin + self.longest >= len(ids)
                yield ids[begin : begin + self.longest], piece.joiner if last else ""

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.source.encode([text])[0]

    def _request(self, ids: list[int], prefix: str, *, key: int) -> Request:
        forced = tuple(self.tokenizer.target.encode([prefix])[0]) if prefix.strip() else ()
        limit = self.options.max_length or len(ids) + EXTRA
        limit = max(min(limit, self.positions - 1), 1)
        if len(forced) >= limit:
            raise ConfigError(
                f"the prefix {prefix[:40]!r} has {len(forced)} pieces and the translation may have {limit}; "
                "shorten it or raise --max-length"
            )
        return Request(source=(*ids, self.eos), limit=limit, prefix=forced, key=key)

    def _joined(self, line: _Line) -> Translation:
        answers = [answer for answer in line.answers if answer]
        candidates = []
        for rank in range(min(len(answer) for answer in answers)):
            parts = [answer[rank] for answer in answers]
            texts = [self._text(part.ids) for part in parts]
            candidates.append(
                Candidate(
                    _join(texts, line.joiners),
                    sum(part.score for part in parts),
                    sum(part.normalised for part in parts) / len(parts),
                )
            )
        best = self.ranker.pick(answers[0]) if len(answers) == 1 else None
        place = answers[0].index(best) if best else 0
        status: Literal["ok", "split"] = "ok" if len(answers) == 1 else "split"
        return Translation(candidates[place].text, status, tuple(candidates))

    def _text(self, ids: Sequence[int]) -> str:
        return BREAKS.sub(" ", self.tokenizer.target.decode(ids)).strip()


def _join(texts: Sequence[str], joiners: Sequence[str]) -> str:
    out = ""
    for text, joiner in zip(texts, joiners, strict=True):
        out += text + (joiner if text else "")
    return out.strip()


# Streams


@dataclass
class Report:
    """What happened to a stream; the numbers of lines count from 1."""

    lines: int = 0
    split: list[int] = field(default_factory=list)
    undecodable: list[int] = field(default_factory=list)


def translate_stream(
    translator: Translator,
    source: BinaryIO,
    out: BinaryIO,
    *,
    as_json: bool = False,
    prefixed: bool = False,
) -> Report:
    """Translate lines of bytes as they come; every line is answered by one line, in order.

    A reader that waits for the answer to a line gets it: what is there is translated at once, and only
    while that runs do further lines gather. With `prefixed` each line is a source, a tab, and what its
    translation must begin with.
    """
    report = Report()
    with console.progress("translating", unit="lines") as bar:
        for window in Reader(source).windows():
            texts, prefixes = zip(*(_decoded(raw, prefixed=prefixed) for raw in window), strict=True)
            for number, (raw, text) in enumerate(zip(window, texts, strict=True), report.lines + 1):
                if "\ufffd" in text and not _is_utf8(raw):
                    report.undecodable.append(number)
            done = _in_order(translator.ready(texts, prefixes=prefixes, first_key=report.lines))
            for text, raw, translation in zip(texts, window, done, strict=True):
                report.lines += 1
                if translation.status == "split":
                    report.split.append(report.lines)
                shown = _as_json(report.lines, text, translation) if as_json else _plain(translation)
                out.write(shown.encode() + (b"\r\n" if raw.endswith(b"\r") and not as_json else b"\n"))
            out.flush()
            bar.advance(len(window))
    return report


def _decoded(raw: bytes, *, prefixed: bool) -> tuple[str, str]:
    text = raw.removesuffix(b"\r").decode("utf-8", errors="replace")
    source, _, prefix = text.partition("\t") if prefixed else (text, "", "")
    return source, prefix


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _plain(translation: Translation) -> str:
    """One line whatever is asked for: n-best translations stand behind one another, with tabs between."""
    if len(translation.candidates) > 1:
        return "\t".join(candidate.text.replace("\t", " ") for candidate in translation.candidates)
    return translation.text


def _as_json(number: int, source: str, translation: Translation) -> str:
    best = translation.candidates[0] if translation.candidates else Candidate("", 0.0, 0.0)
    entry: dict[str, Any] = {
        "line": number,
        "source": source,
        "translation": translation.text,
        "score": best.score,
        "normalised": best.normalised,
        "status": translation.status,
    }
    if len(translation.candidates) > 1:
        entry["n_best"] = [asdict(candidate) for candidate in translation.candidates]
    return json.dumps(entry, ensure_ascii=False)


def _in_order(ready: Iterable[tuple[int, Translation]]) -> Iterator[Translation]:
    waiting: dict[int, Translation] = {}
    following = 0
    for number, translation in ready:
        waiting[number] = translation
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    assert not waiting, "a line got no translation"


class Reader:
    """Lines of a binary stream, read by a thread: whoever asks gets all that are there."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.lines: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        threading.Thread(target=self._read, name="trmt-reader", daemon=True).start()

    def windows(self) -> Iterator[list[bytes]]:
        """Lists of lines, without their newlines: at least one, at most a window full."""
        size = FIRST_WINDOW
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.lines or self.ended)
                if not self.lines:
                    if self.error:
                        raise self.error
                    return
                window = [self.lines.popleft() for _ in range(min(size, len(self.lines)))]
                self.size -= sum(map(len, window))
                self.changed.notify_all()
            yield window
            size = min(2 * size, WINDOW)

    def _read(self) -> None:
        parts: list[bytes] = []  # of the line that has not ended yet
        try:
            while chunk := self._chunk():
                first, *more = chunk.split(b"\n")
                parts.append(first)
                if more:
                    self._add([b"".join(parts), *more[:-1]])
                    parts = [more[-1]]
            last = b"".join(parts)
            if last:
                self._add([last])
        except BaseException as error:  # handed over to whoever reads the lines
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _chunk(self) -> bytes:
        """What is there, without waiting for more than something."""
        read = getattr(self.stream, "read1", self.stream.read)
        return bytes(read(1 << 16))

    def _add(self, lines: list[bytes]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.size < PENDING)
            self.lines.extend(lines)
            self.size += sum(map(len, lines))
            self.changed.notify_all()
