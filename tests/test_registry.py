from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from torch import nn

import trmt
from trmt import registry
from trmt.decoding.base import Ranker, Search
from trmt.errors import ConfigError
from trmt.interop.base import Format
from trmt.nets.base import Seq2Seq
from trmt.nets.transformer import TransformerEncoder
from trmt.objectives.base import Objective
from trmt.registry import (
    ARCHITECTURES,
    ENCODER_VARIANTS,
    ENCODERS,
    FORMATS,
    NATIVE,
    NETWORKS,
    OBJECTIVES,
    RANKERS,
    SEARCHES,
    VARIANTS,
    installed,
    is_installed,
    optional,
    require,
    resolve,
    split_variants,
)

CONTRACTS = [
    (ENCODER_VARIANTS, TransformerEncoder),
    (VARIANTS, TransformerEncoder),
    (ARCHITECTURES, Seq2Seq),
    (ENCODERS, TransformerEncoder),
    (NETWORKS, nn.Module),
    (OBJECTIVES, Objective),
    (SEARCHES, Search),
    (RANKERS, Ranker),
    (FORMATS, Format),
]
ENTRIES = [(table, name, contract) for table, contract in CONTRACTS for name in installed(table)]


def test_every_table_is_tested_here() -> None:
    tables = [value for key, value in vars(registry).items() if key.isupper() and isinstance(value, dict)]
    assert [table for table in tables if table is not NATIVE] == [table for table, _ in CONTRACTS]


@pytest.mark.parametrize(("table", "name", "contract"), ENTRIES)
def test_every_entry_is_what_its_table_says(table: Mapping[str, str], name: str, contract: type) -> None:
    found = resolve(table, name)
    assert issubclass(found, contract)
    assert not getattr(found, "__abstractmethods__", None)


def test_a_wrong_name_suggests_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'transformer'"):
        resolve(ARCHITECTURES, "transfromer")
    with pytest.raises(ConfigError, match="known are conv, conv-encoder-attention, hierarchical, rnn"):
        resolve(ARCHITECTURES, "qqq")


def test_variants_are_combined() -> None:
    pytest.importorskip("trmt.lab")
    both, one = (resolve(ARCHITECTURES, f"transformer-{name}") for name in ("alibi+batch-norm", "alibi"))
    config = both.config_class(source_vocabulary=9, target_vocabulary=9, d_model=16)
    assert (config.positions, config.norm, config.heads) == ("alibi", "batch", 8)
    bases = [resolve(VARIANTS, name) for name in ("alibi", "batch-norm")]
    assert all(issubclass(both, base) for base in bases) and issubclass(one, bases[0])
    assert both is resolve(ARCHITECTURES, "transformer-alibi+batch-norm")
    assert split_variants("masked-encoder-alibi+t5") == ("masked-encoder", ["alibi", "t5"])
    assert split_variants("rnn-attention") == ("rnn-attention", [])
    for name in ("transformer-alibi+nothing", "masked-encoder-hard", "conv-alibi", "transformer+alibi"):
        with pytest.raises(ConfigError, match="unknown name"):
            resolve(NETWORKS, name)


def test_code_outside_is_loaded_with_trust_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_network.py").write_text("class Mine: pass\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="--trust-code"):
        resolve(ARCHITECTURES, "outside_network:Mine")
    assert "outside_network" not in sys.modules
    assert resolve(ARCHITECTURES, "outside_network:Mine", trust_code=True).__name__ == "Mine"
    monkeypatch.delitem(sys.modules, "outside_network")


@pytest.mark.parametrize("name", ["no_such_module:X", "json:NoSuchClass", ":X", "json:"])
def test_code_that_cannot_be_loaded_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="check the module and class name"):
        resolve(ARCHITECTURES, name, trust_code=True)


def test_the_tables_load_nothing() -> None:
    code = "import sys, trmt.registry; sys.exit(any(n.startswith('trmt.nets') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Optional packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `trmt.extra` that only this test has; without `__init__.py` so far."""
    folder = tmp_path / "extra"
    folder.mkdir()
    monkeypatch.setattr(trmt, "__path__", [*trmt.__path__, str(tmp_path)])
    optional.cache_clear()
    yield folder
    optional.cache_clear()
    for name in [name for name in sys.modules if name.startswith("trmt.extra")]:
        del sys.modules[name]


def test_a_missing_package_is_none(package: Path) -> None:
    # A folder without __init__.py, such as one that caches were left in, is no package.
    assert not is_installed("trmt.extra") and not is_installed("trmt.nowhere")
    assert optional("trmt.extra.module:name") is optional("trmt.nowhere:name") is None
    with pytest.raises(
        ConfigError, match=r"--option needs trmt\.extra, which this copy of trmt does not have"
    ):
        require("trmt.extra", "--option")
    with pytest.raises(ConfigError, match=r"'x' needs trmt\.extra, which this copy of trmt does not have"):
        resolve({"x": "trmt.extra.module:name"}, "x")


def test_a_package_that_is_there_gives_its_modules_and_objects(package: Path) -> None:
    (package / "__init__.py").touch()
    (package / "module.py").write_text("name = ['found']")
    found = optional("trmt.extra.module:name")
    assert found == ["found"] and optional("trmt.extra.module:name") is found
    assert optional("trmt.extra.module").name is found  # type: ignore[union-attr]
    require("trmt.extra", "--option")


@pytest.mark.parametrize(
    ("text", "error"),
    [("import no_such_dependency", ModuleNotFoundError), ("1 / 0", ZeroDivisionError), ("", AttributeError)],
)
def test_errors_inside_a_package_are_raised(package: Path, text: str, error: type[Exception]) -> None:
    (package / "__init__.py").touch()
    (package / "module.py").write_text(text)
    with pytest.raises(error):
        optional("trmt.extra.module:name")
    with pytest.raises(ModuleNotFoundError):
        optional("trmt.extra.missing")
