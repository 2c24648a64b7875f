"""A recipe of proteins that trains in seconds."""

SMALL = [
    "encoder.width=16",
    "encoder.depth=1",
    "encoder.neighbours=4",
    "decoder.width=16",
    "decoder.depth=1",
    "decoder.heads=2",
    "quantizer.codebook_size=16",
    "quantizer.dim=4",
    "data.crop=24",
    "training.batch_size=4",
    "training.steps=6",
]
