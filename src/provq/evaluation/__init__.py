"""Numbers out of a trained tokenizer; whatever is measured here is measured with hard codes."""
