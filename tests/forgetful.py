"""A network that cannot be resumed: what it computes depends on something that is not saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trmt.nets.base import Output
from trmt.nets.transformer import Transformer


class Forgetful(Transformer):
    """Its output grows a little with each call of this process."""

    calls = 0

    def forward(self, *args: Any, **more: Any) -> Output:
        self.calls += 1
        output = super().forward(*args, **more)
        return replace(output, hidden=output.hidden * (1 + self.calls * 1e-3))
