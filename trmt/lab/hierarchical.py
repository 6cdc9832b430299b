"""Documents as source: words become sentence vectors, these a document, and attention asks both.

Axes: N all words of a batch in a row, M all sentences in a row, S document, B sentence of a document,
L word of a document, Q queries, H heads, D width.

The words of each sentence are read by themselves and pooled into a vector with a learned query; the
vectors of a document are read in turn (Yang et al., NAACL 2016). The decoder of trmt/nets/rnn.py starts from
what the sentences sum up to. A look weighs sentences and, within each, words, and a word's weight is the
product of both (Nallapati et al., arXiv 1602.06023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.errors import ConfigError
from trmt.nets import focus, layers, rnn, scores
from trmt.nets.base import Memory, Ragged, Source
from trmt.nets.focus import Glance, Pooling
from trmt.nets.recurrent import Cells
from trmt.nets.scores import Similarity


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(rnn.RNNConfig):
    """The sizes of a network for documents; each is a line of text, with a mark between its sentences."""

    # The piece that ends a sentence: the id of the first `--placeholder` that a tokenizer is given.
    mark: int = 4
    sentence_layers: int = 1  # that read the vectors of sentences

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mark >= self.source_vocabulary:
            raise ConfigError(
                f"mark = {self.mark} is no piece of source_vocabulary = {self.source_vocabulary}; set "
                "network.mark to the id of the piece between sentences"
            )
        if self.focus != "soft":
            raise ConfigError(
                f'focus = "{self.focus}" is for sentences, and architecture = "hierarchical" reads '
                'documents; set focus = "soft"'
            )
        if self.context != "attention":
            raise ConfigError(
                f'context = "{self.context}" leaves nothing to look at in architecture = "hierarchical"; '
                'set context = "attention"'
            )


def divided(source: Ragged, mark: int) -> tuple[Ragged, Ragged]:
    """The sentences of all documents, each ending with a mark or its document; and documents of sentences.

    The ids of the second are the numbers of sentences in the first.
    """
    document_ends_S = source.lengths_S.cumsum(0)
    ends_N = source.ids_N == mark
    ends_N[document_ends_S - 1] = True
    lengths_M = F.pad(ends_N.nonzero()[:, 0] + 1, (1, 0)).diff()
    counts_S = F.pad(ends_N.cumsum(0)[document_ends_S - 1], (1, 0)).diff()
    number_M = torch.arange(len(lengths_M), device=lengths_M.device)
    return (
        Ragged(source.ids_N, lengths_M, int(lengths_M.max())),
        Ragged(number_M, counts_S, int(counts_S.max())),
    )


def _set_out(x_ND: Tensor, rows: Ragged, real_SL: Tensor) -> Tensor:
    """A row of vectors in a grid with zeros behind each row."""
    grid = x_ND.new_zeros(real_SL.numel(), x_ND.shape[1])
    return grid.index_copy(0, rows.cells_N(real_SL.shape[1]), x_ND).unflatten(0, real_SL.shape)


@focus.steady
def look(
    net: Any, config: HierarchicalConfig, query_SQD: Tensor, position_SQ: Tensor, memory: Memory
) -> Glance:
    """Look at sentences and, within each, at words."""
    above_SHQB = scores.scores(net.above, config.score, query_SQD, memory["above_keys"])
    sentence_SHQB = (above_SHQB + memory["above_mask"]).softmax(-1)
    score_SHQL = scores.scores(net.attention.similarity, config.score, query_SQD, memory["keys"])
    score_SHQL = score_SHQL + memory["mask"]
    number_SHQL = memory["number"][:, None, None].expand_as(score_SHQL)
    weights_SHQL = within(score_SHQL, number_SHQL, sentence_SHQB.shape[-1])
    weights_SHQL = weights_SHQL * sentence_SHQB.gather(-1, number_SHQL)
    context_SQD = (weights_SHQL.to(memory["values"].dtype) @ memory["values"]).transpose(1, 2).flatten(2)
    return Glance(context_SQD, weights_SHQL)


def within(score_SHQL: Tensor, number_SHQL: Tensor, count: int) -> Tensor:
    """The softmax over the words of each sentence; `number_SHQL` says which one a word belongs to."""
    with torch.no_grad():  # what is taken off a softmax changes nothing
        most_SHQB = score_SHQL.new_full((*score_SHQL.shape[:-1], count), -torch.inf)
        most_SHQB = most_SHQB.scatter_reduce(-1, number_SHQL, score_SHQL, "amax")
    share_SHQL = (score_SHQL - most_SHQB.gather(-1, number_SHQL)).exp()
    sentence_B = torch.arange(count, device=score_SHQL.device)
    member_SLB = number_SHQL[:, :1, 0, :, None] == sentence_B
    sum_SHQB = share_SHQL @ member_SLB.to(share_SHQL.dtype)
    return share_SHQL / sum_SHQB.gather(-1, number_SHQL)


class Hierarchical(rnn.RNN):
    """The network as it is trained."""

    config_class = HierarchicalConfig
    look = staticmethod(look)

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config)
        self.sentences = self.reader(config.sentence_layers)
        self.gathering = Pooling(config.width)
        self.above = Similarity(config.score, config.width, config.heads, config.longest)

    @staticmethod
    def read(net: Any, config: Any, source: Source) -> tuple[Memory, list[Cells]]:
        """What the decoder sees of documents, and the cells it starts with."""
        multiple = layers.key_multiple(net)
        sentences, vectors = divided(source, config.mark)
        ids_ML, real_ML = sentences.padded(multiple)
        x_MLD = net.drop(F.embedding(ids_ML, net.source_embedding.weight))
        words_MLD = net.encoder.read(x_MLD, real_ML)
        pooled_MD = focus.pooled(net.gathering, words_MLD, real_ML)
        _, real_SB = vectors.padded(multiple)
        states_SBD = net.sentences.read(_set_out(pooled_MD, vectors, real_SB), real_SB)
        _, real_SL = source.padded(multiple)
        words_ND = words_MLD.flatten(0, 1)[sentences.cells_N(ids_ML.shape[1])]
        number_N = torch.repeat_interleave(vectors.positions_N(), sentences.lengths_S)
        number_SL = _set_out(number_N[:, None], source, real_SL)[..., 0]
        tensors, along = focus.prepared(net.attention, config, _set_out(words_ND, source, real_SL), real_SL)
        tensors["number"], along["number"] = number_SL, (1, 0)
        tensors["above_keys"] = scores.keys(net.above, config.score, states_SBD, config.heads)
        tensors["above_mask"] = layers.blocked(real_SB)[:, None, None]
        along["above_keys"], along["above_mask"] = (2, 0.0), (3, -math.inf)
        return rnn.begin(net, config, look, states_SBD, real_SB, Memory(tensors, along))
