"""Effectiveness: what a small network can read of a chain's residues from their tokens alone.

tokens --vectors--> + place --norm, dropout--> (mean over the chain) --> two layers --> a label a residue, or a chain

The head, its losses and how it is trained are those of StructTokenBench (arXiv 2503.00089, as its code has them).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.classification import binary_auroc, binary_f1_score, multiclass_f1_score
from torchmetrics.functional.regression import spearman_corrcoef

from provq.modalities.protein.benchmark.subjects import Tokens, vectors_of

Kind = Literal["binary", "classes", "numbers"]

LEARNING_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6)
STEPS = 10_000
BATCH = 8  # chains
_LONGEST = 700  # places that have a vector
_WIDTH = 512
_DROPOUT = 0.1
_LOOKS = 20  # at the validation chains


class Labelled(NamedTuple):
    """A chain: the token of each residue, and the label of each or one of them all, NaN where there is none."""

    tokens: Tokens
    labels: Float[Tensor, " labels"]


@final
class ProbeHead(nn.Module):
    """Labels of residues, or of chains, from frozen vectors of their tokens and learned ones of their places.

    Args:
        dim: Length of the vectors.
        outputs: Numbers that are read.
        of_chains: Whether they are read of a chain as a whole, from the mean over its residues.
    """

    def __init__(self, dim: int, outputs: int, of_chains: bool = False) -> None:
        super().__init__()
        self.of_chains = of_chains
        self.places = nn.Embedding(_LONGEST, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(_DROPOUT)
        self.widen = nn.Linear(dim, _WIDTH)
        self.read = nn.Linear(_WIDTH, outputs)

    def forward(
        self, vectors: Float[Tensor, "b length dim"], present: Bool[Tensor, "b length"]
    ) -> Float[Tensor, "b labels outputs"]:
        """What is read of each residue, of one that is not there something that means nothing; or of each chain."""
        placed = torch.where(present[..., None], vectors, 0.0) + self.places.weight[: vectors.shape[1]]
        normed = self.dropout(self.norm(placed))
        if self.of_chains:
            shares = present / present.sum(1, keepdim=True).clamp_min(1)
            normed = (shares[..., None] * normed).sum(1, keepdim=True)
        read: Tensor = self.read(self.dropout(self.widen(normed).relu()))
        return read


class Fitted(NamedTuple):
    """A head, and the learning rate that it was trained at; NaN where no training ended in numbers."""

    head: ProbeHead
    learning_rate: float


def probe(
    codebook: Float[Tensor, "codes dim"] | None,
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    test: Sequence[Labelled],
    kind: Kind,
    *,
    steps: int = STEPS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
) -> dict[str, float]:
    """Fit a head and measure it; see `fit`.

    Args:
        codebook: The vectors of codes; None where tokens are vectors.
        train: Chains to learn from.
        validation: Chains to choose learning rate and step by.
        test: Chains to measure on.
        kind: Whether labels are 0 or 1, numbers of classes, or any numbers.
        steps: Of each training.
        learning_rates: Those that are tried.
        seed: Of weights and order.

    Returns:
        What `measured` gives of the test chains, and `learning_rate`, the one that was taken.
    """
    classes = classes_of([*train, *validation, *test]) if kind == "classes" else 1
    fitted = fit(codebook, train, validation, kind, classes, steps=steps, learning_rates=learning_rates, seed=seed)
    return {**measured(fitted, codebook, test, kind), "learning_rate": fitted.learning_rate}


def classes_of(chains: Sequence[Labelled]) -> int:
    """How many classes labels are of, which are counted from 0."""
    return 1 + int(max(float(chain.labels.nan_to_num().max()) for chain in chains))


def fit(
    codebook: Float[Tensor, "codes dim"] | None,
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    kind: Kind,
    outputs: int,
    *,
    of_chains: bool = False,
    batch: int = BATCH,
    steps: int = STEPS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
) -> Fitted:
    """Train heads at several learning rates, and give the one that serves the validation chains best.

    Chains are cut to 700 residues. Heads are judged, twenty times a training, by F1 or by Spearman's correlation.

    Args:
        codebook: The vectors of codes; None where tokens are vectors.
        train: Chains to learn from.
        validation: Chains to choose learning rate and step by.
        kind: Whether labels are 0 or 1, numbers of classes, or any numbers.
        outputs: How many classes there are; 1 where labels are of another kind.
        of_chains: Whether a chain has one label.
        batch: Chains in a step.
        steps: Of each training.
        learning_rates: Those that are tried.
        seed: Of weights and order.
    """
    dim = vectors_of(codebook, train[0].tokens).shape[-1]
    best, best_score = Fitted(ProbeHead(dim, outputs, of_chains), math.nan), -math.inf
    for rate in learning_rates:
        torch.manual_seed(seed)
        head = ProbeHead(dim, outputs, of_chains)
        for _ in _training(head, codebook, train, kind, steps, rate, batch, seed):
            score = _chosen_by(head, codebook, validation, kind)
            if score > best_score:
                best, best_score = Fitted(deepcopy(head), rate), score
    return best


def measured(
    fitted: Fitted, codebook: Float[Tensor, "codes dim"] | None, chains: Sequence[Labelled], kind: Kind
) -> dict[str, float]:
    """How well a head reads the labels of some chains; all numbers are NaN where no training ended in numbers.

    Returns:
        Of two classes `auroc` and `f1`, of all residues together, and `auroc_batch`, the mean over batches of eight
        chains as published; of more classes `f1` (the mean over classes) and `accuracy`; of numbers `spearman`.
    """
    numbers = _numbers(list(_read(fitted.head, codebook, chains)), kind)
    return dict.fromkeys(numbers, math.nan) if math.isnan(fitted.learning_rate) else numbers


def _training(
    head: ProbeHead,
    codebook: Tensor | None,
    chains: Sequence[Labelled],
    kind: Kind,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
) -> Iterator[None]:
    """Train, and stop at each look."""
    optimizer = AdamW(head.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)
    rates = LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        head.train()
        drawn = torch.randint(len(chains), (min(batch, len(chains)),), generator=order)
        read, labels = _read_and_labels(head, codebook, [chains[place] for place in drawn.tolist()])
        if len(labels):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(read, labels, kind))
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
        rates.step()
        if step % max(1, steps // _LOOKS) == 0 or step == steps:
            yield


def _rate(step: int, steps: int) -> float:
    """Up over 200 steps or less, level for a tenth, then along half a cosine to a tenth."""
    rising = min(200, max(1, steps // 50))
    if step < rising:
        return (step + 1) / rising
    share = (step - rising - steps // 10) / max(1, steps - rising - steps // 10)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2


def _loss(read: Float[Tensor, "n outputs"], labels: Float[Tensor, " n"], kind: Kind) -> Float[Tensor, ""]:
    if kind == "numbers":
        return mse_loss(read[:, 0], labels)
    if kind == "classes":
        return cross_entropy(read, labels.long())
    positive = labels > 0.5
    share = positive.float().mean().clamp(1 / (2 * len(labels)), 1 - 1 / (2 * len(labels)))
    weight = torch.where(positive, 0.5 / share, 0.5 / (1 - share))
    return binary_cross_entropy_with_logits(read[:, 0], labels, weight)


def _read_and_labels(
    head: ProbeHead, codebook: Tensor | None, chains: Sequence[Labelled]
) -> tuple[Float[Tensor, "n outputs"], Float[Tensor, " n"]]:
    """What a head reads of the residues, or chains, that have a token and a label, and their labels."""
    absent = math.nan if codebook is None else -1
    tokens = pad_sequence([chain.tokens[:_LONGEST] for chain in chains], batch_first=True, padding_value=absent)
    labels = pad_sequence([chain.labels[:_LONGEST] for chain in chains], batch_first=True, padding_value=math.nan)
    vectors = vectors_of(codebook, tokens)
    present = vectors.isfinite().all(-1)
    counts = ~labels.isnan() & (present.any(1, keepdim=True) if head.of_chains else present)
    read = head(vectors, present)
    return read[counts], labels[counts]


@torch.no_grad()
def _read(
    head: ProbeHead, codebook: Tensor | None, chains: Sequence[Labelled]
) -> Iterator[tuple[Float[Tensor, "n outputs"], Float[Tensor, " n"]]]:
    """The same, batch after batch."""
    head.eval()
    for first in range(0, len(chains), BATCH):
        yield _read_and_labels(head, codebook, chains[first : first + BATCH])


def _chosen_by(head: ProbeHead, codebook: Tensor | None, chains: Sequence[Labelled], kind: Kind) -> float:
    read, labels = _together(_read(head, codebook, chains))
    return _spearman(read, labels) if kind == "numbers" else _f1(read, labels, kind)


def _numbers(parts: Sequence[tuple[Float[Tensor, "_ outputs"], Float[Tensor, " _"]]], kind: Kind) -> dict[str, float]:
    read, labels = _together(parts)
    if kind == "numbers":
        return {"spearman": _spearman(read, labels)}
    if kind == "classes":
        return {
            "f1": _f1(read, labels, kind),
            "accuracy": float((read.argmax(1) == labels).float().mean()),
        }
    batches = [float(binary_auroc(r[:, 0].double(), y.long())) for r, y in parts if 0 < y.sum() < len(y)]
    return {
        "auroc": float(binary_auroc(read[:, 0], labels.long())),
        "auroc_batch": sum(batches) / len(batches) if batches else math.nan,
        "f1": _f1(read, labels, kind),
    }


def _together(
    parts: Iterable[tuple[Float[Tensor, "_ outputs"], Float[Tensor, " _"]]],
) -> tuple[Float[Tensor, "n outputs"], Float[Tensor, " n"]]:
    """All batches as one, in double precision: ranks are of logits, and as probabilities some would be equal."""
    read, labels = (torch.cat(both).double() for both in zip(*parts, strict=True))
    return read, labels


def _spearman(read: Float[Tensor, "n 1"], labels: Float[Tensor, " n"]) -> float:
    return float(spearman_corrcoef(read[:, 0], labels))


def _f1(read: Float[Tensor, "n outputs"], labels: Float[Tensor, " n"], kind: Kind) -> float:
    """Of the positive class, or where there are several the mean over classes."""
    if kind == "binary":
        return float(binary_f1_score((read[:, 0] > 0).long(), labels.long()))
    f1 = multiclass_f1_score(read.argmax(1), labels.long(), num_classes=read.shape[1], average="macro")
    return float(f1)
