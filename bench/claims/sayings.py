"""The claims: what people repeat, who said it, and which measured values would bear it out.

The first contrast of a claim gives its verdict; the others are what one would ask next, each with a verdict
of its own. Names of values are made by the functions below; `evidence` looks them up in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from claims.scale import SCALES, Scale
from claims.verdicts import Contrast

BLEU = 2.0  # points: with so few steps, less than this is not worth talking about
TIMES = 1.1  # the same of speed, as a factor


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What people repeat."""

    name: str
    title: str
    says: str
    source: str
    contrasts: tuple[Contrast, ...]
    figure: str = ""  # the name of the picture it is shown in
    note: str = ""  # what is true whatever comes out


def score(system: str, what: str = "all", metric: str = "bleu") -> str:
    """The name of a score: on all test sets that are no longer than training, or on one of them."""
    return f"{metric}/{system}/{what}"


def difference(
    asks: str, more: str, less: str, *, what: str = "all", expects: Any = "more", margin: float = BLEU
) -> Contrast:
    """How much more BLEU the first system has than the second."""
    return Contrast(
        asks=asks,
        terms=((1, score(more, what)), (-1, score(less, what))),
        expects=expects,
        margin=margin,
        unit="BLEU",
    )


def keeps(asks: str, more: str, less: str, *, short: str, long: str) -> Contrast:
    """How many times as large a share of its BLEU the first keeps, from short to long examples."""
    terms = (
        (1, score(more, long)),
        (-1, score(more, short)),
        (-1, score(less, long)),
        (1, score(less, short)),
    )
    return times(asks, *terms)


def times(
    asks: str, *terms: tuple[float, str], expects: Any = "more", margin: float = TIMES, at_least: float = 1.0
) -> Contrast:
    """A product of rates or sizes, each to the power of its weight."""
    return Contrast(asks=asks, terms=terms, expects=expects, margin=margin, unit="times", at_least=at_least)


def exact(asks: str, name: str, *, within: float) -> Contrast:
    """Whether a computed difference is nothing but rounding."""
    return Contrast(asks=asks, terms=((1, name),), expects="same", margin=within, unit="")


def claims(scale: Scale) -> tuple[Claim, ...]:
    """All of them, in the order of the page."""
    return (
        *_one_vector(scale),
        *_similarity(),
        *_focus(),
        *_speed(scale),
        *_positions(scale),
        *_parts_of_a_transformer(),
        *_training(),
        *_starts(),
    )


def _one_vector(scale: Scale) -> tuple[Claim, ...]:
    short, long = str(scale.shorter[0]), str(scale.shorter[-1])
    return (
        Claim(
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
        ),
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


def _speed(scale: Scale) -> tuple[Claim, ...]:
    if not scale.lengths:
        return ()
    short, long = 16, scale.lengths[-1]

    def rate(kind: str, system: str, length: int) -> str:
        return f"{kind}/{system}/{length}"

    def slower(kind: str, system: str, sign: int = 1) -> tuple[tuple[int, str], ...]:
        return ((sign, rate(kind, system, short)), (-sign, rate(kind, system, long)))

    def grows(system: str) -> tuple[tuple[int, str], ...]:
        return ((1, rate("memory", system, 1024)), (-1, rate("memory", system, 512)))

    return (
        Claim(
            name="serial",
            title="Recurrence is serial",
            says="A recurrent network must read word by word, so training slows down with length; attention "
            "sees all words at once.",
            source="Vaswani et al. 2017 (arXiv 1706.03762), section 4 and table 1",
            figure="speed",
            contrasts=(
                times(
                    f"from {short} to {long} tokens the recurrent network slows down by more than the "
                    "Transformer",
                    *slower("train", "additive"),
                    *slower("train", "transformer", -1),
                ),
                times(
                    f"the Transformer trains as fast at {long} tokens as at {short}",
                    *slower("train", "transformer"),
                    expects="same",
                ),
                times(
                    "at 32 tokens the Transformer trains faster",
                    (1, rate("train", "transformer", 32)),
                    (-1, rate("train", "additive", 32)),
                ),
            ),
            note="Steps hold the same number of tokens at every length. Whatever is done at once pays most "
            "where a machine can do much at once; here it is one core of a CPU.",
        ),
        Claim(
            name="translating",
            title="Translating, attention pays for its memory",
            says="Word by word, a recurrent network's step costs the same however far it has come, while a "
            "Transformer looks back at everything it has written.",
            source="Vaswani et al. 2017, table 1; Kasai et al. 2021 (arXiv 2006.10369)",
            figure="speed",
            contrasts=(
                times(
                    f"from {short} to {long} tokens the Transformer slows down by more than a recurrent "
                    "network without attention",
                    *slower("translate", "transformer"),
                    *slower("translate", "fixed", -1),
                ),
                times(
                    "it slows down by more than a recurrent network with attention",
                    *slower("translate", "transformer"),
                    *slower("translate", "additive", -1),
                ),
                times(
                    "at 32 tokens the recurrent network with attention is the faster one",
                    (1, rate("translate", "additive", 32)),
                    (-1, rate("translate", "transformer", 32)),
                ),
            ),
        ),
        Claim(
            name="quadratic",
            title="Attention's memory is quadratic",
            says="Attention needs memory that grows with the square of the length.",
            source="Vaswani et al. 2017, table 1; repeated by every paper on long inputs",
            figure="memory",
            contrasts=(
                times(
                    "of a Transformer, 1,024 tokens take more than twice the memory of 512",
                    *grows("transformer"),
                    at_least=2.2,
                ),
                times(
                    "of one attention, as the formula is written, they take more than twice as much",
                    *grows("as written"),
                    at_least=2.2,
                ),
                times(
                    "of a recurrent network with additive attention they take more than twice as much",
                    *grows("additive"),
                    at_least=2.2,
                ),
            ),
            note="What grows with the square is the matrix of weights. Nothing in the result needs that "
            "matrix: a kernel can go over it in blocks and forget them (Dao et al. 2022, arXiv 2205.14135), "
            "as trmt's does. Additive attention keeps a vector where others keep a number. In time, the "
            "square remains.",
        ),
    )


def _positions(scale: Scale) -> tuple[Claim, ...]:
    longest, next_long = str(scale.shorter[-1]), str(scale.longer[0])
    far = str(scale.longer[-1])
    return (
        Claim(
            name="order",
            title="Without positions, no order",
            says="Attention does not see order, so a Transformer needs to be told positions.",
            source="Vaswani et al. 2017 (arXiv 1706.03762), section 3.5",
            figure="positions",
            contrasts=(difference("sinusoidal against none", "transformer", "none"),),
            note="A decoder that sees only what is before it can count without being told (Haviv et al. "
            "2022, arXiv 2203.16634); an encoder cannot.",
        ),
        Claim(
            name="learned",
            title="Sinusoids or learned positions",
            says="Learned and sinusoidal positions give nearly identical results.",
            source="Vaswani et al. 2017, section 3.5 and table 3 (E)",
            figure="positions",
            contrasts=(
                difference("sinusoidal against learned", "transformer", "learned", expects="same"),
                difference(
                    "sinusoidal against learned, on sentences longer than trained",
                    "transformer",
                    "learned",
                    what=next_long,
                ),
            ),
        ),
        Claim(
            name="extrapolate",
            title="Sinusoids go on for ever",
            says="Sinusoids may let a network extrapolate to sentences longer than any in training.",
            source="Vaswani et al. 2017, section 3.5",
            figure="positions",
            contrasts=(
                Contrast(
                    asks=f"{next_long} sentences in a row, of which training had {longest} at most, are "
                    "translated as well as those",
                    terms=((1, score("transformer", longest)), (-1, score("transformer", next_long))),
                    expects="same",
                    margin=5.0,
                    unit="BLEU",
                ),
                difference(
                    "a recurrent network with attention does better there",
                    "additive",
                    "transformer",
                    what=far,
                ),
            ),
        ),
        Claim(
            name="biases",
            title="Distances instead of positions",
            says="What tells distances, not places, extrapolates: relative positions, rotations, biases.",
            source="Press et al. 2022 (arXiv 2108.12409); Shaw et al. 2018 (arXiv 1803.02155); "
            "Raffel et al. 2020 (arXiv 1910.10683); Su et al. 2021 (arXiv 2104.09864)",
            figure="positions",
            contrasts=tuple(
                difference(
                    f"{name} against sinusoidal, {next_long} sentences in a row",
                    system,
                    "transformer",
                    what=next_long,
                )
                for system, name in (
                    ("alibi", "ALiBi"),
                    ("relative", "relative"),
                    ("t5", "T5's biases"),
                    ("rotary", "rotary"),
                )
            ),
        ),
        Claim(
            name="relative",
            title="Relative positions translate better",
            says="Relative positions give better translations than absolute ones, at trained lengths too.",
            source="Shaw et al. 2018 (arXiv 1803.02155)",
            figure="positions",
            contrasts=(
                difference("relative against sinusoidal", "relative", "transformer"),
                difference("rotary against sinusoidal", "rotary", "transformer"),
            ),
        ),
        Claim(
            name="complex",
            title="Words as waves",
            says="Complex-valued embeddings, in which a word's phase turns with its position, are better "
            "than a word's vector and a position's side by side or added.",
            source="Wang et al. 2020 (ICLR, arXiv 1912.12333)",
            figure="positions",
            contrasts=(difference("complex against sinusoidal", "complex", "transformer"),),
        ),
        Claim(
            name="concatenate",
            title="Add or put beside",
            says="Positions may as well be added as put beside the word's vector.",
            source="a question in every course; Vaswani et al. 2017 add",
            figure="positions",
            contrasts=(difference("added against beside", "transformer", "concatenated", expects="same"),),
        ),
        Claim(
            name="shift",
            title="PE(pos + k) is a linear map of PE(pos)",
            says="For any fixed offset k, the sinusoids of pos + k are a linear function of those of pos.",
            source="Vaswani et al. 2017, section 3.5",
            contrasts=(
                exact("the greatest error of the rotation", "shift-residual", within=1e-10),
                exact(
                    "the share of the variance that no matrix explains",
                    "shift-residual-of-sines",
                    within=1e-8,
                ),
                Contrast(
                    asks="the same share for a table of chance",
                    terms=((1, "shift-residual-of-chance"),),
                    margin=0.1,
                    unit="",
                    at_least=0.5,
                ),
            ),
            note="The matrix turns each pair of columns by k times its rate. So PE(pos) . PE(pos + k) is the "
            "same for every pos, and the same as PE(pos) . PE(pos - k): by itself it tells how far, not "
            "which way.",
        ),
    )


def _parts_of_a_transformer() -> tuple[Claim, ...]:
    return (
        Claim(
            name="convolution",
            title="Feed-forward is convolution",
            says="The feed-forward layer is two convolutions of width one.",
            source="Vaswani et al. 2017, section 3.3",
            contrasts=(exact("the greatest difference of the two", "feed-forward-difference", within=1e-10),),
        ),
        Claim(
            name="heads",
            title="Several heads are better than one",
            says="One head is worse than several, and too many are worse again.",
            source="Vaswani et al. 2017, table 3 (A)",
            figure="heads",
            contrasts=(
                difference("4 heads against 1", "transformer", "heads-1"),
                difference("4 heads against 16", "transformer", "heads-16"),
                Contrast(
                    asks="1 head has as many parameters as 16",
                    terms=((1, "parameters/heads-1"), (-1, "parameters/heads-16")),
                    expects="same",
                    margin=0.5,
                    unit="parameters",
                ),
            ),
        ),
        Claim(
            name="scaling",
            title="Why scores are divided by the root of the width",
            says="Where heads are wide, unscaled dot products push the softmax to where it learns nothing; "
            "where they are narrow it does not matter.",
            source="Vaswani et al. 2017, section 3.2.1",
            figure="heads",
            contrasts=(
                difference("1 wide head: scaled against not", "heads-1", "unscaled-1"),
                difference("16 narrow heads: scaled against not", "heads-16", "unscaled-16", expects="same"),
            ),
        ),
        Claim(
            name="residual",
            title="Residual connections make depth possible",
            says="Without residual connections a deep network does not learn.",
            source="He et al. 2016 (arXiv 1512.03385), Vaswani et al. 2017, section 3.1",
            figure="training",
            contrasts=(
                difference("deep: with against without", "deep", "deep-plain"),
                difference("shallow: with against without", "transformer", "plain"),
                difference("deep against shallow, both with", "deep", "transformer"),
            ),
        ),
        Claim(
            name="batch-norm",
            title="LayerNorm, not BatchNorm",
            says="BatchNorm does worse in a Transformer than LayerNorm.",
            source="Shen et al. 2020 (arXiv 2003.07845)",
            figure="training",
            contrasts=(difference("LayerNorm against BatchNorm", "transformer", "batch-norm"),),
        ),
    )


def _training() -> tuple[Claim, ...]:
    return (
        Claim(
            name="warm-up",
            title="Post-norm needs warm-up",
            says="With norms behind the layers, training needs a warm-up; before them it does not.",
            source="Xiong et al. 2020 (arXiv 2002.04745)",
            figure="training",
            contrasts=(
                difference("post-norm: with warm-up against without", "post-norm", "post-norm-cold"),
                difference(
                    "pre-norm: with warm-up against without", "transformer", "pre-norm-cold", expects="same"
                ),
            ),
        ),
        Claim(
            name="pre-norm",
            title="Pre-norm for depth",
            says="Shallow, post-norm ends better; deep, only pre-norm trains.",
            source="Wang et al. 2019 (arXiv 1906.01787), Liu et al. 2020 (arXiv 2004.08249)",
            figure="training",
            contrasts=(
                difference("deep: pre-norm against post-norm", "deep", "deep-post"),
                difference("shallow: post-norm against pre-norm", "post-norm", "transformer"),
            ),
        ),
        Claim(
            name="smoothing",
            title="Label smoothing: less sure, better",
            says="Label smoothing hurts perplexity but improves BLEU.",
            source="Vaswani et al. 2017, section 5.4",
            figure="training",
            contrasts=(
                difference("smoothed against not", "transformer", "unsmoothed"),
                Contrast(
                    asks="nats that a piece of the reference costs more with smoothing",
                    terms=((1, score("transformer", metric="nll")), (-1, score("unsmoothed", metric="nll"))),
                    margin=0.01,
                    unit="nats",
                ),
            ),
        ),
    )


def _starts() -> tuple[Claim, ...]:
    return (
        Claim(
            name="vectors",
            title="Word vectors for little data",
            says="Embeddings that begin as word vectors help where parallel text is short.",
            source="Qi et al. 2018 (arXiv 1804.06323)",
            figure="start",
            contrasts=(difference("word vectors against a cold start", "little-vectors", "little"),),
        ),
        Claim(
            name="bert",
            title="A BERT for little data",
            says="An encoder that was pretrained to fill gaps helps where parallel text is short.",
            source="Devlin et al. 2019 (arXiv 1810.04805); Rothe et al. 2020 (arXiv 1907.12461)",
            figure="start",
            contrasts=(
                difference("BERT's encoder against a cold start", "little-bert", "little"),
                difference("BERT's encoder against word vectors", "little-bert", "little-vectors"),
            ),
        ),
    )


def evidence(figures: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """All values of a result by name and seed, or round, or 0 where they are exact."""
    values: dict[str, dict[int, float]] = {name: {0: value} for name, value in figures["computed"].items()}
    for name, rounds in figures["speed"].items():
        values[name] = {int(number): value for number, value in rounds.items()}
    for run in figures["runs"]:
        system, seed = run["system"], run["seed"]
        values.setdefault(f"parameters/{system}", {})[seed] = run["training"]["parameters"]
        tests = {"all": run["all"], **run["lengths"]} if "all" in run else {}
        for what, found in tests.items():
            for metric, value in found.items():
                values.setdefault(score(system, what, metric), {})[seed] = value
    return values


def scale_of(figures: Mapping[str, Any]) -> Scale:
    """The scale that a result is of."""
    return SCALES[figures["scale"]]
