"""What is said of Transformers: positions, heads, depth, norms, and what training begins with."""

from __future__ import annotations

from claims.asking import Claim, difference, exact, score
from claims.scale import Scale
from claims.systems import BERT
from claims.verdicts import Contrast


def claims(scale: Scale) -> tuple[Claim, ...]:
    """All of them, in the order of the page."""
    return (
        *_order(scale),
        *_longer(scale),
        *_ways(),
        _shift(),
        *_parts(),
        *_training(),
        *_starts(),
    )


def _order(scale: Scale) -> tuple[Claim, ...]:
    next_long = str(scale.longer[0])
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
    )


def _longer(scale: Scale) -> tuple[Claim, ...]:
    longest, next_long, far = (str(n) for n in (scale.shorter[-1], scale.longer[0], scale.longer[-1]))
    return (
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
    )


def _ways() -> tuple[Claim, ...]:
    return (
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
    )


def _shift() -> Claim:
    return Claim(
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
    )


def _parts() -> tuple[Claim, ...]:
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
            note="An encoder whose loss soon stops falling knows how often pieces occur, and little of what "
            "stands beside them.",
            begins_with=BERT,
        ),
    )
