"""How likely held-out items are to a prior: what a better codebook, or a better prior, makes small."""

import math
from collections.abc import Iterable

from provq.data import Batch
from provq.generation.base import Prior
from provq.ops.modes import evaluating


def likelihood(prior: Prior, batches: Iterable[Batch]) -> dict[str, float]:
    """Measure a prior on items.

    Args:
        prior: It is run in evaluation mode, without gradients, and left in the mode it was in.
        batches: The items, whose values are tokens.

    Returns:
        `items`, how many there were; `bits_per_item`, the mean of their negative log likelihood in base 2; and
        `bits_per_token`, the sum of it over the tokens that exist. Both are NaN of no items.
    """
    device = next(prior.parameters()).device
    items, tokens, nats = 0, 0, 0.0
    with evaluating(prior):
        for batch in batches:
            items += len(batch.values)
            tokens += int((batch.values >= 0).sum())
            nats += float(prior.nats(batch.values.to(device), batch.labels.to(device)).double().sum())
    bits = nats / math.log(2)
    return {
        "items": items,
        "bits_per_item": bits / items if items else math.nan,
        "bits_per_token": bits / tokens if tokens else math.nan,
    }
