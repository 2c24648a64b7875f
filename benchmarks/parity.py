"""The same inputs and the same state give what vector-quantize-pytorch gives: codes, outputs, gradients, codebooks.

    python benchmarks/parity.py

Each line trains both for three steps from one state and prints the largest differences: the share of indices that
differ, and absolute differences of outputs, of gradients to the latents and of the codebook after the last step, over
the largest value of theirs. The last word says whether all stay below 1e-4 (indices: not one differs); the exit code is
1 if not.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from provq import FiniteScalarQuantizer, LookupFreeQuantizer, Quantizer, ResidualQuantizer, SimVQ, VectorQuantizer
from provq.quantizers import from_state

DIM, CODES, BOUND = 16, 64, 1e-4


class Pair(NamedTuple):
    """Theirs, ours in the same state, and how to read a codebook of each (None where there is none)."""

    name: str
    theirs: nn.Module
    ours: Quantizer
    codebook_of_theirs: Callable[[], Tensor] | None = None
    codebook_of_ours: Callable[[], Tensor] | None = None
    copies: int = 1  # of the output's gradient that theirs passes on


def pairs() -> Iterator[Pair]:
    """One pair an option that both have."""
    import vector_quantize_pytorch as peer

    # Their names for one behaviour: straight through, and a commitment that no schedule weighs.
    plain = {"decay": 0.8, "commitment_weight": 0.5, "rotation_trick": False}
    same = {"decay": 0.8, "commitment_weight": 0.5, "commitment_follows_hardness": False, "init": "normal"}
    for name, theirs, ours in (
        ("moving averages", plain, {"update": "ema"}),
        ("moving averages, cosine", {**plain, "use_cosine_sim": True}, {"update": "ema", "distance": "cosine"}),
        ("moving averages, rotation", {**plain, "rotation_trick": True}, {"update": "ema", "estimator": "rotation"}),
        ("moving averages, codebook_dim", {**plain, "codebook_dim": 4}, {"update": "ema", "codebook_dim": 4}),
        ("moving averages, heads", {**plain, "heads": 4, "codebook_dim": 4}, {"update": "ema", "heads": 4}),
        (
            "by gradient",
            {**plain, "learnable_codebook": True, "ema_update": False},
            {"update": "gradient", "codebook_weight": 0.5},
        ),
    ):
        module = peer.VectorQuantize(DIM, CODES, **theirs)
        quantizer = VectorQuantizer(DIM, CODES, **same, **ours)
        yield Pair(
            name,
            module,
            in_state_of(module, quantizer, heads=quantizer.heads, distance=quantizer.distance),
            lambda module=module: module._codebook.embed[0],
            quantizer.table,
        )
    module = peer.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, **plain)
    residual = ResidualQuantizer([VectorQuantizer(DIM, CODES, update="ema", **same) for _ in range(3)])
    last = residual.stages[-1]
    assert isinstance(last, VectorQuantizer)
    # Each of their stages passes the whole gradient of the sum, so that latents get it three times; ours once.
    yield Pair(
        "residual", module, in_state_of(module, residual), lambda: module.layers[-1]._codebook.embed[0], last.table, 3
    )
    module = peer.SimVQ(dim=DIM, codebook_size=CODES, rotation_trick=False)
    # Their loss is commitment times its weight of 0.25, plus the codebook's.
    simvq = SimVQ(DIM, CODES, commitment_weight=0.25, commitment_follows_hardness=False)
    yield Pair("SimVQ", module, in_state_of(module, simvq), lambda: module.codebook, simvq.table)
    levels = [5, 5, 5]
    yield Pair("finite scalar", peer.FSQ(levels, return_indices=True), FiniteScalarQuantizer(levels))
    yield Pair(
        "lookup-free",
        peer.LFQ(dim=6, codebook_size=64, entropy_loss_weight=0.0, commitment_loss_weight=0.5),
        LookupFreeQuantizer(
            6, token_entropy_weight=0, usage_entropy_weight=0, commitment_weight=0.5, commitment_follows_hardness=False
        ),
    )


def in_state_of(module: nn.Module, quantizer: Quantizer, **options: object) -> Quantizer:
    """Our quantizer with their state, imported as a user would."""
    if isinstance(quantizer, VectorQuantizer) and quantizer.update == "gradient":
        quantizer.load_codebook(module._codebook.embed[0])  # their state does not say how the codebook learns
        return quantizer
    quantizer.load_state_dict(from_state(module.state_dict(), **options).state_dict())
    return quantizer


def differences(pair: Pair) -> dict[str, float]:
    """The largest differences over three steps of training, each from the state that the one before left."""
    found = dict.fromkeys(("indices", "outputs", "gradients", "codebook"), 0.0)
    pair.theirs.train()
    pair.ours.train()
    rates = [torch.optim.SGD(part.parameters(), 0.1) if any(True for _ in part.parameters()) else None
             for part in (pair.theirs, pair.ours)]  # fmt: skip
    for step in range(3):
        z = torch.randn(4, 100, pair.ours.dim, generator=torch.Generator().manual_seed(step))
        results = []
        for part, rate in zip((pair.theirs, pair.ours), rates, strict=True):
            latents = z.clone().requires_grad_()
            quantized, indices, *loss = part(latents)
            weights = torch.linspace(-1, 1, z.shape[-1]) * (pair.copies if part is pair.ours else 1)
            total = (quantized * weights).sum() + sum((term.sum() for term in loss), 0.0)
            total.backward()
            if rate is not None:
                rate.step()
                rate.zero_grad()
            results.append((indices, quantized.detach(), latents.grad))
        (their_indices, *theirs), (our_indices, *ours) = results
        found["indices"] = max(
            found["indices"], float((renumbered(pair, their_indices) != our_indices).double().mean())
        )
        for name, their_values, our_values in zip(("outputs", "gradients"), theirs, ours, strict=True):
            found[name] = max(found[name], relative(their_values, our_values))
    if pair.codebook_of_theirs is not None and pair.codebook_of_ours is not None:
        found["codebook"] = relative(pair.codebook_of_theirs().detach(), pair.codebook_of_ours().detach())
    return found


def renumbered(pair: Pair, indices: Tensor) -> Tensor:
    """Their lookup-free indices have the first dimension as the highest bit, ours as the lowest."""
    if not isinstance(pair.ours, LookupFreeQuantizer):
        return indices
    places = torch.arange(pair.ours.bits)
    return ((indices[..., None] >> places & 1) << places.flip(0)).sum(-1)


def relative(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.double() - ours.double()).abs().max() / theirs.double().abs().max())


def main() -> None:
    torch.manual_seed(0)
    agree = True
    print(f"{'':34}{'indices':>10}{'outputs':>10}{'gradients':>11}{'codebook':>10}")
    for pair in pairs():
        found = differences(pair)
        fits = found["indices"] == 0 and max(found.values()) < BOUND
        agree = agree and fits
        print(f"{pair.name:34}{found['indices']:10.1%}{found['outputs']:10.1e}{found['gradients']:11.1e}"
              f"{found['codebook']:10.1e}  {'same' if fits else 'DIFFERENT'}")  # fmt: skip
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
