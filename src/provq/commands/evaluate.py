"""Measure a tokenizer on held-out data."""

from pathlib import Path

from provq import modalities
from provq.data import Items, evaluation_batches
from provq.errors import UserError
from provq.evaluation.evaluate import evaluate as evaluate_batches
from provq.modalities import Modality
from provq.spec import build
from provq.tokenizer import Tokenizer, opened
from provq.training.log import counted, show_skipped


def evaluate(
    tokenizer: Tokenizer | str | Path,
    data: str | None = None,
    *,
    inception: str | Path | None = None,
    reference: str | Path | None = None,
    samples: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """Measure a tokenizer with hard codes.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        data: What to measure on, in the words of `data.val`; left out, what the tokenizer's own recipe holds out.
        inception: The file of FID's Inception-v3; with it reconstructions are compared with the very items they were
            made from, through the identical crop, by the Fréchet distance of its features.
        reference: An `.npz` file with pictures or the statistics of their features, as ADM publishes them, with which
            reconstructions are compared too.
        samples: A folder to write `reconstructions.npz` and `originals.npz` to, for ADM's evaluator.
        batch_size: Items at a time; it changes no number.
        workers: Reading processes.

    Returns:
        `count`, `psnr` (dB), `ssim`, `continuity_gap`, and the numbers of the codebook (`usage`, `perplexity`,
        `relative_error`, `effective_dim`, ...: docs/diagnostics.md lists all); NaN where one is not defined. With
        `inception` also `rfid`, which is called so with the published weights and 50,000 pictures only; else its name
        says how many there were, and which network: `rfid@2500[inception-6726825d]`. With `reference` also `fid[NAME]`,
        under the same conditions.

    Raises:
        UsageError: There is a reference without `inception`.
        UserError: The tokenizer or the data cannot be read.
    """
    tokenizer = opened(tokenizer)
    modality = modality_of(tokenizer)
    items = items_to_measure(modality, data)
    measures = modality.measures(inception, reference, samples)
    skipped: dict[str, str] = {}
    batches = evaluation_batches(items, batch_size=batch_size, workers=workers)
    numbers = evaluate_batches(tokenizer, counted(batches, len(items), skipped), measures, modality.distortion)
    show_skipped(skipped)
    if not numbers["count"]:
        raise UserError(f"none of the {len(items)} items can be read; the first: {next(iter(skipped.items()))}")
    return numbers


def items_to_measure(modality: Modality, data: str | None) -> Items:
    """The items of the user's words, or those that the recipe holds out where there are no words.

    Raises:
        UserError: It holds nothing out, or the data cannot be read.
    """
    items = modality.held_out_items() if data is None else modality.items_of(data)
    if items is None:
        raise UserError("this tokenizer's recipe holds nothing out (data.val is missing); say what to evaluate on")
    return items


def modality_of(tokenizer: Tokenizer) -> Modality:
    """The kind of data that a tokenizer was trained on, as its metadata states it.

    Raises:
        UserError: The metadata does not say.
    """
    table = tokenizer.metadata.get("data")
    if table is None:
        raise UserError("this tokenizer does not say what data it is for: its metadata has no table 'data'")
    return build(table, modalities.KINDS, where="metadata.data")
