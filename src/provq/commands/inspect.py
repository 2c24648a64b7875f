"""What a saved tokenizer is."""

import math
from pathlib import Path
from typing import Any

from provq.commands.evaluate import modality_of
from provq.evaluation.cost import cost, parameters
from provq.tokenizer import Tokenizer, opened


def inspect(tokenizer: Tokenizer | str | Path) -> dict[str, Any]:
    """Sizes of a tokenizer, without running it.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.

    Returns:
        `fingerprint`, `parameters` by part, `codebook_sizes`, `bits_per_token`, `reduction`, and `config`. Where the
        tokenizer knows what it was trained on also `tokens_per_item`, `bits_per_item` and `flops_per_item`, by part,
        of such an item.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    tokenizer = opened(tokenizer)
    facts: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint,
        "parameters": parameters(tokenizer),
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "bits_per_token": sum(math.log2(size) for size in tokenizer.codebook_sizes),
        "reduction": tokenizer.encoder.reduction,
    }
    if "data" in tokenizer.metadata:
        of_item = cost(tokenizer, modality_of(tokenizer).blank_item())
        facts |= {"tokens_per_item": of_item.tokens, "bits_per_item": of_item.bits, "flops_per_item": of_item.flops}
    return {**facts, "config": tokenizer.config}
