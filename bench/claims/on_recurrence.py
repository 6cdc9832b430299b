"""What is said of recurrent networks, of attention, and of speed and memory."""

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
        title="One vector fades, attention does not",
        says="A network that squeezes a sentence into one vector gets worse the longer the sentence is; "
        "with attention it does not.",
        source="Cho et al. 2014 (arXiv 1409.1259), Bahdanau et al. 2015 (arXiv 1409.0473)",
        figure="length",
        contrasts=(
            keeps(
                f"of the BLEU at {short}, attention keeps a larger share at {long} sentences in a row "
                "than one vector",
                "additive",
                "fixed",
                short=short,
                long=long,
            ),
            Contrast(
                asks=f"with attention {long} in a row are translated as well as {short}",
                terms=((1, score("additive", short)), (-1, score("additive", long))),
                expects="same",
                margin=BLEU,
                unit="BLEU",
            ),
            difference("attention is better on the shortest too", "additive", "fixed", what=short),
        ),
    )


def _one_vector() -> tuple[Claim, ...]:
    return (
        Claim(
            name="every-step",
            title="The vector at each step",
            says="A decoder that sees the vector at every step does better than one that starts from it.",
            source="Cho et al. 2014 (arXiv 1406.1078) beside Sutskever et al. 2014 (arXiv 1409.3215)",
            figure="systems",
            contrasts=(difference("at every step against once", "fixed-every", "fixed"),),
        ),
        Claim(
            name="dynamic",
            title="Looking anew for each word",
            says="It is looking anew at every step that makes attention what it is, not that the summary is "
            "weighted.",
            source="Bahdanau et al. 2015 (arXiv 1409.0473)",
            figure="systems",
            contrasts=(
                difference("a look at each step against one look", "additive", "static"),
                difference("one look against no look", "static", "fixed"),
            ),
        ),
        Claim(
            name="all-you-need",
            title="Attention instead of recurrence",
            says="Networks without recurrence reach better translations in the same number of steps.",
            source="Vaswani et al. 2017 (arXiv 1706.03762), Gehring et al. 2017 (arXiv 1705.03122)",
            figure="systems",
            contrasts=(
                difference("Transformer against recurrent network", "transformer", "additive"),
                difference("convolutions against recurrent network", "conv", "additive"),
                difference("looking after the step against before it", "additive", "rnnsearch"),
            ),
            note="All are equally wide, so they are of unequal size: the last table has the parameters.",
        ),
    )


def _similarity() -> tuple[Claim, ...]:
    return (
        Claim(
            name="additive-or-dot",
            title="Additive or dot product",
            says="Additive and dot-product attention are equally good at a small width, where the dot "
            "product is cheaper.",
            source="Vaswani et al. 2017, section 3.2.1; Britz et al. 2017 (arXiv 1703.03906)",
            figure="similarity",
            contrasts=(
                difference("additive against dot", "additive", "dot", expects="same"),
                difference("additive against scaled dot", "additive", "scaled", expects="same"),
                difference("additive against cosine", "additive", "cosine", expects="same"),
            ),
        ),
        Claim(
            name="general",
            title="A matrix between query and key",
            says="The bilinear score learns better than the plain dot product.",
            source="Luong et al. 2015 (arXiv 1508.04025), section 4.4",
            figure="similarity",
            contrasts=(difference("general against dot", "general", "dot"),),
        ),
        Claim(
            name="location",
            title="Content, not only place",
            says="Where to look is told by what stands there: a score of the place alone does worse.",
            source="Luong et al. 2015 (arXiv 1508.04025), section 4.4",
            figure="similarity",
            contrasts=(difference("general against location", "general", "location"),),
        ),
    )


def _focus() -> tuple[Claim, ...]:
    return (
        Claim(
            name="local",
            title="A window is better than everything",
            says="Local attention with a predicted window beats global attention.",
            source="Luong et al. 2015 (arXiv 1508.04025), section 4.4",
            figure="focus",
            contrasts=(
                difference("predicted window against everything", "predictive", "additive"),
                difference("predicted window against one that moves along", "predictive", "monotonic"),
            ),
        ),
        Claim(
            name="hard",
            title="Soft attention learns, hard attention struggles",
            says="Attention to one place cannot be differentiated, so it is harder to learn.",
            source="Xu et al. 2015 (arXiv 1502.03044), Luong et al. 2015, section 3.1",
            figure="focus",
            contrasts=(
                difference("soft against drawn places, REINFORCE", "additive", "sampled"),
                difference("soft against Gumbel's straight-through", "additive", "gumbel"),
                difference("in a Transformer: soft against hard", "transformer", "hard-cross"),
            ),
        ),
    )


def _serial(long: int) -> Claim:
    return Claim(
        name="serial",
        title="Recurrence is serial",
        says="A recurrent network must read word by word, so training slows down with length; attention "
        "sees all words at once.",
        source="Vaswani et al. 2017 (arXiv 1706.03762), section 4 and table 1",
        figure="speed",
        contrasts=(
            times(
                f"from {SHORT} to {long} tokens the recurrent network slows down by more than the "
                "Transformer",
                *_slower("train", "additive", long),
                *_slower("train", "transformer", long, -1),
            ),
            times(
                f"the Transformer trains as fast at {long} tokens as at {SHORT}",
                *_slower("train", "transformer", long),
                expects="same",
            ),
            times(
                f"at {MIDDLE} tokens the Transformer trains faster",
                (1, _rate("train", "transformer", MIDDLE)),
                (-1, _rate("train", "additive", MIDDLE)),
            ),
        ),
        note="Steps hold the same number of tokens at every length. Whatever is done at once pays most "
        "where a machine can do much at once; here it is one core of a CPU.",
    )


def _translating(long: int) -> Claim:
    return Claim(
        name="translating",
        title="Translating, attention pays for its memory",
        says="Word by word, a recurrent network's step costs the same however far it has come, while a "
        "Transformer looks back at everything it has written.",
        source="Vaswani et al. 2017, table 1; Kasai et al. 2021 (arXiv 2006.10369)",
        figure="speed",
        contrasts=(
            times(
                f"from {SHORT} to {long} tokens the Transformer slows down by more than a recurrent "
                "network without attention",
                *_slower("translate", "transformer", long),
                *_slower("translate", "fixed", long, -1),
            ),
            times(
                "it slows down by more than a recurrent network with attention",
                *_slower("translate", "transformer", long),
                *_slower("translate", "additive", long, -1),
            ),
            times(
                f"at {MIDDLE} tokens the recurrent network with attention is the faster one",
                (1, _rate("translate", "additive", MIDDLE)),
                (-1, _rate("translate", "transformer", MIDDLE)),
            ),
        ),
    )


def _quadratic() -> Claim:
    return Claim(
        name="quadratic",
        title="Attention's memory is quadratic",
        says="Attention needs memory that grows with the square of the length.",
        source="Vaswani et al. 2017, table 1; repeated by every paper on long inputs",
        figure="memory",
        contrasts=(
            times(
                "of a Transformer, 1,024 tokens take more than twice the memory of 512",
                *_grows("transformer"),
                at_least=2.2,
            ),
            times(
                "of one attention, as the formula is written, they take more than twice as much",
                *_grows("as written"),
                at_least=2.2,
            ),
            times(
                "of a recurrent network with additive attention they take more than twice as much",
                *_grows("additive"),
                at_least=2.2,
            ),
        ),
        note="What grows with the square is the matrix of weights. Nothing in the result needs that "
        "matrix: a kernel can go over it in blocks and forget them (Dao et al. 2022, arXiv 2205.14135), "
        "as trmt's does. Additive attention keeps a vector where others keep a number. In time, the "
        "square remains.",
    )
