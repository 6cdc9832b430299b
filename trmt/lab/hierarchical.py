"""Documents as source: words are encoded to sentence vectors, these to a document, and attention covers both.

Axes: N all words of a batch in a row, M all sentences in a row, S document, B sentence of a document,
L word of a document, Q queries, H heads, D hidden size.

The words of each sentence are encoded by themselves and pooled in a vector with a learned query; the vectors
of a document are encoded in turn (Yang et al., NAACL 2016). The decoder of trmt/nets/rnn.py starts from the
summary of the sentences. Attention weighs sentences and, within each, words, and the weight of a word is the
product of both (Nallapati et al., arXiv 1602.06023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.errors import ConfigError
from trmt.lab.rnn_attention import AnyAttention, RNNAttention, RNNAttentionConfig
from trmt.nets.base import EncoderMemory
from trmt.nets.layers import KEY_MULTIPLE
from trmt.nets.ragged import Ragged, Source
from trmt.nets.rnn import Attended, Attention, Encoded, Pooling, RecurrentStack, weighted_values


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(RNNAttentionConfig):
    """The sizes of a network for documents; each is a line of text, with a mark between its sentences."""

    mark: int = 4  # the token that ends a sentence: the id of the first `--placeholder` of the tokenizer
    sentence_layers: int = 1  # layers that encode the vectors of sentences

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mark >= self.source_vocabulary:
            raise ConfigError(
                f"mark = {self.mark} is no token of source_vocabulary = {self.source_vocabulary}; set "
                "network.mark to the id of the token between sentences"
            )
        if self.attention != "soft":
            raise ConfigError(
                f'attention = "{self.attention}" is for sentences, and architecture = "hierarchical" encodes '
                'documents; set attention = "soft"'
            )
        if self.context != "attention":
            raise ConfigError(
                f'context = "{self.context}" leaves architecture = "hierarchical" without attention; '
                'set context = "attention"'
            )


class HierarchicalAttention(AnyAttention):
    """Attention to sentences and, within each, to words."""

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config)
        self.sentences = AnyAttention(config)
        if config.heads > 1:
            del self.sentences.value  # only words have values

    def prepare_documents(
        self, words: tuple[Tensor, Tensor], sentences: tuple[Tensor, Tensor], number_SL: Tensor
    ) -> EncoderMemory:
        """Keys, values and masks of words and of sentences, which are states and masks of real ones."""
        memory = self.prepare(*words)
        above = self.sentences.prepare(*sentences)
        tensors = {
            **memory.tensors,
            "number": number_SL,
            "sentence_keys": above["keys"],
            "sentence_mask": above["mask"],
        }
        axes = {"number": (1, 0.0), "sentence_keys": (2, 0.0), "sentence_mask": (3, -math.inf)}
        return EncoderMemory(tensors, {**memory.source_axes, **axes})

    def attend(self, query_SQD: Tensor, position_SQ: Tensor, memory: EncoderMemory) -> Attended:
        sentence_score_SHQB = self.sentences.scores(query_SQD, memory["sentence_keys"])
        sentence_SHQB = (sentence_score_SHQB + memory["sentence_mask"]).softmax(-1)
        score_SHQL = self.scores(query_SQD, memory["keys"]) + memory["mask"]
        number_SHQL = memory["number"][:, None, None].expand_as(score_SHQL)
        weights_SHQL = softmax_within(score_SHQL, number_SHQL, sentence_SHQB.shape[-1])
        weights_SHQL = weights_SHQL * sentence_SHQB.gather(-1, number_SHQL)
        return Attended(weighted_values(weights_SHQL, memory), weights_SHQL)


def softmax_within(score_SHQL: Tensor, number_SHQL: Tensor, count: int) -> Tensor:
    """The softmax over the words of each sentence; `number_SHQL` says which sentence a word belongs to."""
    with torch.no_grad():  # subtracting the maximum does not change a softmax
        max_SHQB = score_SHQL.new_full((*score_SHQL.shape[:-1], count), -torch.inf)
        max_SHQB = max_SHQB.scatter_reduce(-1, number_SHQL, score_SHQL, "amax")
    share_SHQL = (score_SHQL - max_SHQB.gather(-1, number_SHQL)).exp()
    sentence_B = torch.arange(count, device=score_SHQL.device)
    member_SLB = number_SHQL[:, :1, 0, :, None] == sentence_B
    sum_SHQB = share_SHQL @ member_SLB.to(share_SHQL.dtype)
    return share_SHQL / sum_SHQB.gather(-1, number_SHQL)


class Hierarchical(RNNAttention):
    """A recurrent encoder-decoder for documents."""

    config: HierarchicalConfig
    config_class = HierarchicalConfig
    attention: HierarchicalAttention
    attention_class: type[Attention] = HierarchicalAttention

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config)
        direction = config.encoder_direction
        self.sentence_encoder = RecurrentStack(config, config.d_model, config.sentence_layers, direction)
        self.sentence_pooling = Pooling(config.d_model)

    def encode(self, source: Source) -> Encoded:
        multiple = 1 if self.training else KEY_MULTIPLE
        sentences, documents = split_documents(source, self.config.mark)
        ids_ML, real_ML = sentences.padded(multiple)
        words_MLD = self.encoder.encode(self.dropout(self.source_embedding(ids_ML)), real_ML)
        pooled_MD = self.sentence_pooling(words_MLD, real_ML)
        _, real_SB = documents.padded(multiple)
        states_SBD = self.sentence_encoder.encode(in_grid(pooled_MD, documents, real_SB), real_SB)
        _, real_SL = source.padded(multiple)
        words_ND = words_MLD.flatten(0, 1)[sentences.cells_N(ids_ML.shape[1])]
        number_N = torch.repeat_interleave(documents.positions_N(), sentences.lengths_S)
        number_SL = in_grid(number_N[:, None], source, real_SL)[..., 0]
        words = in_grid(words_ND, source, real_SL), real_SL
        memory = self.attention.prepare_documents(words, (states_SBD, real_SB), number_SL)
        return self.begin(states_SBD, real_SB, memory)


def split_documents(source: Ragged, mark: int) -> tuple[Ragged, Ragged]:
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


def in_grid(x_ND: Tensor, rows: Ragged, real_SL: Tensor) -> Tensor:
    """Packed vectors in a grid, with zeros behind each row."""
    grid = x_ND.new_zeros(real_SL.numel(), x_ND.shape[1])
    return grid.index_copy(0, rows.cells_N(real_SL.shape[1]), x_ND).unflatten(0, real_SL.shape)
