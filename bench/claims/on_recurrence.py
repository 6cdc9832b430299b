"""Claims about recurrent networks, attention, speed and memory."""

from __future__ import annotations

from claims.asking import BLEU, Claim, difference, keeps, score, times
from claims.scale import Scale
from claims.verdicts import Contrast

SHORT, MIDDLE = 16, 32  # tokens of a sentence


def _rate(kind: str, system: str, length: int) -> str:
    return f"{kind}/{system}/{length}"


def _slower(kind: str, system: str, long: int, sign: int = 1) -> tuple[tuple[int, str], ...]:
    return ((sign, _rate(kind, system, SHORT)), (-sign, _rate(kind, system, long)))


def _grows(system: str) -> tuple[tuple[int, str], ...]:
    return ((1, _rate("memory", system, 1024)), (-1, _rate("memory", system, 512)))


def claims(scale: Scale) -> tuple[Claim, ...]:
    """All of them, in the order of the page."""
    speed = (_serial(scale.lengths[-1]), _translating(scale.lengths[-1]), _quadratic())
    return (_fading(scale), *_one_vector(), *_similarity(), *_focus(), *speed)


def _fading(scale: Scale) -> Claim:
    short, long = str(scale.shorter[0]), str(scale.shorter[-1])
    return Claim(
        name="fading",
        title="Quality of long sentences",
        says="A network that encodes a sentence in one vector gets worse with the length of the sentence; "
        "with attention it does not.",
        source="Cho et al. 2014 (arXiv 1409.1259), Bahdanau et al. 2015 (arXiv 1409.0473)",
        figure="length",
        contrasts=(
            keeps(
                f"from {short} to {long} concatenated sentences, attention keeps a larger share of its BLEU "
                "than one vector",
                "additive",
                "fixed",
                short=short,
                long=long,
            ),
            Contrast(
                asks=f"with attention, {long} concatenated sentences are translated as well as {short}",
                terms=((1, score("additive", short)), (-1, score("additive", long))),
                expects="same",
                margin=BLEU,
                unit="BLEU",
            ),
            difference("attention is better on the shortest sentences, too", "additive", "fixed", what=short),
        ),
    )


def _one_vector() -> tuple[Claim, ...]:
    return (
        Claim(
            name="every-step",
            title="Context vector at every step",
            says="A decoder that gets the context vector at every step is better than one that only starts "
            "from it.",
            source="Cho et al. 2014 (arXiv 1406.1078), compared with Sutskever et al. 2014 (arXiv 1409.3215)",
            figure="systems",
            contrasts=(difference("at every step versus once", "fixed-every", "fixed"),),
        ),
        Claim(
            name="dynamic",
            title="Attention at every step",
            says="Attention is better because it is computed at every step, and not because the summary is "
            "weighted.",
            source="Bahdanau et al. 2015 (arXiv 1409.0473)",
            figure="systems",
            contrasts=(
                difference("attention at every step versus once", "additive", "static"),
                difference("attention once versus no attention", "static", "fixed"),
            ),
        ),
        Claim(
            name="all-you-need",
            title="Attention instead of recurrence",
            says="Networks without recurrence reach better translations in the same number of steps.",
            source="Vaswani et al. 2017 (arXiv 1706.03762), Gehring et al. 2017 (arXiv 1705.03122)",
            figure="systems",
            contrasts=(
                difference("Transformer versus recurrent network", "transformer", "additive"),
                difference("convolutional versus recurrent network", "conv", "additive"),
                difference("attention after the step versus before it", "additive", "rnnsearch"),
            ),
            note="All have the same hidden size, but different numbers of parameters: see the last table.",
        ),
    )


def _similarity() -> tuple[Claim, ...]:
    return (
        Claim(
            name="additive-or-dot",
            title="Additive or dot-product scores",
            says="Additive and dot-product attention are equally good for small hidden sizes, where the dot "
            "product is cheaper.",
            source="Vaswani et al. 2017, section 3.2.1; Britz et al. 2017 (arXiv 1703.03906)",
            figure="similarity",
            contrasts=(
                difference("additive versus dot", "additive", "dot", expects="same"),
                difference("additive versus scaled dot", "additive", "scaled", expects="same"),
                difference("additive versus cosine", "additive", "cosine", expects="same"),
            ),
        ),
        Claim(
            name="general",
            title="Bilinear scores",
            says="The bilinear score learns better than the plain dot product.",
            source="Luong et al. 2015 (arXiv 1508.04025), section 4.4",
            figure="similarity",
            contrasts=(difference("general versus dot", "general", "dot"),),
        ),
        Claim(
            name="location",
            title="Content or position",
            says="Attention depends on content: a score of the position alone is worse.",
            source="Luong et al. 2015 (arXiv 1508.04025), section 4.4",
            figure="similarity",
            contrasts=(difference("general versus location", "general", "location"),),
        ),
    )


def _focus() -> tuple[Claim, ...]:
    return (
        Claim(
            name="local",
            title="Local attention",
            says="Local attention with a predicted window is better than global attention.",
            source="Luong et al. 2015 (arXiv 1508.04025), section 4.4",
            figure="focus",
            contrasts=(
                difference("predicted window versus global attention", "predictive", "additive"),
                difference("predicted versus monotonic window", "predictive", "monotonic"),
            ),
        ),
        Claim(
            name="hard",
            title="Soft or hard attention",
            says="Hard attention is not differentiable, so it is harder to learn.",
            source="Xu et al. 2015 (arXiv 1502.03044), Luong et al. 2015, section 3.1",
            figure="focus",
            contrasts=(
                difference("soft versus sampled (REINFORCE)", "additive", "sampled"),
                difference("soft versus Gumbel (straight-through)", "additive", "gumbel"),
                difference("in a Transformer: soft versus hard", "transformer", "hard-cross"),
            ),
        ),
    )


def _serial(long: int) -> Claim:
    return Claim(
        name="serial",
        title="Recurrence is sequential",
        says="A recurrent network processes a sentence token by token, so training slows down with length; "
        "attention processes all tokens at once.",
        source="Vaswani et al. 2017 (arXiv 1706.03762), section 4 and table 1",
        figure="speed",
        contrasts=(
            times(
                f"from {SHORT} to {long} tokens, the recurrent network slows down more than the Transformer",
                *_slower("train", "additive", long),
                *_slower("train", "transformer", long, -1),
            ),
            times(
                f"the Transformer trains as fast at {long} tokens as at {SHORT}",
                *_slower("train", "transformer", long),
                expects="same",
            ),
            times(
                f"at {MIDDLE} tokens, the Transformer trains faster",
                (1, _rate("train", "transformer", MIDDLE)),
                (-1, _rate("train", "additive", MIDDLE)),
            ),
        ),
        note="Steps have the same number of tokens at every length. Parallelism has the largest effect on "
        "parallel hardware; this is one core of a CPU.",
    )


def _translating(long: int) -> Claim:
    return Claim(
        name="translating",
        title="Cost of self-attention in decoding",
        says="A decoding step of a recurrent network costs the same at every position, while a Transformer "
        "attends to everything decoded so far.",
        source="Vaswani et al. 2017, table 1; Kasai et al. 2021 (arXiv 2006.10369)",
        figure="speed",
        contrasts=(
            times(
                f"from {SHORT} to {long} tokens, the Transformer slows down more than a recurrent "
                "network without attention",
                *_slower("translate", "transformer", long),
                *_slower("translate", "fixed", long, -1),
            ),
            times(
                "it slows down more than a recurrent network with attention",
                *_slower("translate", "transformer", long),
                *_slower("translate", "additive", long, -1),
            ),
            times(
                f"at {MIDDLE} tokens, the recurrent network with attention is faster",
                (1, _rate("translate", "additive", MIDDLE)),
                (-1, _rate("translate", "transformer", MIDDLE)),
            ),
        ),
    )


def _quadratic() -> Claim:
    return Claim(
        name="quadratic",
        title="Attention memory is quadratic",
        says="Attention needs memory that grows with the square of the length.",
        source="Vaswani et al. 2017, table 1; repeated by every paper on long inputs",
        figure="memory",
        contrasts=(
            times(
                "in a Transformer, 1,024 tokens take more than twice the memory of 512",
                *_grows("transformer"),
                at_least=2.2,
            ),
            times(
                "in one attention that stores its weights, they take more than twice as much",
                *_grows("as written"),
                at_least=2.2,
            ),
            times(
                "in a recurrent network with additive attention, they take more than twice as much",
                *_grows("additive"),
                at_least=2.2,
            ),
        ),
        note="The matrix of attention weights is quadratic, but need not be stored: a kernel can compute it "
        "in blocks (Dao et al. 2022, arXiv 2205.14135), as trmt's does. Additive attention stores a vector "
        "where others store a number. The time remains quadratic.",
    )
