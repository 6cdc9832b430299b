"""ConvS2S: gated convolutions with attention in every decoder layer (Gehring et al., arXiv 1705.03122).

The encoder's layers may attend, too, at one of the places that Yin et al. (arXiv 1512.05193) put attention
at in a convolutional network:

    before     x' = (x + attend(x, x)) / sqrt 2, then the convolution of x'
    after      h = convolution of x, then (h + attend(h, h)) / sqrt 2
    pooling    h = convolution of x, then in each window sum of softmax(v . tanh(W h)) h

where `attend` is scaled dot-product attention between the positions of the sentence.

Axes: S sentence, K hypothesis, L source position, T target position, W inputs that a step looks at,
N all tokens of a batch in a row, Q queries (K * T of them), H heads (one here), D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers
from trmt.nets.base import Linear, Memory, Output, Ragged, Rows, Seq2Seq, Source, State, Stepper, stacked

HALF = 0.5**0.5  # keeps the variance of a sum of two
EMBEDDING_STD = 0.1  # section 4.2 of the paper; attention has no scaling, so larger ones would saturate it


@dataclass(frozen=True, kw_only=True)
class ConvS2SConfig:
    """The sizes of a convolutional network."""

    source_vocabulary: int
    target_vocabulary: int
    width: int = 512
    encoder_layers: int = 8
    decoder_layers: int = 8
    kernel: int = 3
    encoder_attention: Literal["none", "before", "after", "pooling"] = "none"  # of the source to itself
    dropout: float = 0.2
    tied: Literal["target", "none"] = "target"  # whether the output shares the target embedding
    longest: int = 1024  # positions there are

    def __post_init__(self) -> None:
        layers.check_sizes(self)
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel = {self.kernel} has no middle; choose an odd number")
        if self.encoder_attention == "pooling" and self.kernel == 1:
            raise ConfigError(
                'encoder_attention = "pooling" chooses within windows, and kernel = 1 leaves nothing to '
                "choose from; set network.kernel to 3 or more"
            )


class Convolution(nn.Module):
    """A gated convolution as one product over a window of inputs; decoders also ask the source."""

    def __init__(self, config: ConvS2SConfig, *, cross: bool) -> None:
        super().__init__()
        width = config.width
        self.gated = nn.Linear(config.kernel * width, 2 * width)
        # Section 3.5 of the paper: the gate halves the variance, dropout raises it.
        std = (4 * (1 - config.dropout) / (config.kernel * width)) ** 0.5
        nn.init.normal_(self.gated.weight, std=std)
        nn.init.zeros_(self.gated.bias)
        if cross:
            self.query = layers.xavier(nn.Linear(width, width))
            self.out = layers.xavier(nn.Linear(width, width))
        elif config.encoder_attention == "pooling":
            self.weigh = layers.xavier(nn.Linear(width, width))
            self.vector = nn.Parameter(torch.randn(width) * width**-0.5)
        elif config.encoder_attention != "none":
            self.own = layers.xavier(nn.Linear(width, 3 * width), 3)
            self.own_out = layers.xavier(nn.Linear(width, width))


class ConvS2S(Seq2Seq):
    """The network as it is trained."""

    config_class = ConvS2SConfig
    layers_called_once = True

    def __init__(self, config: ConvS2SConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.source_embedding = nn.Embedding(config.source_vocabulary, width)
        self.target_embedding = nn.Embedding(config.target_vocabulary, width)
        self.output = (
            self.target_embedding
            if config.tied == "target"
            else nn.Embedding(config.target_vocabulary, width)
        )
        for embedding in (self.source_embedding, self.target_embedding, self.output):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        self.positions = nn.Parameter(torch.randn(2, config.longest, width) * EMBEDDING_STD)
        self.encoder = nn.ModuleList(Convolution(config, cross=False) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(Convolution(config, cross=True) for _ in range(config.decoder_layers))
        self.last = layers.xavier(nn.Linear(width, width))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        around: list[Tensor] | None = [] if "encoder_attention" in want else None
        memory = encode(self, self.config, source, weights=around)
        ids_ST, _ = target.padded()
        own = _blank(self.config, memory, (len(target), 1))
        position_S = torch.zeros_like(target.lengths_S)
        hidden_SKTD, _, attention = decode(
            self, self.config, ids_ST[:, None], position_S, memory=memory, own=own, want=want
        )
        hidden_ND = hidden_SKTD.flatten(0, 2)[target.cells_N(ids_ST.shape[1])]
        return Output(hidden_ND, attention=attention, encoder_attention=stacked(around or ()))

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        weight = self.output.weight
        return F.linear(hidden, weight if only is None else weight[only])

    def readout_matrix(self) -> Tensor:
        return self.output.weight

    def frozen(self, linear: Linear) -> Stepper:
        return ConvS2SStepper(self, linear)


def _embed(net: Any, config: ConvS2SConfig, ids: Tensor, position: Tensor, *, side: int) -> Tensor:
    weight = (net.target_embedding if side else net.source_embedding).weight
    x = F.embedding(ids, weight) + net.positions[side, position]
    return net.drop(x)


def _gated(net: Any, layer: Any, x_WD: Tensor, kernel: int) -> Tensor:
    """The convolution over the axis before the last, which comes out `kernel` - 1 shorter."""
    windows = net.drop(x_WD).unfold(-2, kernel, 1).flatten(-2)
    return F.glu(layer.gated(windows), -1)


def encode(net: Any, config: ConvS2SConfig, source: Source, *, weights: list[Tensor] | None = None) -> Memory:
    """Read the source: keys are the last layer's outputs, values have the embeddings added.

    `weights` gets those of each layer that looks at the whole source.
    """
    if source.longest > config.longest:
        raise ConfigError(f"a source has {source.longest} pieces, the network positions for {config.longest}")
    ids_SL, real_SL = source.padded(layers.key_multiple(net))
    real_SL1 = real_SL[..., None]
    position_L = torch.arange(ids_SL.shape[1], device=ids_SL.device).clamp(max=config.longest - 1)
    embedded_SLD = _embed(net, config, ids_SL, position_L, side=0)
    x_SLD = embedded_SLD
    side = config.kernel // 2
    mask = layers.blocked(real_SL, embedded_SLD.dtype)[:, None, None]
    for layer in net.encoder:
        inner_SLD = _attended(layer, x_SLD, mask, weights) if config.encoder_attention == "before" else x_SLD
        # Padding is zeroed before each layer: what lies behind a sentence must not leak into it.
        around_SLD = F.pad(inner_SLD * real_SL1, [0, 0, side, side])
        h_SLD = _gated(net, layer, around_SLD, config.kernel)
        if config.encoder_attention == "after":
            h_SLD = _attended(layer, h_SLD, mask, weights)
        elif config.encoder_attention == "pooling":
            h_SLD = _pooled(layer, h_SLD, real_SL, config.kernel)
        x_SLD = (x_SLD + h_SLD) * HALF
    x_SLD = net.last(x_SLD)
    values_SLD = (x_SLD + embedded_SLD) * HALF
    # The sum of m values weighted about evenly shrinks like 1/sqrt(m); the paper scales it back up.
    grow_S1 = source.lengths_S[:, None, None].to(x_SLD.dtype).sqrt()
    return Memory(
        {"keys": x_SLD, "values": values_SLD, "mask": mask, "grow": grow_S1},
        {"keys": (1, 0.0), "values": (1, 0.0), "mask": (3, -math.inf)},
    )


def _attended(layer: Any, x_SLD: Tensor, mask: Tensor, weights: list[Tensor] | None) -> Tensor:
    """Each position with what it finds at the others."""
    query, key, value = (part_SLD[:, None] for part_SLD in layer.own(x_SLD).chunk(3, -1))
    if weights is not None:
        weights.append(layers.attention_weights(query, key, mask))
    return (x_SLD + layer.own_out(layers.attend(query, key, value, mask))) * HALF


def _pooled(layer: Any, h_SLD: Tensor, real_SL: Tensor, kernel: int) -> Tensor:
    """Each position replaced by the sum of its window, weighted by what the window itself says."""
    score_SL = (torch.tanh(layer.weigh(h_SLD)) * layer.vector).sum(-1)
    # Not minus infinity: beyond a sentence there are windows with nothing in them.
    nothing = torch.finfo(score_SL.dtype).min / 2
    around = [kernel // 2, kernel // 2]
    score_SL = F.pad(score_SL.masked_fill(~real_SL, nothing), around, value=nothing)
    weights_SLW = score_SL.unfold(1, kernel, 1).softmax(-1)
    windows_SLDW = F.pad(h_SLD * real_SL[..., None], [0, 0, *around]).unfold(1, kernel, 1)
    return (windows_SLDW * weights_SLW[:, :, None]).sum(-1)


def decode(
    net: Any,
    config: ConvS2SConfig,
    tokens_SKT: Tensor,
    position_S: Tensor,
    *,
    memory: Memory,
    own: Rows,
    want: Collection[str] = (),
) -> tuple[Tensor, Rows, Tensor | None]:
    """The decoder over T tokens at once, behind the windows that `own` holds for each layer."""
    step_T = torch.arange(tokens_SKT.shape[2], device=tokens_SKT.device)
    position_SKT = (position_S[:, None] + step_T)[:, None].expand(tokens_SKT.shape)
    embedded_SKTD = _embed(net, config, tokens_SKT, position_SKT, side=1)
    x_SKTD = embedded_SKTD
    windows, weights = [], []
    for layer, window_SKWD in zip(net.decoder, own.tensors, strict=True):
        seen_SKWD = torch.cat([window_SKWD, x_SKTD], 2)
        windows.append(seen_SKWD[:, :, -(config.kernel - 1) :] if config.kernel > 1 else window_SKWD)
        h_SKTD = _gated(net, layer, seen_SKWD, config.kernel)
        query_SKTD = (layer.query(h_SKTD) + embedded_SKTD) * HALF
        # The paper does not scale scores: of inputs as small as its embeddings nothing would be left.
        query_SHQD = query_SKTD.flatten(1, 2)[:, None] * config.width**0.5
        key_SHLD, mask = memory["keys"][:, None], memory["mask"]
        found_SQD = layers.attend(query_SHQD, key_SHLD, memory["values"][:, None], mask) * memory["grow"]
        if "attention" in want:
            weights.append(layers.attention_weights(query_SHQD, key_SHLD, mask))
        h_SKTD = (h_SKTD + layer.out(found_SQD.view_as(h_SKTD))) * HALF
        x_SKTD = (x_SKTD + h_SKTD) * HALF
    # Everything inside is as small as the embeddings; the output's products need unit variance to begin with.
    return net.drop(x_SKTD) / EMBEDDING_STD, Rows(tuple(windows)), torch.stack(weights) if weights else None


def _blank(config: ConvS2SConfig, memory: Memory, sizes: tuple[int, int]) -> Rows:
    window = memory["keys"].new_zeros(*sizes, config.kernel - 1, config.width)
    return Rows((window,) * config.decoder_layers)


class ConvS2SStepper(Stepper):
    """The same network for translating: each step sees its last few inputs."""

    fixes = True

    def __init__(self, net: ConvS2S, linear: Linear) -> None:
        self.config = net.config
        self.net = layers.freeze(net, linear)
        self.net.positions = net.positions.detach()
        self.net.source_embedding = net.source_embedding
        self.net.target_embedding = net.target_embedding
        self.weight_VD = net.output.weight.detach()
        self.product = linear(self.weight_VD, None)

    def start(
        self,
        source: Source,
        *,
        hypotheses: int,
        room: int,
        reorders: bool = True,
        fixed: bool = False,
    ) -> State:
        if room > self.config.longest:
            raise ConfigError(
                f"{room} target positions are asked for, the network has {self.config.longest}; "
                "lower --max-length"
            )
        memory = encode(self.net, self.config, source)
        own = _blank(self.config, memory, (len(source), hypotheses))
        return State(memory, own, torch.zeros_like(source.lengths_S))

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        memory, own, position_S = state.take()
        hidden_SKTD, own, attention = decode(
            self.net, self.config, tokens_SKT, position_S, memory=memory, own=own, want=want
        )
        return Output(hidden_SKTD, attention=attention), State(memory, own, position_S + tokens_SKT.shape[2])

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return layers.readout(self.product, self.weight_VD, hidden, only)

    def narrowed(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        return layers.narrowed(self.product, ids)
