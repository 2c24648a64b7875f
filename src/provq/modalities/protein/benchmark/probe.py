"""Effectiveness: what a small network can read of a chain's residues from their codes alone.

codes --frozen codebook--> + place --norm, dropout--> two layers --> a label a residue

The head, its losses and how it is trained are those of StructTokenBench (arXiv 2503.00089, as its code has them).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, embedding, mse_loss
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.classification import binary_auroc, binary_f1_score, multiclass_f1_score
from torchmetrics.functional.regression import spearman_corrcoef

Kind = Literal["binary", "classes", "numbers"]

LEARNING_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6)
STEPS = 10_000
_LONGEST = 700  # places that have a vector
_WIDTH = 512
_DROPOUT = 0.1
_BATCH = 8
_LOOKS = 20  # at the validation chains


class Labelled(NamedTuple):
    """A chain: the code of each residue, -1 where it has none, and its label, NaN where it has none."""

    codes: Int[Tensor, " length"]
    labels: Float[Tensor, " length"]


@final
class ProbeHead(nn.Module):
    """Labels of residues from frozen vectors of their codes and learned ones of their places.

    Args:
        codebook: The vectors.
        outputs: Numbers that are read of each residue.
    """

    codebook: Tensor

    def __init__(self, codebook: Float[Tensor, "codes dim"], outputs: int) -> None:
        super().__init__()
        dim = codebook.shape[1]
        self.register_buffer("codebook", codebook)
        self.places = nn.Embedding(_LONGEST, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(_DROPOUT)
        self.widen = nn.Linear(dim, _WIDTH)
        self.read = nn.Linear(_WIDTH, outputs)

    def forward(self, codes: Int[Tensor, "b length"]) -> Float[Tensor, "b length outputs"]:
        """What is read of each residue; of one without a code something that means nothing."""
        vectors = embedding(codes.clamp_min(0), self.codebook) + self.places.weight[: codes.shape[1]]
        read: Tensor = self.read(self.dropout(self.widen(self.dropout(self.norm(vectors))).relu()))
        return read


def probe(
    codebook: Float[Tensor, "codes dim"],
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    test: Sequence[Labelled],
    kind: Kind,
    *,
    steps: int = STEPS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
) -> dict[str, float]:
    """Train heads at several learning rates, and measure the one that serves the validation chains best.

    Chains are cut to 700 residues. Heads are judged, twenty times a training, by F1 or by Spearman's correlation.

    Args:
        codebook: The vectors of codes.
        train: Chains to learn from.
        validation: Chains to choose learning rate and step by.
        test: Chains to measure on.
        kind: Whether labels are 0 or 1, numbers of classes, or any numbers.
        steps: Of each training.
        learning_rates: Those that are tried.
        seed: Of weights and order.

    Returns:
        Of two classes `auroc` and `f1`, of all test residues together, and `auroc_batch`, the mean over batches of
        eight chains as published; of more classes `f1` (the mean over classes) and `accuracy`; of numbers `spearman`.
        `learning_rate` is the one that was taken.
    """
    classes = 1 + int(max(float(chain.labels.nan_to_num().max()) for chain in (*train, *validation, *test)))
    outputs = classes if kind == "classes" else 1
    best, best_score, best_rate = None, -math.inf, math.nan
    for rate in learning_rates:
        torch.manual_seed(seed)
        head = ProbeHead(codebook, outputs)
        for state in _training(head, train, kind, steps, rate, seed):
            score = _chosen_by(head, validation, kind)
            if score > best_score:
                best, best_score, best_rate = deepcopy(state), score, rate
    if best is None:
        return {name: math.nan for name in _measured(ProbeHead(codebook, outputs), test, kind)} | {
            "learning_rate": math.nan
        }
    head = ProbeHead(codebook, outputs)
    head.load_state_dict(best)
    return {**_measured(head, test, kind), "learning_rate": best_rate}


def _training(
    head: ProbeHead, chains: Sequence[Labelled], kind: Kind, steps: int, rate: float, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Train, and stop at each look."""
    optimizer = AdamW(head.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)
    rates = LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        head.train()
        drawn = torch.randint(len(chains), (min(_BATCH, len(chains)),), generator=order)
        codes, labels = _padded([chains[place] for place in drawn.tolist()])
        present = (codes >= 0) & ~labels.isnan()
        if present.any():
            loss = _loss(head(codes)[present], labels[present], kind)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
        rates.step()
        if step % max(1, steps // _LOOKS) == 0 or step == steps:
            yield head.state_dict()


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


def _padded(chains: Sequence[Labelled]) -> tuple[Int[Tensor, "b length"], Float[Tensor, "b length"]]:
    cut = [Labelled(chain.codes[:_LONGEST], chain.labels[:_LONGEST]) for chain in chains]
    codes = nn.utils.rnn.pad_sequence([chain.codes for chain in cut], batch_first=True, padding_value=-1)
    labels = nn.utils.rnn.pad_sequence([chain.labels for chain in cut], batch_first=True, padding_value=math.nan)
    return codes, labels


@torch.no_grad()
def _read(
    head: ProbeHead, chains: Sequence[Labelled]
) -> Iterator[tuple[Float[Tensor, "n outputs"], Float[Tensor, " n"]]]:
    """What a head reads of the residues that have a code and a label, and their labels, batch after batch."""
    for first in range(0, len(chains), _BATCH):
        codes, labels = _padded(chains[first : first + _BATCH])
        present = (codes >= 0) & ~labels.isnan()
        yield head.eval()(codes)[present], labels[present]


def _chosen_by(head: ProbeHead, chains: Sequence[Labelled], kind: Kind) -> float:
    read, labels = _together(_read(head, chains))
    return _spearman(read, labels) if kind == "numbers" else _f1(read, labels, kind)


def _measured(head: ProbeHead, chains: Sequence[Labelled], kind: Kind) -> dict[str, float]:
    parts = list(_read(head, chains))
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
