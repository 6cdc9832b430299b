from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import texts
from tests.scripted import Script, Scripted, random_bundle, small_tokenizer
from trmt import streaming, translating
from trmt.bundles import bundles
from trmt.decoding.base import Hypothesis
from trmt.decoding.batch import BatchDecoder
from trmt.decoding.engine import Engine
from trmt.decoding.request import Request
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.nets.base import Seq2Seq
from trmt.nets.ragged import Ragged, Source
from trmt.streaming import StreamReport, translate_stream
from trmt.text.splitting import TextSegment, joiner_for
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

SENTENCES = ["Where can I buy a ticket?", "It rains.", "Der Fluss steigt", "你好", "a", "x y z 1 2 3"]
GREEDY = TranslateOptions(search="greedy")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "random"
    random_bundle(folder, tokenizer)
    return folder


def loaded(bundle: Path, **options: Any) -> Translator:
    return Translator.load(bundle, options=TranslateOptions(**options))


@pytest.mark.parametrize(("factor", "said"), [(1.0, 0), (1e5, 1)])
def test_a_network_whose_numbers_fp16_cannot_hold_is_translated_in_fp32(
    factor: float,
    said: int,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load_bundle = bundles.load_bundle

    def load(*given: Any, **named: Any) -> Any:
        loaded = load_bundle(*given, **named)
        with torch.no_grad():
            loaded.net.get_parameter("encoder.layers.0.feed_forward.outer.weight").mul_(factor)
        return loaded

    monkeypatch.setattr(bundles, "load_bundle", load)
    monkeypatch.setattr(translating, "_precision", lambda asked, *_: "fp16" if asked == "auto" else asked)
    expected = loaded(bundle, precision="fp32", max_length=5).translate(SENTENCES)
    translator = loaded(bundle, max_length=5)
    found = [translator.translate(SENTENCES) for _ in range(2)]
    assert capsys.readouterr().err.count("too large for fp16") == said
    if said:
        assert found == [expected, expected]
        assert translator.options.precision == "fp32"


def echo(
    tokenizer: Tokenizer,
    *,
    longest: int = 60,
    positions: int = 1024,
    script: Script = list,
    options: TranslateOptions = GREEDY,
) -> Translator:
    eos, vocabulary = tokenizer.target.eos, tokenizer.target.vocabulary
    net = Scripted(script, vocabulary=vocabulary, eos=eos, max_positions=positions)
    return Translator(net, tokenizer, longest=longest, options=options)


def streamed(translator: Translator, data: bytes, *, as_json: bool = False, prefixed: bool = False) -> bytes:
    out = io.BytesIO()
    translate_stream(translator, io.BytesIO(data), out, as_json=as_json, prefixed=prefixed)
    return out.getvalue()


def entries(translator: Translator, lines: Sequence[str]) -> list[dict[str, Any]]:
    data = "".join(f"{line}\n" for line in lines).encode()
    return [json.loads(line) for line in streamed(translator, data, as_json=True).split(b"\n")[:-1]]


# Scores


class RecordingEngine(Engine):
    """An engine that keeps all requests with their hypotheses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: list[tuple[Request, Hypothesis]] = []

    def translate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Hypothesis]]]:
        for request, hypotheses in self.engine.translate(requests):
            self.seen += [(request, hypothesis) for hypothesis in hypotheses]
            yield request, hypotheses


def teacher_forced(net: Seq2Seq, tokenizer: Tokenizer, request: Request, ids: Sequence[int]) -> float:
    """The sum of the logarithms of the probabilities of `ids` and of the end, by the network's forward."""
    side = tokenizer.target
    source, target = Source.of([request.source]), Ragged.of([[side.bos, *ids]])
    with torch.inference_mode():
        logits = net.readout(net.forward(source, target).hidden)
        logits[:, [side.pad, side.bos, side.unk]] = -torch.inf
        wanted = [*ids, side.eos]
        scores = logits.log_softmax(-1)[range(len(wanted)), wanted]
    chosen = slice(len(request.prefix), request.max_tokens)  # the others were forced, at no cost
    return float(scores[chosen].sum())


@pytest.mark.parametrize(
    "options",
    [
        {"search": "greedy"},
        {"beam": 4, "n_best": 3},
        {"beam": 3, "length_penalty": 0.0},
        {"beam": 2, "n_best": 2, "length_penalty": 1.3},
        {"search": "sampling", "n_best": 4, "top_k": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["", "Der Zug"])
def test_scores_are_those_of_teacher_forcing(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], prefix: str
) -> None:
    net = random_bundle(tmp_path / "bundle", tokenizer, eagerness=6)
    translator = loaded(tmp_path / "bundle", **options)
    recording = translator.engine = RecordingEngine(translator.engine)
    found = translator.translate(SENTENCES, prefixes=[prefix] * len(SENTENCES))
    ended = 0
    for request, hypothesis in recording.seen:
        score = teacher_forced(net, tokenizer, request, hypothesis.ids)
        assert hypothesis.score == pytest.approx(score, abs=1e-4, rel=1e-5)
        tokens = len(hypothesis.ids) + 1
        beam = options.get("search", "beam") == "beam"
        penalty = ((5 + tokens) / 6) ** options.get("length_penalty", 0.6) if beam else tokens
        assert hypothesis.normalised == pytest.approx(score / penalty, abs=1e-4, rel=1e-5)
        ended += len(hypothesis.ids) < request.max_tokens
    assert ended, "some translations have to end by themselves"
    by_score = {(hypothesis.score, hypothesis.normalised) for _, hypothesis in recording.seen}
    for translation in found:
        assert len(translation.candidates) == options.get("n_best", 1)
        assert translation.text == translation.candidates[0].text
        for candidate in translation.candidates:
            assert (candidate.score, candidate.normalised) in by_score
            assert candidate.text.startswith(prefix)


def test_json_agrees_with_plain_output(bundle: Path) -> None:
    translator = loaded(bundle, n_best=3)
    lines = [*SENTENCES[:3], "", SENTENCES[3]]
    found = entries(translator, lines)
    plain = streamed(translator, "".join(f"{line}\n" for line in lines).encode()).decode().split("\n")[:-1]
    assert [entry["line"] for entry in found] == [1, 2, 3, 4, 5]
    assert [entry["source"] for entry in found] == lines
    assert [entry["status"] for entry in found] == ["ok", "ok", "ok", "blank", "ok"]
    for entry, line in zip(found, plain, strict=True):
        best = entry.get("n_best", [])
        assert "\t".join(candidate["text"] for candidate in best) == line
        assert entry["translation"] == line.partition("\t")[0]
        assert [c["normalised"] for c in best] == sorted((c["normalised"] for c in best), reverse=True)
        if best:
            assert [entry["score"], entry["normalised"]] == [best[0]["score"], best[0]["normalised"]]
    assert set(found[3]) == {"line", "source", "translation", "score", "normalised", "status"}


def test_json_is_one_line_for_every_program(tokenizer: Tokenizer) -> None:
    data = "a\u2028b\x85c\td\x0be\x7ff\r\n".encode()
    line = streamed(echo(tokenizer), data, as_json=True)
    assert len(line.decode().splitlines()) == 1 and line.endswith(b"}\n")
    assert json.loads(line)["source"] == data.decode().removesuffix("\r\n")


def test_sampled_candidates_come_best_first(bundle: Path) -> None:
    for translation in loaded(bundle, search="sampling", n_best=6).translate(SENTENCES):
        scores = [candidate.normalised for candidate in translation.candidates]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1


# Sampling


def test_samples_depend_on_the_seed_and_the_line_only(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FIRST_WINDOW", 5)
    lines = [*SENTENCES * 6, "", SENTENCES[0]]
    data = "".join(f"{line}\n" for line in lines).encode()
    sampling = {"search": "sampling", "max_length": 12}
    found = [
        streamed(loaded(bundle, **sampling, seed=seed, batch=batch), data)
        for seed, batch in [(1, 64), (1, 1), (1, 5), (2, 64)]
    ]
    assert found[0] == found[1] == found[2] != found[3]
    first = found[0].split(b"\n")
    assert first[0] != first[6], "each line draws its own random numbers"
    translator = loaded(bundle, **sampling)
    halves = translator.translate(lines[:7]) + translator.translate(lines[7:], first_key=7)
    assert [half.text for half in halves] == found[0].decode().split("\n")[:-1]


def test_sampling_at_temperature_0_is_greedy(bundle: Path) -> None:
    cold = loaded(bundle, search="sampling", temperature=0).translate(SENTENCES)
    assert cold == loaded(bundle, search="greedy").translate(SENTENCES)


# Forced prefixes


def test_each_line_begins_with_its_prefix(bundle: Path) -> None:
    prefixes = ["Der Zug", "", "It's 7:45 – 🚂!", "你好，", "  spaces   between ", "<s> </s>"]
    data = "".join(f"{s}\t{p}\n" for s, p in zip(SENTENCES, prefixes, strict=True)).encode()
    for options in ({"search": "greedy"}, {}, {"search": "sampling"}, {"max_length": 2}):
        out = streamed(loaded(bundle, **options), data, prefixed=True).decode().split("\n")[:-1]
        assert len(out) == len(prefixes)
        for line, prefix in zip(out, prefixes, strict=True):
            assert line.startswith(" ".join(prefix.split()))


def test_lines_with_and_without_a_prefix_can_be_mixed(tokenizer: Tokenizer) -> None:
    data = b"one\n\ntwo\t\n\tonly a prefix\nthree\tdrei\n \t \n"
    out = streamed(echo(tokenizer, script=lambda ids: [*ids]), data, prefixed=True)
    assert out.count(b"\n") == 6
    assert out.split(b"\n")[:4] == [b"one", b"", b"two", b""]
    assert out.split(b"\n")[4].startswith(b"drei")


def test_a_prefix_that_is_too_long_does_not_disturb_other_lines(tokenizer: Tokenizer) -> None:
    data = b"one\tx\ntwo\t%s\nthree\ty\n" % (b"Wort " * 200)
    out = io.BytesIO()
    translator = echo(tokenizer, longest=20, positions=40)
    report = translate_stream(translator, io.BytesIO(data), out, prefixed=True)
    first, second, third = out.getvalue().decode().split("\n")[:-1]
    assert first.startswith("x") and third.startswith("y") and second.startswith("Wort Wort")
    assert report == StreamReport(lines=3, prefix_cut=[2])
    [entry] = entries_of_prefixed(translator, b"two\t%s\n" % (b"Wort " * 200))
    assert entry["prefix_cut"] is True


def entries_of_prefixed(translator: Translator, data: bytes) -> list[dict[str, Any]]:
    out = streamed(translator, data, as_json=True, prefixed=True)
    return [json.loads(line) for line in out.split(b"\n")[:-1]]


# Long lines


def test_a_long_line_is_translated_sentence_by_sentence(tokenizer: Tokenizer) -> None:
    sources: list[str] = []

    def script(ids: list[int]) -> list[int]:
        sources.append(tokenizer.source.decode(ids))
        return ids

    sentences = texts.ENGLISH[1:]  # the first one ends in a number, which could be an ordinal
    longest = max(map(len, tokenizer.source.encode(sentences)))
    [translation] = echo(tokenizer, longest=longest, script=script).translate([" ".join(sentences)])
    assert translation.status == "split"
    assert translation.text == " ".join(sentences)
    assert len(sources) > 10
    ends = tuple(sentence[-9:] for sentence in sentences)
    assert all(source.endswith(ends) for source in sources), "cut at ends of sentences only"


@pytest.mark.parametrize("language", list(texts.ALL))
@pytest.mark.parametrize("longest", [5, 30])
def test_nothing_of_a_long_line_is_lost(tokenizer: Tokenizer, language: str, longest: int) -> None:
    text = " ".join(texts.ALL[language])
    report = StreamReport()
    out = io.BytesIO()
    report = translate_stream(
        echo(tokenizer, longest=longest), io.BytesIO(b"a\n%s\na\n" % text.encode()), out
    )
    assert report.split == [2]
    assert "".join(out.getvalue().decode().split("\n")[1].split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("language", "answer"), [("zh", "".join(texts.CHINESE)), ("", "".join(texts.CHINESE)), ("de", None)]
)
def test_segments_are_joined_as_the_target_language_is_written(
    tokenizer: Tokenizer, language: str, answer: str | None
) -> None:
    translator = echo(tokenizer, longest=25)
    settings = translator.tokenizer.settings
    other = Tokenizer(type(settings)(**{**vars(settings), "languages": ("zh", language)}), tokenizer.models)
    translator = echo(other, longest=25)
    [translation] = translator.translate(["".join(texts.CHINESE)])
    if answer:
        assert translation.text == answer
    else:
        assert "。 " in translation.text and translation.text.replace(" ", "") == "".join(texts.CHINESE)


@pytest.mark.parametrize(
    ("segment", "language", "joiner"),
    [
        (TextSegment("One.", " ", " "), "de", " "),
        (TextSegment("One.", " ", " "), "zh", ""),
        (TextSegment("One.", " ", " "), "zh-Hant-TW", ""),
        (TextSegment("One.", " ", " "), "JA_jp", ""),
        (TextSegment("One.", " ", " "), "jpn", ""),
        (TextSegment("One.", " ", " "), "ko", " "),
        (TextSegment("One.", " ", " "), "th", " "),
        (TextSegment("一。", "", ""), "en", " "),
        (TextSegment("一", "", ""), "en", " "),
        (TextSegment("カ", "", ""), "en", " "),
        (TextSegment("หนึ่ง", "", ""), "en", " "),
        (TextSegment("一。", "", ""), "ja", ""),
        (TextSegment("一。", "", ""), "", ""),
        (TextSegment("abc", "", ""), "en", ""),  # the middle of a long word
        (TextSegment("एक।", "", " "), "en", " "),
        (TextSegment("", " ", " "), "en", " "),
    ],
)
def test_the_joiner_suits_the_target(segment: TextSegment, language: str, joiner: str) -> None:
    assert joiner_for(segment, language) == joiner


def test_scores_of_segments_add_up(bundle: Path) -> None:
    translator = loaded(bundle, beam=3, n_best=2)
    recording = translator.engine = RecordingEngine(translator.engine)
    [translation] = translator.translate([" ".join(texts.ENGLISH[:6])])
    best, second = recording.seen[::2], recording.seen[1::2]
    assert translation.status == "split" and len(best) > 1
    for candidate, parts in zip(translation.candidates, (best, second), strict=True):
        assert candidate.score == pytest.approx(sum(part.score for _, part in parts))
        mean = sum(part.normalised for _, part in parts) / len(parts)
        assert candidate.normalised == pytest.approx(mean)


@pytest.mark.parametrize("size", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["Where can I buy a ticket for tomorrow? ", "我在哪里买票？", "abc"])
def test_a_line_of_a_million_characters_is_answered(tokenizer: Tokenizer, unit: str, size: int) -> None:
    text = (unit * (size // len(unit))).strip()
    [before, translation, after] = echo(tokenizer).translate(["a", text, "b"])
    assert (before.text, after.text) == ("a", "b")
    assert translation.text.replace(" ", "") == text.replace(" ", "")


# Windows of lines


def test_a_line_does_not_wait_for_all_that_follow(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many long lines the first is written before the last is translated."""
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 10_000)
    cut: list[int] = []
    translator = echo(tokenizer, longest=100, script=lambda ids: cut.append(1) or ids[:1])  # type: ignore[func-returns-value]
    written: list[int] = []

    class Out(io.BytesIO):
        def flush(self) -> None:
            written.append(len(cut))

    translate_stream(translator, io.BytesIO(b"%s\n" % (b"a word. " * 500) * 20), Out())
    assert written[0] < len(cut) / 2


def test_windows_are_full_where_input_does_not_wait() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as stream:
        windows = streaming.LineReader(stream).windows(10, interactive=False)
        for number in range(25):
            os.write(writing, b"%d\n" % number)
        sizes = [len(next(windows)), len(next(windows))]
        os.close(writing)
        assert sizes == [10, 10] and [len(window) for window in windows] == [5]


def test_a_window_can_be_larger_than_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 4)
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 4 * 100)
    data = io.BytesIO(b"short\n" * 40 + b"%s\n" % (b"long " * 30) * 40)
    sizes = [len(window) for window in streaming.LineReader(data).windows(20, interactive=False)]
    assert sizes[:2] == [20, 20], "room for bytes grows with the window"
    assert sum(sizes) == 80 and max(sizes[2:]) < 20, "and long lines still end it"


# Impossible options, broken weights


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beam": 0}, "beam needs a size of at least 1"),
        ({"n_best": 5}, "--n-best 5 needs a beam"),
        ({"n_best": 0}, "at least one result"),
        ({"beam": 1, "n_best": 2}, "--n-best 2 needs a beam"),
        ({"search": "greedy", "n_best": 2}, "--n-best needs --beam or --sample"),
        ({"length_penalty": -1.0}, "length penalty"),
        ({"length_penalty": float("nan")}, "length penalty"),
        ({"search": "sampling", "top_p": 0.0}, "top-p"),
        ({"search": "sampling", "temperature": -1.0}, "temperature"),
        ({"search": "sampling", "top_k": -1}, "top-k"),
        ({"batch": -1}, "--batch"),
        ({"max_length": -1}, "--max-length"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_anything_is_loaded(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        TranslateOptions(**options)


def test_broken_weights_are_an_error(tokenizer: Tokenizer) -> None:
    translator = echo(tokenizer)
    translator.engine.decoder.stepper.readout = lambda hidden: hidden * torch.nan
    with pytest.raises(BundleError, match="not numbers"):
        translator.translate(["a"])


def test_where_memory_is_short_fewer_sentences_are_translated_at_a_time(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a b c", "", "d e", *(f"f {number}" for number in range(30))]
    translator = loaded(bundle, device="cpu", batch=16)
    expected = translator.translate(lines)
    start = BatchDecoder.start
    tried = []

    def scarce(decoder: BatchDecoder, requests: Sequence[Request], *arguments: Any, **options: Any) -> Any:
        tried.append(len(requests))
        if len(requests) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(decoder, requests, *arguments, **options)

    monkeypatch.setattr(BatchDecoder, "start", scarce)
    most = 3
    assert translator.translate(lines) == expected
    assert tried[:3] == [16, 4, 1] and capsys.readouterr().err.count("fewer sentences") == 2
    most = 0
    with pytest.raises(TrmtError, match="too short to translate a single sentence"):
        translator.translate(lines)
