"""A network that cannot be resumed: what it computes depends on something that is not saved."""

from __future__ import annotations

from typing import Any

from trmt.nets.base import Output
from trmt.nets.transformer import Transformer


class Forgetful(Transformer):
    """Its output grows a little with each call of this process."""

    calls = 0

    def forward(self, *args: Any, **more: Any) -> Output:
        self.calls += 1
        output = super().forward(*args, **more)
        return Output(output.hidden * (1 + self.calls * 1e-3), output.aux, output.attention)
