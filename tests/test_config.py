from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from trmt.config import RENAMED_KEYS, apply_settings, build, merge, parse_value, read_toml, to_toml, to_tree
from trmt.errors import ConfigError
from trmt.registry import NETWORKS, OBJECTIVES, installed, resolve
from trmt.training.recipe import Recipe


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    maybe: int | None = None
    flag: bool = False
    sides: tuple[str, str] = ("a", "b")
    many: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def test_a_tree_becomes_the_dataclass_and_back() -> None:
    tree = {
        "name": "x",
        "many": [1, 2],
        "inner": {"rate": 2, "kind": "two"},
        "free": {"deep": {"er": [1]}},
        "counts": {"a": 3},
    }
    built = build(Outer, tree, where="recipe")
    assert built == Outer(
        "x", many=(1, 2), inner=Inner(2.0, "two"), free={"deep": {"er": [1]}}, counts={"a": 3}
    )
    assert isinstance(built.inner.rate, float)
    assert build(Outer, to_tree(built), where="again") == built
    assert "maybe" not in to_tree(built)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, "recipe needs a value for 'name'"),
        ({"name": "x", "cuont": 1}, "unknown key 'cuont'; did you mean 'count'"),
        ({"name": 1}, "recipe.name = 1: expected text"),
        ({"name": "x", "count": "2"}, "recipe.count = '2': expected a whole number"),
        ({"name": "x", "count": True}, "recipe.count = True"),
        ({"name": "x", "count": 1.5}, "recipe.count = 1.5"),
        ({"name": "x", "flag": 1}, "recipe.flag = 1"),
        ({"name": "x", "maybe": "no"}, "recipe.maybe"),
        ({"name": "x", "many": 3}, "recipe.many is a list"),
        ({"name": "x", "many": ["3"]}, "recipe.many"),
        ({"name": "x", "sides": ["a"]}, "expected 2 values"),
        ({"name": "x", "inner": 3}, "recipe.inner is a table"),
        (
            {"name": "x", "inner": {"kind": "three"}},
            "recipe.inner.kind = 'three': choose one of 'one', 'two'",
        ),
        ({"name": "x", "inner": {"rate": "fast"}}, "recipe.inner.rate"),
        ({"name": "x", "inner": {"rate": True}}, "recipe.inner.rate"),
        ({"name": "x", "free": 1}, "recipe.free is a table"),
        ({"name": "x", "counts": {"a": "b"}}, "recipe.counts.a"),
    ],
)
def test_errors_name_the_key(tree: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, tree, where="recipe")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def random_tree(chooser: random.Random, depth: int = 0) -> dict[str, Any]:
    texts = [
        "",
        "a",
        "ü",
        'quo"te',
        "back\\slash",
        "new\nline",
        "tab\t",
        "\x00\x1f\x7f",
        "a.b",
        "\u2028",
        "😀",
    ]
    leaves = [True, False, 0, -7, 10**15, 1e-9, 0.1, 1e22, -0.0, [], [1, 2], ["x", "y\n"], [[1], [2.5]]]
    tree: dict[str, Any] = {}
    for _ in range(chooser.randrange(5)):
        value = chooser.choice([*leaves, *texts])
        tree[chooser.choice(texts)] = (
            random_tree(chooser, depth + 1) if chooser.random() < 0.3 and depth < 3 else value
        )
    return tree


@pytest.mark.parametrize("seed", range(50))
def test_toml_makes_the_round_trip(seed: int, tmp_path: Path) -> None:
    tree = random_tree(random.Random(seed))
    path = tmp_path / "x.toml"
    path.write_bytes(to_toml(tree).encode())
    assert read_toml(path) == tree


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path)
    for content in (b"a = ", b"\xff\xfe", b"a = 1\na = 2"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
            read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("7", 7),
        ("true", True),
        ('"7"', "7"),
        ("[1, 2]", [1, 2]),
        ("post", "post"),
        ("models/a b", "models/a b"),
        ("", ""),
    ],
)
def test_values_are_toml_or_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9223372036854775808", "has an integer of more than 64 bits"),
        ("[1, -9223372036854775809]", "has an integer of more than 64 bits"),
        ("9" * 4400, "a number has too many digits"),
        ("[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("'\ud800'", "half of a surrogate pair"),
    ],
)
def test_a_setting_beyond_a_limit_is_no_string(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--set 'validation.beam': the value .*{reason}") as caught:
        apply_settings({}, [f"validation.beam={text}"])
    assert len(str(caught.value)) < 300


def test_settings_do_not_change_the_tree_itself() -> None:
    tree: dict[str, Any] = {"optim": {"lr": 1.0}, "name": "x"}
    changed = apply_settings(tree, ["optim.lr=5e-4", "network.depth = 3", "name=a=b"])
    assert changed == {"optim": {"lr": 5e-4}, "network": {"depth": 3}, "name": "a=b"}
    assert tree == {"optim": {"lr": 1.0}, "name": "x"}


def test_a_date_in_a_recipe_is_an_error_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "dated.toml").write_text("name = 2024-05-27\n", "utf-8")
    tree = apply_settings(read_toml(tmp_path / "dated.toml"), ["count=2"])
    with pytest.raises(ConfigError, match=r"recipe\.name"):
        build(Outer, tree, where="recipe")


@pytest.mark.parametrize("setting", ["optim.lr", "=3", " =3"])
def test_a_setting_is_key_and_value(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set takes key=value"):
        apply_settings({}, [setting])


def test_a_setting_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'name' is a value"):
        apply_settings({"name": "x"}, ["name.first=1"])


def test_trees_are_merged_table_by_table() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": 1}
    assert merge(base, {"a": {"y": {"w": 3}}, "c": {}}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 3}},
        "b": 1,
        "c": {},
    }
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": 1}


@dataclass(frozen=True)
class Renamed(Inner):
    """A config class with an inherited field that had another name."""


def test_old_keys_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trmt.config.RENAMED_KEYS", {"Inner": {"speed": "rate"}})
    assert build(Renamed, {"speed": 0.25}, where="recipe") == Renamed(rate=0.25)
    assert to_tree(build(Inner, {"speed": 0.25}, where="recipe")) == {"rate": 0.25, "kind": "one"}
    with pytest.raises(ConfigError, match=r"recipe\.rate = 'fast'"):
        build(Inner, {"speed": "fast"}, where="recipe")


def test_of_the_old_and_the_present_key_the_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trmt.config.RENAMED_KEYS", {"Inner": {"speed": "rate"}})
    old, new = {"speed": 1.0}, {"rate": 1.0}
    assert build(Inner, apply_settings(old, ["rate=2"]), where="recipe").rate == 2
    assert build(Inner, apply_settings(new, ["speed=2"]), where="recipe").rate == 2


def config_classes() -> Iterator[type]:
    """Every class that a recipe is built from, and its base classes."""
    tables = [
        Recipe,
        *(each.default_factory for each in fields(Recipe) if is_dataclass(each.default_factory)),
    ]
    chosen = [
        resolve(table, name).config_class for table in (NETWORKS, OBJECTIVES) for name in installed(table)
    ]
    for cls in [*tables, *chosen]:
        yield from cls.__mro__[:-1]


def test_renamed_keys_are_of_config_classes() -> None:
    pytest.importorskip("trmt.lab")
    classes = {cls.__name__: cls for cls in config_classes()}
    for name, keys in RENAMED_KEYS.items():
        known = {each.name for each in fields(classes[name])}
        assert known >= set(keys.values()) and not known & set(keys)


def test_an_old_recipe_is_read() -> None:
    tree = {"batches": {"passage": 64}, "training": {"steps": 1}}
    assert build(Recipe, tree, where="recipe").batches.passage_tokens == 64
