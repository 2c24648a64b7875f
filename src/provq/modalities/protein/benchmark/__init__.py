"""StructTokenBench (arXiv 2503.00089): what the tokens of a structure are worth, beyond building it again."""
