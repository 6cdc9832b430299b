"""Text as results on Multi30k are published: lowercased, punctuation normalised, cut into words by Moses.

The order is that of the data set's own script: lowercase, normalise punctuation, tokenise with escapes. By
it the German side of test_2016_flickr has 12,103 words, as the published logs print.
"""

from __future__ import annotations

from collections.abc import Iterable

try:
    from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer
except ImportError as error:
    raise SystemExit("words as Moses cuts them need sacremoses: pip install 'trmt[bench]'") from error


def tokenised(sentences: Iterable[str], language: str) -> list[str]:
    """The sentences as lowercased words with single spaces between them."""
    normaliser, tokenizer = MosesPunctNormalizer(language), MosesTokenizer(language)
    return [
        tokenizer.tokenize(normaliser.normalize(sentence.lower()), return_str=True) for sentence in sentences
    ]


def escaped(words: str) -> str:
    """Words that are cut already, with the signs written as `tokenised` writes them."""
    return MosesTokenizer().escape_xml(words)


def detokenised(sentences: Iterable[str], language: str) -> list[str]:
    """The way back, as far as there is one: case and the kinds of quotation marks stay lost."""
    detokenizer = MosesDetokenizer(language)
    return [detokenizer.detokenize(sentence.split()) for sentence in sentences]
