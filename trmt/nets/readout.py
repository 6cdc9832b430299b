"""The readout of networks in 16 bits: logits in fp32.

In bf16, logits between 8 and 32 would be multiples of 0.06 to 0.125, and a search would rank hypotheses by
them. GPUs add up such products in fp32 anyway and can return that.

Axes: R rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trmt.devices.abilities import abilities
from trmt.devices.memory import is_out_of_memory


class Fp32Readout:
    """The product with a matrix in 16 bits, and its bias; the result has single precision."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self.weight_VD = weight_VD
        self.bias_V = None if bias_V is None else bias_V.float()
        self._copy_DV: Tensor | None = None
        if weight_VD.device.type == "cpu" or not abilities(weight_VD.device).use("readout"):
            self._copy_DV = weight_VD.t().float()

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden_RD = hidden.flatten(0, -2).to(self.weight_VD.dtype)
        logits_RV = self._product(hidden_RD)
        if self.bias_V is not None:
            logits_RV += self.bias_V
        return logits_RV.view(*hidden.shape[:-1], -1)

    def _product(self, hidden_RD: Tensor) -> Tensor:
        if self._copy_DV is None:
            try:
                return torch.mm(hidden_RD, self.weight_VD.t(), out_dtype=torch.float32)
            except Exception as error:  # whatever the driver and PyTorch raise
                if is_out_of_memory(error):
                    raise
                abilities(hidden_RD.device).lose("readout", error)
                self._copy_DV = self.weight_VD.t().float()
        return hidden_RD.float() @ self._copy_DV
