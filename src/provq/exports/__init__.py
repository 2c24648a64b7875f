"""Tokenizers in the formats of others, for programs that do not know provq."""
