"""A masked prior: all positions at once, the surest first (MaskGIT, arXiv 2202.04200).

class, codes where they are known, masks elsewhere --transformer--> hidden --chain--> codes of the masked positions

It is trained on random masks; sampling begins with all positions masked and ends with none.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int
from pydantic import Field
from torch import Generator, Tensor, nn

from provq.generation.base import (
    CodebookSizes,
    Positions,
    Prior,
    is_guided,
    require_labels,
    tokens_by_position,
    tokens_of_items,
    with_classes_dropped,
)
from provq.generation.causal import rotary_places
from provq.generation.codes import PositionCodes
from provq.generation.sampling import Sampling, uniforms
from provq.generation.sizes import Size, dimensions
from provq.networks.transformer import TransformerBlock
from provq.ops.masking import is_seen, where_kept
from provq.ops.modes import evaluating
from provq.spec import checked


@final
class MaskedPrior(Prior):
    """p(codes of masked positions | the other codes, class), each position by itself, and within it code after code.

    Items have all positions; where one lacks a token, it is neither predicted nor seen.

    Args:
        codebook_sizes: Number of codes, one entry a codebook.
        positions: The shape of an item's positions.
        classes: Number of classes; 0 for none.
        size: A name, or depth, width and heads.
        class_dropout: How often training hides the class, which guidance needs.
        masks: Over how many masks `nats` takes its mean.

    Raises:
        UsageError: An argument is out of bounds, or the heads do not share the width evenly or have no pairs of
            channels for each axis.
    """

    kind: ClassVar[str] = "masked"
    ragged = False

    @checked
    def __init__(
        self,
        codebook_sizes: CodebookSizes,
        positions: Positions,
        classes: Annotated[int, Field(ge=0)] = 0,
        *,
        size: Size = "tiny",
        class_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        masks: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        super().__init__()
        self.codebook_sizes, self.positions, self.classes = codebook_sizes, positions, classes
        self.size, self.class_dropout, self.masks = size, class_dropout, masks
        depth, width, heads = dimensions(size)
        self._head_dim = width // heads
        rotary_places(positions, self._head_dim, torch.device("meta"))
        self.codes = PositionCodes(codebook_sizes, width, ends=False)
        # The last one is that of no class.
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.mask = nn.Parameter(torch.empty(width))
        # Turned queries and keys tell masked positions apart by their values alone, and these are all the same.
        self.places = nn.Parameter(torch.empty(math.prod(positions), width))
        for drawn in (self.class_embedding.weight, self.mask, self.places):
            nn.init.normal_(drawn, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def loss(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """In training mode nats a masked token; in evaluation mode the bound of `nats`, a token.

        A mask hides the share cos(pi u / 2) of an item's positions, u uniform in [0, 1) (section 3.3), rounded up.
        """
        flat = self._flat(tokens, labels)
        if not self.training:
            return self._bound(flat, labels).sum() / (flat >= 0).sum().clamp_min(1)
        present = (flat >= 0).any(-1)
        hidden_share = torch.cos(torch.rand(len(flat), 1, device=flat.device) * (math.pi / 2))
        number = (hidden_share * present.sum(1, keepdim=True)).ceil()
        masked = _first_in(torch.rand(present.shape, device=flat.device), present, number)
        nats = self._nats(flat, masked, with_classes_dropped(self, labels))
        return nats.sum() / ((flat >= 0) & masked[..., None]).sum().clamp_min(1)

    def nats(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """An estimate of a bound on the negative log likelihood of each item.

        The bound is that of positions that come one after the other in a random order (arXiv 2110.02037, equation 4):
        the mean over m uniform in 1 ... n of n / m times the nats of m masked positions of n, which are chosen at
        random. The estimate is a mean over `masks` masks, whose m are spread evenly; they are the same for all items
        and at every call.
        """
        with evaluating(self):
            return self._bound(self._flat(tokens, labels), labels)

    def sample(
        self, labels: Int[Tensor, " b"], sampling: Sampling, generators: Sequence[Generator]
    ) -> Int[Tensor, "b ..."]:
        """Tokens of new items: at each step all masked positions are drawn, and the least sure are masked again.

        How sure a position is: the log probability of its codes by their guided logits, neither cooled nor filtered,
        plus Gumbel noise times the choice temperature times the share of the steps that lie ahead.
        """
        require_labels(self, labels, len(generators))
        guide = is_guided(self, sampling)
        positions, books = math.prod(self.positions), len(self.codebook_sizes)
        remaining = masks_left(positions, sampling.steps)
        steps = len(remaining)
        uniform = uniforms(generators, (steps, positions, books + 1), labels.device)
        tokens = torch.full((len(labels), positions, books), -1, device=labels.device)
        masked = torch.ones(tokens.shape[:2], dtype=torch.bool, device=labels.device)
        with evaluating(self):
            for step, still in enumerate(remaining):
                hidden = self._hidden(tokens, masked, labels)
                if guide:
                    without = self._hidden(tokens, masked, torch.full_like(labels, -1))
                    hidden = torch.cat((hidden, without))
                scale = sampling.scale(step, steps) if guide else None
                drawn = self.codes.draw(hidden, sampling, scale, uniform[:, step, :, :books])
                tokens = torch.where(masked[..., None], drawn.tokens, tokens)
                noise = sampling.choice_temperature * (1 - (step + 1) / steps) * _gumbel(uniform[:, step, :, books])
                sure = (_log_probability(drawn.tokens, drawn.logits) + noise).masked_fill(~masked, math.inf)
                least = sure.argsort(stable=True)[:, :still]
                masked = torch.zeros_like(masked).scatter(1, least, True)
        return tokens_of_items(self, tokens)

    def _flat(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Int[Tensor, "b n codebooks"]:
        flat = tokens_by_position(self, tokens)
        require_labels(self, labels, len(flat))
        return flat

    def _bound(self, flat: Int[Tensor, "b n codebooks"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        present = (flat >= 0).any(-1)
        length = present.sum(1, keepdim=True)
        uniform = torch.rand(1 + flat.shape[1] * self.masks, generator=Generator().manual_seed(0)).to(flat.device)
        start, orders = uniform[0], uniform[1:].reshape(self.masks, 1, -1)
        total = torch.zeros(len(flat), device=flat.device)
        for number, order in enumerate(orders):
            hidden = ((number + start) / self.masks * length).floor().clamp_max(length - 1) + 1
            masked = _first_in(order.expand(present.shape), present, hidden)
            total = total + self._nats(flat, masked, labels).sum(1) * (length / hidden).squeeze(1)
        return total / self.masks

    def _nats(
        self, flat: Int[Tensor, "b n codebooks"], masked: Bool[Tensor, "b n"], labels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b n"]:
        targets = flat.masked_fill(~masked[..., None], -1)
        return self.codes.nats(self._hidden(flat, masked, labels), targets)

    def _hidden(
        self, tokens: Int[Tensor, "b n codebooks"], masked: Bool[Tensor, "b n"], labels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b n width"]:
        known = self.codes.embed(tokens)
        entering = where_kept(~masked, known, self.mask.expand_as(known)) + self.places
        classes = self.class_embedding(torch.where(labels < 0, self.classes, labels))[:, None]
        seen = torch.cat((torch.ones_like(masked[:, :1]), masked | (tokens >= 0).any(-1)), 1)
        mask = None if is_seen(seen.all()) else seen
        rotary = rotary_places(self.positions, self._head_dim, tokens.device)
        entering = torch.cat((classes, entering), 1)
        for block in self.blocks:
            entering = block(entering, rotary, mask)
        hidden: Tensor = self.norm(entering)
        return hidden[:, 1:]


def masks_left(positions: int, steps: int) -> tuple[int, ...]:
    """How many positions are masked after each step: positions times cos(pi (step + 1) / (2 steps)), rounded down.

    Every step unmasks one position at least, so that there are never more steps than positions.
    """
    steps = min(steps, positions)
    left, before = [], positions
    for ahead in reversed(range(steps)):
        wanted = math.floor(positions * math.sin(math.pi / 2 * ahead / steps))
        before = max(ahead, min(before - 1, wanted))
        left.append(before)
    return tuple(left)


def _first_in(
    order: Float[Tensor, "b n"], present: Bool[Tensor, "b n"], number: Float[Tensor, "b 1"]
) -> Bool[Tensor, "b n"]:
    """The `number` positions that come first in an order of those present."""
    place = order.masked_fill(~present, math.inf).argsort().argsort()
    return present & (place < number)


def _log_probability(
    tokens: Int[Tensor, "b n codebooks"], logits: list[Float[Tensor, "b n _"]]
) -> Float64[Tensor, "b n"]:
    of_books = [
        of_book.double().log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
        for of_book, codes in zip(logits, tokens.unbind(-1), strict=True)
    ]
    return torch.stack(of_books).sum(0)


def _gumbel(uniform: Float64[Tensor, "b n"]) -> Float64[Tensor, "b n"]:
    return -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
