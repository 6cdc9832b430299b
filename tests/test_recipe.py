from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import VOCABULARY
from trmt.bundles.bundles import build_network
from trmt.config import build, read_toml, to_toml, to_tree
from trmt.errors import ConfigError
from trmt.registry import NETWORKS, OBJECTIVES, installed, resolve
from trmt.training.optim import learning_rate
from trmt.training.recipe import (
    MAY_CHANGE,
    Recipe,
    differences,
    fitting_recipe,
    flat,
    load_recipe,
    names,
    safe_name,
)


def sizes(source: int, target: int) -> dict[str, Any]:
    return {"source_vocabulary": source, "target_vocabulary": target}


def vocabulary(name: str, size: int) -> dict[str, Any]:
    """As many pieces on both sides, as far as the network has two."""
    config = resolve(NETWORKS, load_recipe(name).architecture).config_class
    return {key: value for key, value in sizes(size, size).items() if key in config.__dataclass_fields__}


def parameters(name: str, network: dict[str, Any]) -> int:
    recipe = load_recipe(name, network=network)
    with torch.device("meta"):
        net = build_network(recipe.architecture, recipe.network)
    return sum(parameter.numel() for parameter in net.parameters())


def runs_here(name: str) -> bool:
    recipe = load_recipe(name)
    return recipe.architecture in installed(NETWORKS) and recipe.objective in installed(OBJECTIVES)


@pytest.mark.parametrize("name", [*filter(runs_here, names())])
def test_every_recipe_loads_and_builds(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, network=vocabulary(name, 8000))
    assert recipe.description
    assert parameters(name, vocabulary(name, 8000)) < parameters(name, vocabulary(name, 9000))
    objective = resolve(OBJECTIVES, recipe.objective)
    build(objective.config_class, recipe.loss, where="loss")
    assert issubclass(resolve(NETWORKS, recipe.architecture), objective.networks)
    assert learning_rate(recipe.optim, d_model=512, total_steps=recipe.training.steps)(1) > 0
    (tmp_path / "config.toml").write_bytes(to_toml(to_tree(recipe)).encode())
    assert build(Recipe, read_toml(tmp_path / "config.toml"), where="config") == recipe


def test_the_base_model_has_the_size_of_the_paper() -> None:
    """The paper prints 65M and 213M; with biases and its shared vocabulary of 37,000 these are the sums."""
    assert round(parameters("transformer-base", sizes(37000, 37000)) / 1e6, 1) == 63.1
    assert round(parameters("transformer-big", sizes(37000, 37000)) / 1e6) == pytest.approx(214, abs=2)


def test_the_base_recipe_is_that_of_the_paper() -> None:
    recipe = load_recipe("transformer-base", network=sizes(VOCABULARY, VOCABULARY))
    assert (recipe.optim.beta1, recipe.optim.beta2, recipe.optim.epsilon) == (0.9, 0.98, 1e-9)
    assert (recipe.optim.schedule, recipe.optim.lr, recipe.optim.warmup) == ("paper", 1.0, 4000)
    assert recipe.loss["label_smoothing"] == 0.1
    assert recipe.batches.tokens * recipe.batches.accumulate == 25_000
    assert recipe.training.steps == 100_000


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'transformer-base'"):
        load_recipe("transformer-bse")
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_a_recipe_file_can_be_used_with_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('architecture = "rnn"\n[training]\nsteps = 5\n', "utf-8")
    recipe = load_recipe(
        str(tmp_path / "mine.toml"), ["training.steps=7", "optim.lr=1"], network={"d_model": 8}
    )
    assert (recipe.training.steps, recipe.optim.lr, recipe.network) == (7, 1.0, {"d_model": 8})


def test_another_architecture_replaces_the_network_table() -> None:
    recipe = load_recipe("transformer-tiny", network={"d_model": 8}, architecture="rnn")
    assert (recipe.architecture, recipe.network) == ("rnn", {"d_model": 8})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["training.stpes=5"], "did you mean 'training.steps'"),
        (["training.steps=0", "training.patience=0"], "nothing would end this training"),
        (["training.steps=-1"], "at least 0"),
        (["training.seed=-1"], "seed"),
        (["optim.lr=nan"], "optim.lr = nan is not a finite number"),
        (["training.log_every=0"], "at least 1"),
        (["training.keep_last=0"], "at least 1"),
        (["training.precision=fp8"], "choose one of"),
        (["validation.every=0"], "at least 1"),
        (["validation.sentences=0"], "needs translations"),
        (["validation.metric=ter"], "choose one of"),
        (["optim.lr=fast"], "expected a number"),
    ],
)
def test_invalid_settings_are_refused(settings: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_recipe("transformer-tiny", settings)


def test_differences_have_dotted_names() -> None:
    before = load_recipe("transformer-tiny")
    now = load_recipe("transformer-tiny", ["optim.lr=0.5", "network.heads=8", "network.extra=1"])
    assert differences(before, now) == {
        "network.extra": (None, 1),
        "network.heads": (4, 8),
        "optim.lr": (0.002, 0.5),
    }
    assert differences(before, before) == {}


def test_the_settings_that_may_change_exist() -> None:
    assert set(flat(to_tree(load_recipe("transformer-tiny")))) >= MAY_CHANGE


def test_the_default_recipe_fits_the_size_of_the_data() -> None:
    sizes = (1_000, 50_000, 500_000, 4_000_000, 40_000_000)
    found = [fitting_recipe(pairs, gpu=True).removeprefix("transformer-") for pairs in sizes]
    assert found == ["low-resource", "tiny", "small", "base", "big"]
    assert fitting_recipe(40_000_000, gpu=False) == "transformer-small"
    assert {f"transformer-{name}" for name in found} <= set(names())


@pytest.mark.parametrize(
    ("text", "name"), [("data-tiny", "data-tiny"), ("a/b c", "a-b-c"), ("..", "run"), ("日本", "日本")]
)
def test_names_are_safe_for_folders(text: str, name: str) -> None:
    assert safe_name(text) == name


@pytest.mark.parametrize("name", names())
def test_recipes_with_a_schedule_that_has_an_end_and_those_of_publications_do_not_stop_early(
    name: str,
) -> None:
    recipe = load_recipe(name)
    published = name in ("multi30k", "transformer-base", "transformer-big", "bert-base", "bart-base")
    fixed = published or recipe.optim.schedule in ("linear", "cosine")
    assert (recipe.training.patience == 0) == fixed


def test_a_recipe_without_patience_stops_early(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('architecture = "rnn"\n[training]\nsteps = 5\n', "utf-8")
    assert load_recipe(str(tmp_path / "mine.toml")).training.patience > 0


def test_defaults_are_below_a_recipe_and_overrides_above_it(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nsteps = 5\n[optim]\nlr = 2.0\n", "utf-8")
    found = load_recipe(
        str(tmp_path / "mine.toml"),
        ["optim.warmup=7"],
        defaults={"training": {"steps": 1, "patience": 3}},
        overrides={"optim": {"lr": 0.5, "warmup": 9}},
    )
    assert (found.training.steps, found.training.patience) == (5, 3)
    assert (found.optim.lr, found.optim.warmup) == (0.5, 7)
