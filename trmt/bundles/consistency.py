"""Whether what a bundle says of itself fits together: manifest, tokenizer, weights and network.

A bundle may come from anywhere, and its checksum says only that it was copied well. So sizes, ids and types
are compared here once, when it is loaded, and sizes before a network is built from them. Whoever looks up a
row later, in C or on a GPU, can rely on it. Names and shapes are compared in `bundles.check_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trmt.errors import BundleError, ConfigError, first_line
from trmt.nets.base import Decoding, Seq2Seq
from trmt.nets.ragged import Source
from trmt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trmt.bundles.bundles import Manifest

SIDES = ("source", "target")
# Of an option that is the size of no weights, such as the positions of a table that is computed.
LARGEST_OPTION = 1 << 18
# So many times the numbers that are stored, and some more, may a network have while it is built.
SPARE, LEAST_NUMBERS = 4, 1 << 20
STORED_TYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
AS_STORED = "copy the bundle again, or do not use it"


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, *, where: str) -> None:
    """Raise an error if a manifest does not fit the tokenizer, or has fewer tokens than it."""
    if tokenizer.fingerprint != manifest.tokenizer:
        raise BundleError(
            f"{where}/tokenizer is not the tokenizer this network was trained with; copy it again"
        )
    for name, token in manifest.special.items():
        if getattr(tokenizer.target, name, token) != token:
            raise BundleError(
                f"the manifest of {where} has {token} for the id of {name}, the tokenizer has "
                f"{getattr(tokenizer.target, name)}; {AS_STORED}"
            )
    for side, count in manifest.longest.items():
        if count < 1:
            raise BundleError(f"the manifest of {where} has longest.{side} = {count}; {AS_STORED}")
    for side in SIDES:
        _check_rows(side, manifest.network.get(f"{side}_vocabulary"), tokenizer, where=where)


def check_options(manifest: Manifest, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Raise an error for a size that nobody could have meant; networks from outside trmt say their own."""
    if ":" in manifest.architecture:
        return
    largest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
    for name, value in manifest.network.items():
        if isinstance(value, int) and value > max(LARGEST_OPTION, largest):
            raise BundleError(
                f"{where} has network.{name} = {value:,}, and no weights of that size; without these, up to "
                f"{LARGEST_OPTION:,} is allowed"
            )


def check_network(net: Seq2Seq, tokenizer: Tokenizer, *, where: str) -> None:
    """Raise an error if a network cannot take every id of its tokenizer, or even the shortest sentence."""
    config = getattr(net, "config", None)
    for side in SIDES:
        _check_rows(side, getattr(config, f"{side}_vocabulary", None), tokenizer, where=where)
    _check_rows("target", len(net.output.weight), tokenizer, where=where)
    if net.max_positions < 2:
        raise BundleError(
            f"the network of {where} has max_positions = {net.max_positions}, but a token and the end of its "
            f"sentence need two; {AS_STORED}"
        )
    if not all(hasattr(config, f"{side}_vocabulary") for side in SIDES):
        _try_highest_ids(net, tokenizer, where=where)


def _check_rows(side: str, rows: Any, tokenizer: Tokenizer, *, where: str) -> None:
    ids = getattr(tokenizer, side).vocabulary
    if isinstance(rows, int) and rows < ids:
        raise BundleError(
            f"the network of {where} has {rows:,} {side} tokens, its tokenizer has {ids:,}; they do not "
            f"belong together: {AS_STORED}"
        )


@torch.inference_mode()
def _try_highest_ids(net: Seq2Seq, tokenizer: Tokenizer, *, where: str) -> None:
    """Let a network that does not say its vocabularies decode a step with the highest ids."""
    source = Source.of([[tokenizer.source.vocabulary - 1]])
    tokens_SKT = torch.full((1, 1, 1), tokenizer.target.vocabulary - 1)
    net.eval()
    try:
        memory, decoder = net.start(source, Decoding(1, 2))
        net.step(tokens_SKT, memory, decoder, torch.zeros(1, dtype=torch.long))
    except (IndexError, RuntimeError) as error:
        raise BundleError(
            f"the network of {where} cannot take the highest ids of its tokenizer "
            f"({first_line(error)}); {AS_STORED}"
        ) from error


def readable(weights: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Stored weights, each of a type that can be computed with, and at an address that a processor allows."""
    for name, tensor in weights.items():
        if tensor.dtype not in STORED_TYPES:
            raise BundleError(
                f"{where} has {name!r} of type {str(tensor.dtype).removeprefix('torch.')}, which trmt does "
                "not read; store it as float32"
            )
    return {name: x.clone() if x.data_ptr() % x.element_size() else x for name, x in weights.items()}


def of_type(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Weights in the types that a network has them in; what is stored in half precision becomes fp32."""
    if all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights.values()):
        return dict(weights)
    return {name: weights[name].to(tensor.dtype) for name, tensor in net.state_dict().items()}


class Building(TorchFunctionMode):
    """Builds a network whose weights are about to be replaced by stored ones.

    The random initialisation, which takes seconds, is skipped. A network that is much larger than what is
    stored is refused before it takes the memory.
    """

    def __init__(self, stored: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.left = math.inf
        if stored is not None:
            self.left = LEAST_NUMBERS + SPARE * sum(tensor.numel() for tensor in stored.values())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if kwargs and func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn):
            self.left -= _numbers(kwargs.get("size", args))
            if self.left < 0:
                raise ConfigError("it would be several times larger than the weights that are stored")
        return func(*args, **kwargs)


def _numbers(sizes: Any) -> int:
    return math.prod(map(_numbers, sizes)) if isinstance(sizes, tuple | list | torch.Size) else int(sizes)
