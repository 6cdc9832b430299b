from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.fakes import VOCABULARY
from trmt.errors import ConfigError
from trmt.lab.denoising import Denoising, DenoisingConfig, mask_spans
from trmt.lab.masked import Masked, MaskedConfig
from trmt.lab.masked_encoder import MaskedEncoder, MaskedEncoderConfig
from trmt.objectives.base import Specials
from trmt.sets.batches import RaggedBatch
from trmt.sets.shards import RaggedArray

CPU = torch.device("cpu")
BEGINS = np.arange(VOCABULARY) % 3 == 0
SPECIALS = Specials(bos=2, eos=3, unk=1, vocabulary=VOCABULARY, begins_word=BEGINS)


def examples(count: int = 8, *, longest: int = 30, second: bool = True) -> RaggedBatch:
    generator = np.random.default_rng(1)

    def column(most: int) -> RaggedArray:
        lengths = generator.integers(1, most + 1, count) if most else np.zeros(count, np.int64)
        return RaggedArray(generator.integers(4, VOCABULARY, int(lengths.sum())), lengths)

    ones = np.ones(count, np.int64)
    first = column(longest)
    return RaggedBatch(
        {
            "first.ids": first,
            "second.ids": column(longest * second),
            "sizes": RaggedArray(first.lengths, ones),
            "follows": RaggedArray(generator.integers(0, 2, count), ones),
            "key": RaggedArray(generator.integers(0, 1 << 60, count).astype(np.uint64), ones),
        }
    )


def masked(**options: Any) -> Masked:
    return Masked(MaskedConfig(**options), SPECIALS)


def encoder(**options: Any) -> MaskedEncoder:
    torch.manual_seed(2)
    sizes = {"d_model": 16, "heads": 2, "feed_forward": 32, "encoder_layers": 2, "max_positions": 96}
    return MaskedEncoder(MaskedEncoderConfig(source_vocabulary=VOCABULARY, **{**sizes, **options})).eval()


def test_an_example_is_two_segments_between_special_tokens() -> None:
    some = RaggedBatch(
        {
            "first.ids": RaggedArray(np.array([5, 6, 7]), np.array([2, 1])),
            "second.ids": RaggedArray(np.array([8, 9, 10]), np.array([1, 2])),
            "follows": RaggedArray(np.array([1, 0]), np.array([1, 1])),
            "key": RaggedArray(np.array([11, 12], np.uint64), np.array([1, 1])),
        }
    )
    batch = masked(masked=0.0, random=0.0).collate(some, CPU)
    assert batch.source.ids_N.tolist() == [2, 5, 6, 3, 8, 3, 2, 7, 3, 9, 10, 3]
    assert batch.source.extras["segments"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert batch.source.lengths_S.tolist() == [6, 6]
    assert batch.starts_S.tolist() == [0, 6]
    assert batch.next_S is not None and batch.next_S.tolist() == [0, 1]


def test_a_share_of_the_tokens_is_selected_and_most_of_it_masked() -> None:
    some = examples(400, longest=60)
    batch = masked().collate(some, CPU)
    lengths = some.columns["first.ids"].lengths + some.columns["second.ids"].lengths
    assert batch.tokens == sum(max(1, round(0.15 * int(n))) for n in lengths) == masked().tokens(some)
    shown = batch.source.ids_N[batch.selected_N]
    assert (shown == 1).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == batch.tokens_N).float().mean() == pytest.approx(0.1 + 0.1 / 19, abs=0.02)
    assert int(batch.tokens_N.min()) >= 4, "special tokens are never selected"
    others = shown[(shown != 1) & (shown != batch.tokens_N)]
    assert set(others.tolist()) == set(range(4, VOCABULARY)), "replacements are all tokens but special ones"


def test_tokens_that_are_not_selected_stay() -> None:
    batch = masked().collate(examples(), CPU)
    plain = masked(masked=0.0, random=0.0).collate(examples(), CPU)
    untouched = torch.ones(len(batch.source.ids_N), dtype=torch.bool)
    untouched[batch.selected_N] = False
    assert torch.equal(batch.source.ids_N[untouched], plain.source.ids_N[untouched])
    assert torch.equal(plain.source.ids_N[batch.selected_N], batch.tokens_N)


def test_whole_words_are_selected() -> None:
    some = examples(100)
    batch = masked(whole_words=True).collate(some, CPU)
    ids = masked(masked=0.0, random=0.0).collate(some, CPU).source.ids_N.numpy()
    selected = np.zeros(len(ids), bool)
    selected[batch.selected_N.numpy()] = True
    for position in range(1, len(ids)):
        same_word = ids[position] >= 4 and ids[position - 1] >= 4 and not BEGINS[ids[position]]
        assert not same_word or selected[position] == selected[position - 1]
    assert masked(whole_words=True).tokens(some) == batch.tokens
    assert 0.1 < batch.tokens / int((ids >= 4).sum()) < 0.2


@pytest.mark.parametrize("whole_words", [True, False])
def test_an_example_is_masked_the_same_whatever_is_beside_it(whole_words: bool) -> None:
    objective, some = masked(whole_words=whole_words), examples()
    whole = objective.collate(some, CPU)
    parts = [objective.collate(some.slice(n, n + 1), CPU) for n in range(len(some))]
    assert torch.equal(whole.source.ids_N, torch.cat([part.source.ids_N for part in parts]))
    assert torch.equal(whole.tokens_N, torch.cat([part.tokens_N for part in parts]))


def test_the_loss_is_the_sum_of_both_losses_over_examples() -> None:
    net, objective, some = encoder(), masked(next_weight=3.0), examples()
    whole = objective.loss(net, objective.collate(some, CPU))
    batch = objective.collate(some, CPU)
    hidden = net(batch.source).hidden
    masked_loss = F.cross_entropy(net.readout(hidden[batch.selected_N]), batch.tokens_N, reduction="sum")
    assert batch.next_S is not None
    logits = net.next_sentence_logits(hidden[batch.starts_S])
    next_loss = F.cross_entropy(logits, batch.next_S, reduction="sum")
    torch.testing.assert_close(whole.total, masked_loss + 3 * next_loss)
    torch.testing.assert_close(whole.nll, masked_loss.detach())
    right = [one.index(max(one)) == true for one, true in zip(logits.tolist(), batch.next_S, strict=True)]
    assert whole.right is not None and (int(whole.right), whole.questions) == (sum(right), len(some))
    parts = [objective.loss(net, objective.collate(some.slice(n, n + 2), CPU)) for n in range(0, 8, 2)]
    torch.testing.assert_close(whole.total, torch.stack([part.total for part in parts]).sum())
    whole.total.backward()
    assert not [name for name, parameter in net.named_parameters() if parameter.grad is None]


def test_without_next_sentences_there_is_one_segment() -> None:
    batch = masked(next_sentence=False).collate(examples(second=False), CPU)
    assert batch.next_S is None
    assert not batch.source.extras["segments"].any()


@pytest.mark.parametrize("options", [{}, {"norm_position": "pre", "norm": "rms", "positions": "rotary"}])
def test_neighbours_change_nothing_and_segments_count(options: dict[str, Any]) -> None:
    net, some = encoder(**options), examples()
    objective = masked()
    with torch.inference_mode():
        whole = net(objective.collate(some, CPU).source).hidden
        alone = [net(objective.collate(some.slice(n, n + 1), CPU).source).hidden for n in range(len(some))]
        torch.testing.assert_close(whole, torch.cat(alone), atol=2e-5, rtol=1e-4)
        source = objective.collate(some, CPU).source
        other = type(source)(source.ids_N, source.lengths_S, source.longest, {})
        assert not torch.allclose(net(other).hidden, whole), "segments count"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rate": 0.0}, r"loss\.rate"),
        ({"masked": 0.8, "random": 0.3}, r"loss\.random = 0\.3"),
        ({"next_weight": -1.0}, r"loss\.next_weight"),
    ],
)
def test_impossible_masking_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        MaskedConfig(**options)


# Denoising


def denoising(**options: Any) -> Denoising:
    return Denoising(DenoisingConfig(**options), SPECIALS)


def test_the_target_is_the_text_and_the_source_a_corrupted_copy() -> None:
    some = examples(100, second=False)
    batch = denoising().collate(some, CPU)
    text = some.columns["first.ids"]
    ends = np.cumsum(text.lengths)
    assert batch.after_N.tolist() == np.insert(text.values, ends, 3).tolist()
    assert batch.tokens == denoising().tokens(some) == len(batch.after_N)
    masks = (batch.source.ids_N == 1).sum()
    kept = len(batch.source.ids_N) - int(masks) - 100
    assert kept / len(text.values) == pytest.approx(0.7, abs=0.02)
    assert (batch.source.lengths_S <= torch.from_numpy(text.lengths) + 2).all()


def test_spans_are_replaced_by_one_mask_each_and_the_rest_stays() -> None:
    text = np.arange(100, 400)
    lengths = []
    for seed in range(50):
        out = mask_spans(text, 0.3, 3.0, 1, np.random.default_rng(seed)).tolist()
        rest = [token for token in out if token != 1]
        assert rest == sorted(set(rest)) and len(rest) == 210
        assert not any(one == other == 1 for one, other in pairwise(out))
        edges = [99, *out, 400]
        lengths += [edges[n + 1] - edges[n - 1] - 1 for n in range(1, len(edges) - 1) if edges[n] == 1]
    assert sum(lengths) == 50 * 90
    assert np.mean(lengths) == pytest.approx(3, abs=0.2)
    assert 0 in lengths, "a mask may replace nothing"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_short_texts_can_be_corrupted(size: int) -> None:
    for seed in range(30):
        out = mask_spans(np.arange(10, 10 + size), 0.9, 0.5, 1, np.random.default_rng(seed))
        assert len(out) <= size + 1


def test_sentences_are_shuffled() -> None:
    objective = denoising(rate=0.0)
    text, sizes = np.arange(10, 40), np.array([10, 5, 15])
    found = {tuple(objective.corrupt(text, sizes, key)) for key in range(60)}
    assert len(found) == 6
    assert all(sorted(one) == text.tolist() for one in found)


def test_noise_depends_on_the_key_alone() -> None:
    some = examples(second=False)
    whole = denoising().collate(some, CPU).source.ids_N
    parts = [denoising().collate(some.slice(n, n + 1), CPU).source.ids_N for n in range(len(some))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"rate": 1.0}, "rate"), ({"span": 0.0}, "span"), ({"rate": 0.0, "shuffle": False}, "shuffle")],
)
def test_impossible_noise_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss\.{expected}"):
        DenoisingConfig(**options)
