"""Variants of a network put together: "transformer-alibi+batch-norm" inherits from both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from inspect import get_annotations
from itertools import chain
from typing import Any, get_type_hints

from trmt.errors import ConfigError


@cache
def combined(*classes: Any) -> Any:
    """One class that inherits from all, and whose config inherits from their configs."""
    configs = [*dict.fromkeys(each.config_class for each in classes if hasattr(each, "config_class"))]
    own = Counter(chain.from_iterable(map(get_annotations, configs[:-1])))
    if twice := [field for field, count in own.items() if count > 1 and field != "not_rates"]:
        names = " and ".join(each.__name__ for each in classes[:-1])
        raise ConfigError(f"{names} cannot be combined: both define network.{twice[0]}; choose one")
    config = configs[0]
    if len(configs) > 1:
        merged = type(config.__name__, tuple(configs), {})
        hints = get_type_hints(merged)
        # Declared again: dataclasses would take the defaults of the last config, attributes are of the first.
        fields = {name: getattr(merged, name) for name in hints if hasattr(merged, name)}
        namespace = {"__annotations__": hints, "__module__": __name__, **fields}
        config = dataclass(frozen=True, kw_only=True)(type(config.__name__, tuple(configs), namespace))
    name = "".join(each.__name__ for each in classes)
    return type(name, classes, {"config_class": config, "__module__": __name__})
