"""What a saved tokenizer is."""

import math
from pathlib import Path
from typing import Any

from provq.tokenizer import Tokenizer, opened


def inspect(tokenizer: Tokenizer | str | Path) -> dict[str, Any]:
    """Sizes of a tokenizer, without running it.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.

    Returns:
        `fingerprint`, `parameters` by part, `codebook_sizes`, `bits_per_token`, `reduction`, and `config`. Where the
        tokenizer knows the size of its training pictures also `tokens_per_item` and `bits_per_item`.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    tokenizer = opened(tokenizer)
    parts = {"encoder": tokenizer.encoder, "quantizer": tokenizer.quantizer, "decoder": tokenizer.decoder}
    bits = sum(math.log2(size) for size in tokenizer.codebook_sizes)
    facts: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "bits_per_token": bits,
        "reduction": tokenizer.encoder.reduction,
    }
    size = tokenizer.metadata.get("data", {}).get("size")
    if size is not None:
        tokens = (size // tokenizer.encoder.reduction) ** 2
        facts |= {"tokens_per_item": tokens, "bits_per_item": tokens * bits}
    return {**facts, "config": tokenizer.config}
