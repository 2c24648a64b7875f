"""Tokens as data: what a tokenizer made of a data set, stored so that other programs read it too."""
