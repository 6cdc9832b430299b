from __future__ import annotations

import itertools
import pickle
import random
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from typer.testing import CliRunner

from tests import texts
from trmt.errors import BundleError, ConfigError, DataError
from trmt.text.tokenizer import BOS, EOS, NORMALISATIONS, PAD, UNK, Tokenizer, normaliser
from trmt.text.tokenizer_training import (
    MAX_LINE,
    TokenizerOptions,
    fitting_size,
    measure_side,
    train_tokenizer,
)

TAG, PLACEHOLDER = "<2de>", "{name}"
MARK = "\u2581"  # sentencepiece's sign for white space, the one character that is lost
SPECIAL = {PAD, UNK, BOS, EOS}
# Characters that are easily changed by normalisation, splitting or decoding.
AWKWARD = (
    "\0\t\r\x0b\x1c\x7f\x85\xa0²…，½™Åﬁ\u0301\u200b\u200c\u200d\u2028\u202b\u2585\u3000\ufeff\ufffd\uffff"
    "😀👩🏽🚀<>{}/s"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix such as `corpus.en` for every language."""
    folder = tmp_path_factory.mktemp("corpus")
    for language, sentences in texts.ALL.items():
        (folder / f"corpus.{language}").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder / "corpus"


@pytest.fixture(scope="module")
def options(corpus: Path) -> TokenizerOptions:
    return TokenizerOptions(
        corpora=(str(corpus),), languages=("en", "de"), size=600, tags=(TAG,), placeholders=(PLACEHOLDER,)
    )


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(options: TokenizerOptions, request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(replace(options, kind=request.param))[0]


def fuzzed(count: int, *, seed: int = 0) -> Iterator[str]:
    """Texts from all of Unicode but surrogates, with many awkward characters."""
    chooser = random.Random(seed)
    draws: list[Callable[[], str]] = [
        lambda: chr(chooser.randrange(0x20, 0x7F)),
        lambda: chooser.choice(AWKWARD),
        lambda: chr(chooser.choice([chooser.randrange(0xD800), chooser.randrange(0xE000, 0x110000)])),
        lambda: chooser.choice([" ", "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", TAG, PLACEHOLDER]),
    ]
    for _ in range(count):
        yield "".join(chooser.choice(draws)() for _ in range(chooser.randrange(30)))


@pytest.mark.parametrize("language", ["de", "zh", "ar", "fa", "hi"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_script_is_decoded_as_it_was(options: TokenizerOptions, language: str, kind: str) -> None:
    wanted = replace(options, languages=("en", language), kind=kind, size=1200, joint=False)
    tokenizer, report = train_tokenizer(wanted)
    for side, sentences in ((tokenizer.source, texts.ENGLISH), (tokenizer.target, texts.ALL[language])):
        encoded = side.encode(sentences)
        assert [side.decode(ids) for ids in encoded] == sentences
        assert not SPECIAL & set(itertools.chain(*encoded))
        drawn = side.sample(encoded, alpha=0.1, seed=1)
        assert [side.decode(ids) for ids in drawn] == sentences
        assert drawn != encoded
    assert (report.source.language, report.target.language) == ("en", language)
    for side_report in (report.source, report.target):
        assert side_report.sentences == 30
        assert side_report.lost == ()
        assert side_report.unknown == 0
        assert side_report.bytes < side_report.tokens < 1.1 * side_report.characters


@pytest.mark.parametrize("rule", NORMALISATIONS)
def test_decoding_gives_the_normalised_text(tokenizer: Tokenizer, rule: str) -> None:
    settings = replace(tokenizer.settings, normalise_source=rule)  # type: ignore[arg-type]
    side = Tokenizer(settings, tokenizer.models).source
    originals = ["a  b   c", "a\0b", "x <s> y", *fuzzed(300)]
    for text, ids in zip(originals, side.encode(originals), strict=True):
        assert side.decode(ids) == side.normalise(text)


def test_the_white_space_mark_is_decoded_as_a_space(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    assert side.decode(side.encode([f"a{MARK}b"])[0]) == "a b"
    report = measure_side(side, [f"a{MARK}b", "ok", MARK])
    assert [(lost.character, lost.count) for lost in report.lost] == [(MARK, 2)]
    assert "U+2581" in str(report.lost[0])


def test_text_cannot_spell_special_symbols(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    forbidden = SPECIAL | {side.tag_id(TAG)}
    hostile = ["<s>", "</s>", "<unk>", "<pad>", TAG, f"x{TAG}y", f"{MARK}{TAG}", *fuzzed(500, seed=1)]
    for ids in side.encode(hostile):
        assert not forbidden & set(ids)
        assert all(0 <= token < side.vocabulary for token in ids)


def test_placeholders_are_not_split(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    for text in (f"Dear {PLACEHOLDER},", PLACEHOLDER, f"a{PLACEHOLDER}b"):
        (ids,) = side.encode([text])
        assert side.pieces(ids).count(PLACEHOLDER) == 1
        assert side.decode(ids) == text


def test_a_batch_is_encoded_like_single_sentences(tokenizer: Tokenizer) -> None:
    sentences = [*texts.ENGLISH, "", " ", *fuzzed(50, seed=2)]
    assert tokenizer.source.encode(sentences) == [tokenizer.source.encode([text])[0] for text in sentences]


def test_encoding_is_that_of_sentencepiece(tokenizer: Tokenizer) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.models[0])
    for text in texts.ENGLISH + texts.GERMAN:
        assert tokenizer.source.encode([text]) == [plain.encode(text)]


def test_decoding_takes_any_ids(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    (ids,) = side.encode(["Good morning"])
    assert side.decode([BOS, -1, *ids, UNK, PAD, 10**9, side.tag_id(TAG), EOS, EOS]) == "Good morning"
    pieces = [f"<0x{byte:02X}>" for byte in (0xE2, 0x82, 0x0A, 0x00, 0xFF)]
    numbers = [sentencepiece.SentencePieceProcessor(model_proto=side.model).piece_to_id(p) for p in pieces]
    broken = side.decode(numbers)
    assert "\ufffd" in broken
    assert "\n\0" in broken
    chooser = random.Random(3)
    for _ in range(300):
        text = side.decode([chooser.randrange(-5, side.vocabulary + 5) for _ in range(chooser.randrange(20))])
        assert text.encode().decode() == text
    assert side.pieces([-1, 10**9, UNK]) == ["<unk>"] * 3


@pytest.mark.parametrize("rule", NORMALISATIONS)
def test_normalising_yields_one_line_and_is_idempotent(rule: str) -> None:
    normalise = normaliser(rule)
    for text in fuzzed(300, seed=4):
        once = normalise(text + "\n" + text)
        assert "\n" not in once
        assert once == once.strip()
        if rule in ("nfc", "none"):
            assert normalise(once) == once


def test_the_default_changes_form_and_white_space_only() -> None:
    normalise = normaliser("nfc")
    assert normalise("  10² m\u00a0… 你好，\t世界\r ™ ½ ﬁ\u3000") == "10² m … 你好， 世界 ™ ½ ﬁ"
    assert normalise("می\u200cخواهم") == "می\u200cخواهم"
    assert normalise("a\u0308\0b") == "ä\0b"
    assert normalise("x\ud800y\udcff") == "x\ufffdy\ufffd"
    for text in fuzzed(300, seed=5):
        assert unicodedata.normalize("NFC", "".join(text.split())) == "".join(normalise(text).split())


def test_the_compatibility_rules_change_more() -> None:
    assert normaliser("nfkc")("10² … ， A") == "102 ... , A"
    assert normaliser("nmt_nfkc")("10² … ， می\u200cخواهم A") == "102 ... , می خواهم A"
    assert normaliser("nmt_nfkc_cf")("10² ÄB") == "102 äb"
    assert normaliser("none")(" 10²  …， ") == "10²  …，"
    with pytest.raises(ConfigError, match="nmt_nfkc"):
        normaliser("nmt-nfkc")


def test_characters_lost_by_a_normalisation_are_reported(options: TokenizerOptions) -> None:
    _, report = train_tokenizer(replace(options, normalise_target="nmt_nfkc", joint=False))
    assert {lost.character for lost in report.target.lost} >= {"²", "…"}
    assert not report.source.lost


def test_without_byte_fallback_rare_characters_are_unknown(options: TokenizerOptions) -> None:
    tokenizer, _ = train_tokenizer(replace(options, byte_fallback=False))
    (ids,) = tokenizer.source.encode(["to 😀 go there"])
    assert ids.count(UNK) == 1
    report = measure_side(tokenizer.source, ["to 😀 go"])
    assert report.unknown == 1
    assert [lost.character for lost in report.lost] == ["😀"]
    head, tail = (tokenizer.source.decode(part) for part in (ids[: ids.index(UNK)], ids[ids.index(UNK) :]))
    for seed in range(20):
        (drawn,) = tokenizer.source.sample([ids], alpha=0.5, seed=seed)
        place = drawn.index(UNK)
        assert [tokenizer.source.decode(part) for part in (drawn[:place], drawn[place:])] == [head, tail]


def test_sampling_keeps_the_text_and_depends_on_its_arguments_alone(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    sentences = [*texts.ENGLISH, *texts.GERMAN, "", *map(side.normalise, fuzzed(50, seed=6))]
    encoded = side.encode([text.replace(MARK, "") for text in sentences])
    first = side.sample(encoded, alpha=0.2, seed=7)
    assert [side.decode(ids) for ids in first] == [side.decode(ids) for ids in encoded]
    assert first != encoded
    assert not SPECIAL & set(itertools.chain(*first))
    assert side.sample(encoded, alpha=0.2, seed=8) != first
    assert pickle.loads(pickle.dumps(side)).sample(encoded, alpha=0.2, seed=7) == first
    assert side.sample(encoded, alpha=0.2, seed=7) == first


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize(("kind", "alpha"), [("bpe", 0.0), ("unigram", 1000.0)])
def test_sampling_without_randomness_is_sentencepiece(
    options: TokenizerOptions, kind: str, alpha: float, byte_fallback: bool
) -> None:
    """Without dropped merges, or with the most probable pieces alone, it is what the model does."""
    wanted = replace(options, kind=kind, byte_fallback=byte_fallback, size=900)
    side = train_tokenizer(wanted)[0].source
    sentences = [
        *itertools.chain(*texts.ALL.values()),
        *fuzzed(300, seed=8),
        f"a{PLACEHOLDER}b {PLACEHOLDER}",
    ]
    encoded = side.encode(sentences)
    assert side.sample(encoded, alpha=alpha, seed=1) == encoded


def test_sampling_in_several_threads_gives_the_same(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    encoded = side.encode(texts.ENGLISH)
    expected = {seed: side.sample(encoded, alpha=0.3, seed=seed) for seed in range(8)}
    found: dict[int, list[list[int]]] = {}

    def run(seed: int) -> None:
        found[seed] = side.sample(encoded, alpha=0.3, seed=seed)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected


def test_sampling_keeps_tags_and_placeholders(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    tag = side.tag_id(TAG)
    (ids,) = side.encode([f"Where can {PLACEHOLDER} buy a ticket?"])
    for seed in range(20):
        (drawn,) = side.sample([[tag, *ids]], alpha=0.5, seed=seed)
        assert drawn[0] == tag
        assert side.pieces(drawn).count(PLACEHOLDER) == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sampling_makes_neither_bytes_nor_placeholders(
    options: TokenizerOptions, tmp_path: Path, kind: str
) -> None:
    """The text has all characters of their names, from which sampling could make them."""
    corpus = tmp_path / "names.tsv"
    names = " ".join("<0x123456789ABCDEF>{name}")
    lines = (
        f"{source} {names}\t{target}\n" for source, target in zip(texts.ENGLISH, texts.GERMAN, strict=True)
    )
    corpus.write_text("".join(lines), encoding="utf-8")
    side = train_tokenizer(replace(options, corpora=(str(corpus),), kind=kind))[0].source
    text = f"A 😀 {PLACEHOLDER}"
    (ids,) = side.encode([text])
    for seed in range(20):
        (drawn,) = side.sample([ids], alpha=0.5, seed=seed)
        assert side.decode(drawn) == text
        assert side.pieces(drawn).count(PLACEHOLDER) == 1


def test_joint_sides_share_a_model_and_separate_ones_do_not(options: TokenizerOptions) -> None:
    joint, _ = train_tokenizer(options)
    separate, _ = train_tokenizer(replace(options, joint=False))
    assert joint.joint
    assert not separate.joint
    assert joint.source is joint.target
    assert separate.source.model != separate.target.model
    assert joint.fingerprint != separate.fingerprint
    cased, _ = train_tokenizer(replace(options, normalise_source="nmt_nfkc_cf"))
    assert cased.source.model == cased.target.model
    assert (cased.source.normalise("Ä"), cased.target.normalise("Ä")) == ("ä", "Ä")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(options: TokenizerOptions, kind: str) -> None:
    wanted = replace(options, kind=kind)  # type: ignore[arg-type]
    (one, _), (other, _) = train_tokenizer(wanted), train_tokenizer(wanted)
    assert one.models == other.models
    assert one.fingerprint == other.fingerprint


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")  # a tokenizer may replace another
    for copy in (Tokenizer.load(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert (copy.languages, copy.tags, copy.placeholders) == (("en", "de"), (TAG,), (PLACEHOLDER,))
        assert copy.target.encode(texts.GERMAN) == tokenizer.target.encode(texts.GERMAN)
    side = pickle.loads(pickle.dumps(tokenizer.source))
    assert side.encode(texts.GERMAN) == tokenizer.source.encode(texts.GERMAN)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_the_fingerprint_covers_settings(tokenizer: Tokenizer) -> None:
    other = replace(tokenizer.settings, normalise_target="none")
    assert Tokenizer(other, tokenizer.models).fingerprint != tokenizer.fingerprint


def test_a_damaged_tokenizer_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "whole")

    def damaged(name: str, change: Callable[[Path], object]) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        change(folder / name)
        return folder

    def altered(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    changes: list[tuple[str, Callable[[Path], object], str]] = [
        ("joint.model", Path.unlink, "joint.model"),
        ("joint.model", altered, "fingerprint"),
        ("joint.model", lambda path: path.write_bytes(b""), "fingerprint"),
        ("tokenizer.json", Path.unlink, "trmt tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("{"), "JSON"),
        ("tokenizer.json", lambda path: path.write_text("[]"), "format"),
        ("tokenizer.json", lambda path: path.write_text('{"format": 1, "nonsense": 1}'), "nonsense"),
        ("tokenizer.json", lambda path: path.write_text(path.read_text().replace("nfc", "nfkc")), "finger"),
    ]
    for name, change, word in changes:
        with pytest.raises(BundleError, match=word):
            Tokenizer.load(damaged(name, change))
    with pytest.raises(BundleError, match="trmt tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_tokenizer_does_not_replace_another_folder(options: TokenizerOptions, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    for path in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(BundleError, match="another path"):
            train_tokenizer(options, out=path)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_a_size_too_large_for_the_text_makes_a_smaller_vocabulary(
    options: TokenizerOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, _ = train_tokenizer(replace(options, size=100_000))
    assert 600 < tokenizer.source.vocabulary < 100_000
    assert f"{tokenizer.source.vocabulary:,} pieces" in capsys.readouterr().err


def test_long_lines_and_reserved_characters_are_trained_on(options: TokenizerOptions, tmp_path: Path) -> None:
    filler = "qzx " * (3 * MAX_LINE)
    (tmp_path / "long.tsv").write_text(f"{filler}\tjvk\u2585jvk\n" * 3, encoding="utf-8")
    tokenizer, _ = train_tokenizer(replace(options, corpora=(str(tmp_path / "long.tsv"), *options.corpora)))
    assert tokenizer.source.pieces(tokenizer.source.encode(["qzx"])[0]) == ["▁qzx"]
    assert tokenizer.source.pieces(tokenizer.source.encode(["jvk"])[0]) == ["▁jvk"]
    endless = tmp_path / "endless.tsv"
    endless.write_text("ab" * 70_000 + "\tx\n")
    train_tokenizer(replace(options, corpora=(str(endless),), size=300))


def test_sampling_the_corpus_is_seeded_and_bounded(
    options: TokenizerOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(options, sample=20, size=400)
    first, report = train_tokenizer(small)
    assert "read 30 pairs, training on 10" in capsys.readouterr().err
    assert report.source.sentences == report.target.sentences == 10
    assert train_tokenizer(small)[0].fingerprint == first.fingerprint
    assert train_tokenizer(replace(small, seed=2))[0].fingerprint != first.fingerprint


def test_mistakes_are_errors_with_an_option_to_change(options: TokenizerOptions, tmp_path: Path) -> None:
    for change, word in (
        ({"size": 270}, "--size"),
        ({"kind": "word"}, "--kind"),
        ({"coverage": 2.0}, "--coverage"),
        ({"sample": 1}, "--sample"),
        ({"corpora": ()}, "--train"),
        ({"normalise_source": "nfd"}, "nmt_nfkc_cf"),
        ({"tags": ("<s>",)}, "<s>"),
        ({"tags": ("<0x0A>",)}, "<0x0A>"),
        ({"tags": ("a b",)}, "white space"),
        ({"placeholders": ("",)}, "empty"),
        ({"placeholders": (TAG,)}, "twice"),
        ({"placeholders": ("{NAME}",), "normalise_target": "nmt_nfkc_cf"}, "{name}"),
    ):
        with pytest.raises(ConfigError, match=word.replace("{", r"\{")):
            train_tokenizer(replace(options, **change))  # type: ignore[arg-type]
    (tmp_path / "empty.tsv").write_text(" \t\n\n")
    with pytest.raises(DataError, match=r"empty\.tsv"):
        train_tokenizer(replace(options, corpora=(str(tmp_path / "empty.tsv"),)))
    with pytest.raises(ConfigError, match="--tag"):
        train_tokenizer(options)[0].source.tag_id("<2fr>")


def test_the_command(corpus: Path, tmp_path: Path) -> None:
    from trmt.cli import app

    languages = ["--from", "en", "--to", "fa"]
    arguments = ["tokenizer", str(tmp_path / "out"), "--train", str(corpus), *languages, "--size", "700"]
    result = CliRunner().invoke(app, [*arguments, "--separate", "--tag", TAG, "--kind", "unigram"])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "tokens/word" in result.stderr
    made = Tokenizer.load(tmp_path / "out")
    assert (made.joint, made.tags, made.languages) == (False, (TAG,), ("en", "fa"))
    assert CliRunner().invoke(app, ["tokenizer", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("pairs", "characters", "size"),
    [
        (300, 90, 1_000),
        (300, 400, 1_856),  # four pieces for each character, and bytes
        (3_000, 90, 2_000),
        (3_000, 5_000, 8_000),
        (10_000, 90, 8_000),
        (5_000_000, 5_000, 8_000),
    ],
)
def test_vocabularies_fit_the_number_of_pairs(pairs: int, characters: int, size: int) -> None:
    assert fitting_size(pairs, characters) == size


def test_a_size_that_is_not_given_fits_the_text_and_a_given_one_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{first}{second}{third}o" for first in "kstnhm" for second in "aiueo" for third in "kstnhm"]
    count = len(words)
    lines = [f"{words[n % count]} {words[7 * n % count]}\t{words[3 * n % count]}" for n in range(500)]
    (tmp_path / "text.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    corpora = (str(tmp_path / "text.tsv"),)
    train_tokenizer(TokenizerOptions(corpora=corpora))
    assert "training 1,000 bpe pieces (fits 500 pairs; --size changes it)" in capsys.readouterr().err
    tokenizer, _ = train_tokenizer(TokenizerOptions(corpora=corpora, size=300))
    assert tokenizer.source.vocabulary == 300
    assert "fits" not in capsys.readouterr().err
