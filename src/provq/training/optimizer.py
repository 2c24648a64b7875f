"""The optimizer and its learning rates: the networks warm up and anneal, codebooks keep a rate of their own."""

import math

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from provq.tokenizer import Tokenizer


def make_optimizer(
    tokenizer: Tokenizer,
    *,
    steps: int,
    learning_rate: float,
    codebook_learning_rate: float | None,
    warmup: float,
    final_learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool = True,
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the networks, what else the quantizer learns, and its codebook; and the schedule of their rates.

    The networks' rate rises in a straight line over the share `warmup` of all steps, then falls along half a cosine
    to the ratio `final_learning_rate` of its peak. The codebook's rate is constant, since codes have to follow their
    latents to the end (arXiv 2609.26774), and codes do not decay.
    """
    codebook = tokenizer.quantizer.codebook_parameters()
    of_codebook = {id(parameter) for parameter in codebook}
    networks = [*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()]
    others = [parameter for parameter in tokenizer.quantizer.parameters() if id(parameter) not in of_codebook]
    # By themselves, for where networks are in shards one update cannot take both.
    groups: list[dict[str, object]] = [{"params": each, "lr": learning_rate} for each in (networks, others) if each]
    rates = [lambda step: _warm_cosine(step, steps, warmup, final_learning_rate)] * len(groups)
    if codebook:
        rate = learning_rate if codebook_learning_rate is None else codebook_learning_rate
        groups.append({"params": codebook, "lr": rate, "weight_decay": 0.0})
        rates.append(lambda step: 1.0)
    # One pass over the weights instead of seven: a twentieth of a step where networks are large and batches small.
    optimizer = AdamW(groups, betas=betas, weight_decay=weight_decay, fused=fused)
    return optimizer, LambdaLR(optimizer, rates)


def make_network_optimizer(
    network: nn.Module,
    *,
    steps: int,
    learning_rate: float,
    warmup: float,
    final_learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool = True,
) -> tuple[AdamW, LambdaLR]:
    """AdamW over a network, and the schedule of its rate, as `make_optimizer` has it for the networks of a tokenizer.

    Matrices decay; offsets, scales of norms and other rows of numbers do not.
    """
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    rows = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rows, "weight_decay": 0.0}]
    optimizer = AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=fused)
    return optimizer, LambdaLR(optimizer, lambda step: _warm_cosine(step, steps, warmup, final_learning_rate))


def _warm_cosine(step: int, steps: int, warmup: float, final: float) -> float:
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    share = min(1.0, (step - rising) / max(1, steps - rising))
    return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
