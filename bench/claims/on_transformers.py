"""Claims about Transformers: positions, heads, depth, norms, and initial weights."""

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
            title="Order needs positions",
            says="Attention ignores the order of tokens, so a Transformer needs positions.",
            source="Vaswani et al. 2017 (arXiv 1706.03762), section 3.5",
            figure="positions",
            contrasts=(difference("sinusoidal versus none", "transformer", "none"),),
            note="A decoder with causal attention can infer positions (Haviv et al. 2022, arXiv "
            "2203.16634); an encoder cannot.",
        ),
        Claim(
            name="learned",
            title="Sinusoidal or learned positions",
            says="Learned and sinusoidal positions give nearly identical results.",
            source="Vaswani et al. 2017, section 3.5 and table 3 (E)",
            figure="positions",
            contrasts=(
                difference("sinusoidal versus learned", "transformer", "learned", expects="same"),
                difference(
                    "sinusoidal versus learned, on sentences longer than in training",
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
            title="Sinusoidal positions extrapolate",
            says="Sinusoidal positions may extrapolate to sentences longer than any in training.",
            source="Vaswani et al. 2017, section 3.5",
            figure="positions",
            contrasts=(
                Contrast(
                    asks=f"{next_long} concatenated sentences are translated as well as {longest}, the most "
                    "in training",
                    terms=((1, score("transformer", longest)), (-1, score("transformer", next_long))),
                    expects="same",
                    margin=5.0,
                    unit="BLEU",
                ),
                difference(
                    f"a recurrent network with attention is better at {far}",
                    "additive",
                    "transformer",
                    what=far,
                ),
            ),
        ),
        Claim(
            name="biases",
            title="Relative positions extrapolate",
            says="Methods that represent distances extrapolate: relative positions, rotations, biases.",
            source="Press et al. 2022 (arXiv 2108.12409); Shaw et al. 2018 (arXiv 1803.02155); "
            "Raffel et al. 2020 (arXiv 1910.10683); Su et al. 2021 (arXiv 2104.09864)",
            figure="positions",
            contrasts=tuple(
                difference(
                    f"{name} versus sinusoidal, {next_long} concatenated sentences",
                    system,
                    "transformer",
                    what=next_long,
                )
                for system, name in (
                    ("alibi", "ALiBi"),
                    ("relative", "relative"),
                    ("t5", "T5 biases"),
                    ("rotary", "rotary"),
                )
            ),
        ),
    )


def _ways() -> tuple[Claim, ...]:
    return (
        Claim(
            name="relative",
            title="Relative positions are better",
            says="Relative positions give better translations than absolute ones, at trained lengths too.",
            source="Shaw et al. 2018 (arXiv 1803.02155)",
            figure="positions",
            contrasts=(
                difference("relative versus sinusoidal", "relative", "transformer"),
                difference("rotary versus sinusoidal", "rotary", "transformer"),
            ),
        ),
        Claim(
            name="complex",
            title="Complex embeddings",
            says="Complex-valued embeddings, whose phase depends on the position, are better than word and "
            "position vectors that are added or concatenated.",
            source="Wang et al. 2020 (ICLR, arXiv 1912.12333)",
            figure="positions",
            contrasts=(difference("complex versus sinusoidal", "complex", "transformer"),),
        ),
        Claim(
            name="concatenate",
            title="Adding or concatenating positions",
            says="Adding positions to embeddings is as good as concatenating both.",
            source="a common question; Vaswani et al. 2017 add",
            figure="positions",
            contrasts=(
                difference("added versus concatenated", "transformer", "concatenated", expects="same"),
            ),
        ),
    )


def _shift() -> Claim:
    return Claim(
        name="shift",
        title="PE(pos + k) is a linear function of PE(pos)",
        says="For any fixed offset k, PE(pos + k) is a linear function of PE(pos).",
        source="Vaswani et al. 2017, section 3.5",
        contrasts=(
            exact("largest error of the rotation", "shift-residual", within=1e-10),
            exact(
                "share of the variance that no matrix explains",
                "shift-residual-of-sines",
                within=1e-8,
            ),
            Contrast(
                asks="the same share for a random table",
                terms=((1, "shift-residual-of-chance"),),
                margin=0.1,
                unit="",
                at_least=0.5,
            ),
        ),
        note="The matrix rotates each pair of columns by k times its frequency. So PE(pos) . PE(pos + k) is "
        "the same for every pos, and equal to PE(pos) . PE(pos - k): it contains the distance, but not the "
        "direction.",
    )


def _parts() -> tuple[Claim, ...]:
    return (
        Claim(
            name="convolution",
            title="Feed-forward layers are convolutions",
            says="The feed-forward layer is two convolutions of width one.",
            source="Vaswani et al. 2017, section 3.3",
            contrasts=(exact("largest difference of the two", "feed-forward-difference", within=1e-10),),
        ),
        Claim(
            name="heads",
            title="Several heads are better than one",
            says="One head is worse than several, and too many heads are worse again.",
            source="Vaswani et al. 2017, table 3 (A)",
            figure="heads",
            contrasts=(
                difference("4 heads versus 1", "transformer", "heads-1"),
                difference("4 heads versus 16", "transformer", "heads-16"),
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
            title="Scaled dot products",
            says="With wide heads, unscaled dot products saturate the softmax, which then learns nothing; "
            "with narrow heads, scaling does not matter.",
            source="Vaswani et al. 2017, section 3.2.1",
            figure="heads",
            contrasts=(
                difference("1 wide head: scaled versus unscaled", "heads-1", "unscaled-1"),
                difference(
                    "16 narrow heads: scaled versus unscaled", "heads-16", "unscaled-16", expects="same"
                ),
            ),
        ),
        Claim(
            name="residual",
            title="Residual connections",
            says="Without residual connections, a deep network does not learn.",
            source="He et al. 2016 (arXiv 1512.03385), Vaswani et al. 2017, section 3.1",
            figure="training",
            contrasts=(
                difference("deep: with versus without", "deep", "deep-plain"),
                difference("shallow: with versus without", "transformer", "plain"),
                difference("with residual connections: deep versus shallow", "deep", "transformer"),
            ),
        ),
        Claim(
            name="batch-norm",
            title="LayerNorm or BatchNorm",
            says="In a Transformer, LayerNorm is better than BatchNorm.",
            source="Shen et al. 2020 (arXiv 2003.07845)",
            figure="training",
            contrasts=(difference("LayerNorm versus BatchNorm", "transformer", "batch-norm"),),
        ),
    )


def _training() -> tuple[Claim, ...]:
    return (
        Claim(
            name="warm-up",
            title="Post-norm needs warm-up",
            says="Post-norm Transformers need a warm-up, pre-norm Transformers do not.",
            source="Xiong et al. 2020 (arXiv 2002.04745)",
            figure="training",
            contrasts=(
                difference("post-norm: with versus without warm-up", "post-norm", "post-norm-cold"),
                difference(
                    "pre-norm: with versus without warm-up", "transformer", "pre-norm-cold", expects="same"
                ),
            ),
        ),
        Claim(
            name="pre-norm",
            title="Pre-norm for deep networks",
            says="Shallow networks are better with post-norm; deep networks train only with pre-norm.",
            source="Wang et al. 2019 (arXiv 1906.01787), Liu et al. 2020 (arXiv 2004.08249)",
            figure="training",
            contrasts=(
                difference("deep: pre-norm versus post-norm", "deep", "deep-post"),
                difference("shallow: post-norm versus pre-norm", "post-norm", "transformer"),
            ),
        ),
        Claim(
            name="smoothing",
            title="Label smoothing",
            says="Label smoothing hurts perplexity but improves BLEU.",
            source="Vaswani et al. 2017, section 5.4",
            figure="training",
            contrasts=(
                difference("with versus without smoothing", "transformer", "unsmoothed"),
                Contrast(
                    asks="loss of a reference token, with minus without smoothing",
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
            title="Word vectors for small data",
            says="Pretrained word vectors help when there is little parallel data.",
            source="Qi et al. 2018 (arXiv 1804.06323)",
            figure="start",
            contrasts=(difference("word vectors versus random initialisation", "little-vectors", "little"),),
        ),
        Claim(
            name="bert",
            title="BERT for small data",
            says="A pretrained BERT encoder helps when there is little parallel data.",
            source="Devlin et al. 2019 (arXiv 1810.04805); Rothe et al. 2020 (arXiv 1907.12461)",
            figure="start",
            contrasts=(
                difference("BERT encoder versus random initialisation", "little-bert", "little"),
                difference("BERT encoder versus word vectors", "little-bert", "little-vectors"),
            ),
            note="An encoder whose loss soon stops falling has learned the frequencies of pieces, but little "
            "of their contexts.",
            begins_with=BERT,
        ),
    )
