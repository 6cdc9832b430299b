"""Files that would take far more memory than they are: refused with the limit, before they do."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from tests import marians
from tests.commands import Command
from trmt import trees
from trmt.config import read_toml
from trmt.errors import BundleError, ConfigError, DataError, TrmtError
from trmt.interop.bert_folder import read_bert
from trmt.interop.from_marian import read_marian
from trmt.interop.huggingface_folder import PICKLED, SHARDS, read_weights
from trmt.storage import urls
from trmt.text import limits, pairs, parquet
from trmt.text.corpus import parse_corpus
from trmt.text.lines import read_lines
from trmt.text.pairs import corpus_fingerprint, read_corpus
from trmt.translating import TranslateOptions
from trmt.trees import TreeError

# JSON and TOML


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "more than 32 deep, which is the limit"),
        ("9" * 4400, "too many digits"),
        (str(10**30), "more than 64 bits"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("\ud800", "not valid JSON"),
    ],
)
def test_json_has_limits(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(TreeError, match=reason):
        trees.read_json(tmp_path / "x.json")


def test_a_json_file_of_more_bytes_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"[" + b" " * 100 + b"]")
    assert trees.read_json(tmp_path / "x.json", max_bytes=102) == []
    with pytest.raises(TreeError, match="more than 101 bytes, which is the limit"):
        trees.read_json(tmp_path / "x.json", max_bytes=101)


def test_a_small_file_does_not_take_the_memory_of_the_largest(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"[1]")
    tracemalloc.start()
    try:
        assert trees.read_json(tmp_path / "x.json") == [1]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


TOML = [f"x = {'9' * 4400}", f"x = 0x{'f' * 4400}", f"x = {'[' * 50_000}", f"{'x.' * 99}y = 1"]


@pytest.mark.parametrize("text", TOML)
def test_toml_has_limits(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="; correct it") as caught:
        read_toml(tmp_path / "x.toml")
    assert len(str(caught.value)) < 500


# Messages


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert str(DataError("there is no file a\x1b[31m\nb\u2028c é 日\xa0d")) == (
        "there is no file a\\x1b[31m\\nb\\u2028c é 日\xa0d"
    )
    path = "/".join(["folder"] * 100)
    assert str(DataError(f"there is no file {path}; check")) == f"there is no file {path}; check"
    assert len(str(DataError(f"there is no device {'9' * 4400}; choose"))) < 300


# Text


def test_a_line_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE", 1000)
    path = tmp_path / "x.txt"
    path.write_bytes(b"short\n" + b"x" * 999 + b"\n")
    assert [len(line) for line in read_lines(path)] == [5, 999]
    path.write_bytes(b"short\n" + b"x" * 1000 + b"\n")
    with pytest.raises(DataError, match=r"x\.txt, line 2: more than .* which is the limit of a line"):
        list(read_lines(path))


def test_a_compressed_file_may_not_expand_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ALWAYS", 100_000)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"a b\n" * 20_000))
    assert sum(1 for _ in read_lines(path)) == 20_000
    path.write_bytes(gzip.compress(b"a b\n" * 500_000))
    with pytest.raises(DataError, match=r"x\.gz expands to more than 200 times its size .* is the limit"):
        list(read_lines(path))


def test_row_groups_of_parquet_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"en": ["a"] * 1000, "de": ["b"] * 1000})
    pyarrow.parquet.write_table(table, path)
    corpus = parse_corpus(str(path), "en", "de")
    assert len(list(read_corpus(corpus))) == 1000
    monkeypatch.setattr(parquet, "MAX_ROWS", 999)
    with pytest.raises(DataError, match=r"row group of 1,000 rows .* 999 rows and .* are the limit"):
        list(read_corpus(corpus))


def repeated(text: str, count: int) -> pyarrow.DictionaryArray:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [text])


@pytest.mark.parametrize("form", ["flat", "nested", "hf:"])
def test_a_text_that_a_parquet_file_repeats_is_not_decoded_without_end(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    path = tmp_path / "set/train.parquet"

    def write(text: str, count: int) -> None:
        table = pyarrow.table({"en": repeated(text, count), "de": repeated(text, count)})
        if form == "nested":
            struct = pyarrow.StructArray.from_arrays([repeated(text, count)] * 2, ["en", "de"])
            table = pyarrow.table({"translation": struct})
        pyarrow.parquet.write_table(table, path, compression="zstd")

    text = "x" * (1 << 20)
    write(text, 1 << 13)  # of 8 GiB
    corpus = parse_corpus(f"hf:{path.parent}" if form == "hf:" else str(path), "en", "de")
    assert path.stat().st_size < 3000
    with pytest.raises(DataError, match=r"train\.parquet expands to more than 200 times its size by row"):
        list(read_corpus(corpus))
    monkeypatch.setattr(limits, "ALWAYS", 1 << 40)
    monkeypatch.setattr(parquet, "MAX_LINE", len(text))
    assert next(read_corpus(corpus)) == (text, text)
    monkeypatch.setattr(parquet, "MAX_LINE", len(text) - 1)
    with pytest.raises(DataError, match=r"train\.parquet, row 1: more than .* which is the limit of a line"):
        list(read_corpus(corpus))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([["x"] * 1000], "holds a list"),
        ([{"a": "x"}], "holds a dict"),
        ([7], "holds a int"),
        ([b"x"], "holds a bytes"),
    ],
)
def test_a_column_of_a_parquet_file_that_is_no_text_is_named(
    tmp_path: Path, column: list, message: str
) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"en": column, "de": ["b"], "x": ["c"]}), tmp_path / "x.parquet"
    )
    corpus = parse_corpus(str(tmp_path / "x.parquet"), "en", "de")
    with pytest.raises(DataError, match=f"row 1: column 'en' {message}, not text"):
        list(read_corpus(corpus))
    corpus = parse_corpus(str(tmp_path / "x.parquet"), "en", "de", source_column="y", target_column="x")
    with pytest.raises(DataError, match="no column 'y'; there are 'en', 'de', 'x'"):
        list(read_corpus(corpus))


def test_a_folder_of_very_many_files_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.json").write_text("{}")
    with pytest.raises(DataError, match="more than 3 files, which is the limit of a dataset"):
        corpus_fingerprint(parse_corpus(f"hf:{tmp_path}", "en", "de"))


@pytest.mark.parametrize("url", ["zip://", "zip://x.tsv", "simplecache::zip://", "zip://a.tsv::file://b"])
def test_urls_that_cannot_be_opened_are_one_sentence(url: str) -> None:
    with pytest.raises(TrmtError) as caught:
        parse_corpus(url, "en", "de")
    assert "\n" not in str(caught.value)


URLS = [
    "ftp://",
    "http://",
    "https:///x",
    "s3://",
    "gs:///x.tsv",
    "sftp://",
    "ftp://:80/x.tsv",
    "ftp://a@/x.tsv",
]
URLS += ["smb://", "simplecache::ftp:///x.tsv", "github://", "http://.tsv", "webhdfs:///x.tsv"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_url_without_a_host_is_refused_before_anything_is_opened(url: str) -> None:
    with pytest.raises(TrmtError, match=r"names no (host|bucket|repository); write .*://.*/FILE"):
        parse_corpus(url, "en", "de")


@pytest.mark.parametrize(
    "url", ["http://[::1]:80/x", "ftp://a:b@h/x", "s3://b@c/x", "hdfs:///x", "file:///x"]
)
def test_a_url_with_a_host_or_without_the_need_of_one_is_not_refused(url: str) -> None:
    urls._check_host(url)


@pytest.mark.parametrize("column", ["9" * 4400, "1000000", "²", "-1"])
def test_numbers_of_columns_have_a_limit(tmp_path: Path, column: str) -> None:
    (tmp_path / "x.tsv").write_text("a\tb\n")
    with pytest.raises(ConfigError, match="count from 0, up to 999999") as caught:
        parse_corpus(str(tmp_path / "x.tsv"), "en", "de", source_column=column, target_column="1")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "options",
    [{"beam": 10**30}, {"batch": 10**30}, {"max_length": 10**30}, {"search": "sampling", "n_best": 10**9}],
)
def test_options_of_a_search_have_a_limit(options: dict) -> None:
    with pytest.raises(ConfigError):
        TranslateOptions(**options)


COMMANDS = [("inspect",), ("verify",), ("average",), ("plot",), ("train",), ("translate",), ("import",)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_no_file_can_have_is_one_line(trmt: Command, command: tuple[str, ...]) -> None:
    code, out, err = trmt(*command, "x" * 300)
    assert (code, out) == (1, b"") and err.startswith("error: ") and err.count("\n") == 1


# Hugging Face folders


@pytest.fixture(scope="module")
def models() -> marians.SentencePieceModels:
    return marians.train_models()


@pytest.fixture
def marian(models: marians.SentencePieceModels, tmp_path: Path) -> Path:
    return marians.folder(tmp_path / "marian", models)


HOSTILE_OPTIONS = [
    {"encoder_layers": 10**9, "decoder_layers": 10**9},
    {"encoder_layers": 10**30},
    {"decoder_layers": -1},
    {"d_model": 1 << 40},
    {"d_model": 1 << 12},
    {"d_model": "32"},
    {"encoder_ffn_dim": 1 << 30, "decoder_ffn_dim": 1 << 30},
    {"max_position_embeddings": 1 << 40},
    {"max_position_embeddings": 1 << 18, "d_model": 1 << 18},
    {"encoder_attention_heads": 0, "decoder_attention_heads": 0},
    {"activation_function": ["swish"]},
    {"dropout": {}},
    {"d_model": None},
]


@pytest.mark.parametrize("options", HOSTILE_OPTIONS, ids=str)
def test_a_marian_model_declares_nothing_that_it_has_not(marian: Path, options: dict) -> None:
    config = json.loads((marian / "config.json").read_bytes()) | options
    (marian / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrmtError) as caught:
        read_marian(marian)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocabulary", [{"a": "b"}, {"a": [0], "b": 1}, {"a": 0, "b": 0}, {"a": True}])
def test_a_vocabulary_has_a_number_for_each_token(marian: Path, vocabulary: dict) -> None:
    (marian / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(BundleError, match=r"vocab\.json"):
        read_marian(marian)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "", "a/b", ".."])
def test_an_index_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "model" / SHARDS).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(BundleError, match="no file of weights in its folder"):
        read_weights(tmp_path / "model")


def test_an_archive_of_weights_may_not_expand(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / PICKLED, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(BundleError, match=r"would expand to 10,000,000 bytes, but its own size of .* limit"):
        read_weights(tmp_path)


def test_a_tensor_may_not_be_larger_than_its_file(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / PICKLED)
    with pytest.raises(BundleError, match=r"of shape \[1048576, 1048576\], but the size of the file is the"):
        read_weights(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_pytorch_are_read_as_they_were_saved(tmp_path: Path, legacy: bool) -> None:
    weights = {"x": torch.randn(3, 4), "y": torch.ones(5)}
    torch.save(weights, tmp_path / PICKLED, _use_new_zipfile_serialization=not legacy)
    found = read_weights(tmp_path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


class Touching:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("content", [Touching(), [1, 2], {"x": 1}, {"x": Touching()}])
def test_a_pickle_of_anything_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save(content, tmp_path / PICKLED)
        with pytest.raises(BundleError):
            read_weights(tmp_path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("size", [2**63, 2**40, 10**6])
def test_a_header_that_declares_more_than_the_file_is_refused(tmp_path: Path, size: int) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match="cannot read the weights"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match="cannot read the weights"):
        read_weights(tmp_path)


HOSTILE_BERTS = [
    *({"num_hidden_layers": 10**9}, {"num_hidden_layers": 9}, {"hidden_size": "x"}, {"hidden_size": 1 << 18}),
    *({"vocab_size": 1 << 40}, {"max_position_embeddings": 1 << 24}),
]


@pytest.mark.parametrize("options", HOSTILE_BERTS)
def test_a_bert_declares_nothing_that_it_has_not(tmp_path: Path, options: dict) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "max_position_embeddings": 8, "type_vocab_size": 2}
    rates = {"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **sizes, **rates, **options}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TrmtError) as caught:
        read_bert(tmp_path)
    assert "\n" not in str(caught.value)
