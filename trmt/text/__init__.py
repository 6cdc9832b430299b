"""Text: corpora, filters, tokenizers, word alignments, and the splitting of long lines."""
