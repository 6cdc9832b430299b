"""The source read by the kernel: against plain PyTorch, on every processor, alone and among others."""

from __future__ import annotations

from itertools import product as pairs
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import random_sentences
from tests.test_stepping import KINDS, needs_kernels, steppers
from trmt.errors import TrmtError
from trmt.native import products
from trmt.nets.base import Source
from trmt.nets.transformer import TransformerStepper

# One piece, multiples of what is taken at a time, more rows than keys and values are made of together.
SENTENCES = [[5], [*range(4, 20)], *random_sentences(12, longest=40, seed=4), [7] * 90]
pytestmark = needs_kernels


@torch.inference_mode()
def read(stepper: TransformerStepper, sentences: list[list[int]]) -> list[Tensor]:
    """Keys and values [2 * A, L, D] of each sentence; behind them stand zeros."""
    state = stepper.start(Source.of(sentences), hypotheses=1, room=4)
    memory, _, _ = state.take()
    found = []
    for sentence, both_ALD, mask_L in zip(sentences, memory["both"], memory["mask"].flatten(1), strict=True):
        count = len(sentence)
        assert not mask_L[:count].any() and (mask_L[count:] == -torch.inf).all()
        found.append(both_ALD[:, :count].clone())
    return found


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_kernel_reads_as_pytorch_does(precision: products.Precision, options: dict[str, Any]) -> None:
    kernel, plain = steppers(precision, **options)
    assert kernel.reader and not plain.reader
    for one, other in zip(read(kernel, SENTENCES), read(plain, SENTENCES), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        assert (one == other).float().mean() > 0.99  # most are the same to the last bit


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neighbours_change_no_bit(precision: products.Precision) -> None:
    kernel, _ = steppers(precision, **KINDS[1])
    for sentence, among in zip(SENTENCES, read(kernel, SENTENCES), strict=True):
        assert torch.equal(read(kernel, [sentence])[0], among)


def test_padding_holds_zeros() -> None:
    kernel, _ = steppers("int8")
    memory, _, _ = kernel.start(Source.of([[5], [7] * 30]), hypotheses=1, room=4).take()
    assert not memory["both"][0, :, 1:].any() and memory["both"][1].all(2).any()


def test_every_processor_reads_alike() -> None:
    for precision, options in pairs(("fp32", "int8"), KINDS):
        kernel, _ = steppers(precision, **options)  # type: ignore[arg-type]
        expected = read(kernel, SENTENCES)
        for processor in products.processors():
            assert kernel.reader
            kernel.reader.network.processor = processor
            for one, other in zip(read(kernel, SENTENCES), expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
                if precision == "int8":
                    assert (one == other).float().mean() > 0.99


def test_kinds_of_tokens_are_left_to_pytorch() -> None:
    kernel, _ = steppers("int8", segments=2)
    assert kernel.kernel and not kernel.reader
    assert [len(both[0]) for both in read(kernel, SENTENCES)] == [*map(len, SENTENCES)]


def test_a_source_that_is_too_long_is_refused() -> None:
    kernel, _ = steppers("int8")
    with pytest.raises(TrmtError, match="a source has 97 pieces"):
        read(kernel, [[5] * 97])
