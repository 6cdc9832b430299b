"""The fastest stepper for a network on this machine."""

from __future__ import annotations

import torch

from trmt.native.products import PackedProducts, best_processor
from trmt.native.transformer import NativeStepper, steps_natively
from trmt.nets.base import Precision, Seq2Seq, Stepper
from trmt.nets.transformer import Transformer


def stepper(net: Seq2Seq, precision: Precision, checksum: str) -> Stepper | None:
    """A stepper with packed products, if it can be had for this network and device, by kernels if they have
    it.

    With the checksum of the weights, packed weights are kept for other processes.
    """
    weight = net.output.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not best_processor():
        return None
    packed = PackedProducts(precision, checksum=checksum)
    made: Stepper = (
        NativeStepper(net, packed)
        if isinstance(net, Transformer) and steps_natively(net)
        else net.frozen(packed)
    )
    packed.save()
    return made
