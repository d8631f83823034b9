"""Vocabularies: how tokenizers are stored by others, and how ours are trained, extended, pruned and measured.

Every kind ends as one `tokenizer.json` definition (the format of the `tokenizers` library), so that there is
one way to encode and one thing to hand on.
"""
