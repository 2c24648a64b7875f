"""An autoregressive prior, position after position (LlamaGen, arXiv 2406.06525).

class, codes of position 0, ..., n - 2 --transformer--> hidden --chain--> codes of position 0, 1, ..., n - 1

In training all positions are worked on at once; in sampling one after the other, with a memory of what was before.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout

from provq.errors import UsageError
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
from provq.generation.causal import CausalBlock, Memory, rotary_places
from provq.generation.codes import PositionCodes
from provq.generation.sampling import Sampling, uniforms
from provq.generation.sizes import Size, dimensions
from provq.ops.modes import evaluating
from provq.spec import checked

Share = Annotated[float, Field(ge=0, lt=1)]
# From what enters at the next place, of all items side by side, to what comes out there.
Advance = Callable[[Float[Tensor, "b 1 width"]], Float[Tensor, "b 1 width"]]


@final
class AutoregressivePrior(Prior):
    """p(tokens | class), exactly, as a product over positions and, at each of them, over codebooks.

    Args:
        codebook_sizes: Number of codes, one entry a codebook.
        positions: The shape of an item's positions, which are gone through row after row.
        classes: Number of classes; 0 for none.
        size: A name, or depth, width and heads.
        ragged: Whether items may end early. Then positions have one axis, an item has one position at least, and where
            it is shorter than the longest its end counts as a token. Tokens that lack inside of an item carry no loss.
        token_dropout: Share of the channels of what enters the transformer that is dropped in training.
        dropout: Share of what attention and feed-forward networks add that is dropped in training.
        class_dropout: How often training hides the class, which guidance needs.

    Raises:
        UsageError: An argument is out of bounds, the heads do not share the width evenly or have no pairs of channels
            for each axis, or ragged items have several axes.
    """

    kind: ClassVar[str] = "autoregressive"

    @checked
    def __init__(
        self,
        codebook_sizes: CodebookSizes,
        positions: Positions,
        classes: Annotated[int, Field(ge=0)] = 0,
        *,
        size: Size = "tiny",
        ragged: bool = False,
        token_dropout: Share = 0.1,
        dropout: Share = 0.1,
        class_dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        if ragged and len(positions) > 1:
            raise UsageError(f"AutoregressivePrior: ragged items have one axis of positions, got {positions}")
        self.codebook_sizes, self.positions, self.classes = codebook_sizes, positions, classes
        self.size, self.ragged = size, ragged
        self.token_dropout, self.dropout, self.class_dropout = token_dropout, dropout, class_dropout
        depth, width, self._heads = dimensions(size)
        rotary_places(positions, width // self._heads, torch.device("meta"))
        self.codes = PositionCodes(codebook_sizes, width, ends=ragged)
        # The last one is that of no class.
        self.class_embedding = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(CausalBlock(width, self._heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def loss(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Nats a token, the mean over the tokens that exist and the ends of ragged items."""
        targets = self._targets(tokens, labels)
        nats = self._nats(targets, with_classes_dropped(self, labels))
        return nats.sum() / (targets >= 0).sum().clamp_min(1)

    def nats(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The exact negative log likelihood of each item; its end is part of it."""
        with evaluating(self):
            return self._nats(self._targets(tokens, labels), labels).sum(1)

    def sample(
        self, labels: Int[Tensor, " b"], sampling: Sampling, generators: Sequence[Generator]
    ) -> Int[Tensor, "b ..."]:
        """Tokens of new items, with the keys and values of earlier positions kept."""
        rows = len(labels) * (2 if is_guided(self, sampling) else 1)
        return self._sampled(labels, sampling, generators, _remembering(self, rows))

    def _targets(self, tokens: Int[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Int[Tensor, "b n codebooks"]:
        """What is to be predicted at each position: its codes, or the end."""
        flat = tokens_by_position(self, tokens)
        require_labels(self, labels, len(flat))
        if not self.ragged:
            return flat
        places = torch.arange(flat.shape[1], device=flat.device)
        lengths = ((places + 1) * (flat >= 0).any(-1)).amax(1, keepdim=True)
        # Of an item without any token nothing is known, neither its end.
        ends = (places == lengths) & (lengths > 0)
        first = flat[..., 0].masked_fill(ends, self.codebook_sizes[0])
        return torch.cat((first[..., None], flat[..., 1:]), -1)

    def _nats(self, targets: Int[Tensor, "b n codebooks"], labels: Int[Tensor, " b"]) -> Float[Tensor, "b n"]:
        entering = torch.cat((self._class_token(labels), self.codes.embed(targets[:, :-1])), 1)
        hidden = self._transformed(dropout(entering, self.token_dropout, self.training))
        if not self.ragged:
            return self.codes.nats(hidden, targets)
        first = self.codes.nats(hidden[:, :1], targets[:, :1], may_end=False)
        return torch.cat((first, self.codes.nats(hidden[:, 1:], targets[:, 1:])), 1)

    def _class_token(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b 1 width"]:
        token: Tensor = self.class_embedding(torch.where(labels < 0, self.classes, labels))[:, None]
        return token

    def _transformed(self, entering: Float[Tensor, "b places width"]) -> Float[Tensor, "b places width"]:
        rotary = self._rotary(entering.device)[:, : entering.shape[1]]
        for block in self.blocks:
            entering = block(entering, rotary)
        hidden: Tensor = self.norm(entering)
        return hidden

    def _rotary(self, device: torch.device) -> Float[Tensor, "2 places half"]:
        return rotary_places(self.positions, self.class_embedding.embedding_dim // self._heads, device)

    def _sampled(
        self, labels: Int[Tensor, " b"], sampling: Sampling, generators: Sequence[Generator], advance: Advance
    ) -> Int[Tensor, "b ..."]:
        require_labels(self, labels, len(generators))
        items, positions = len(labels), math.prod(self.positions)
        guide = is_guided(self, sampling)
        uniform = uniforms(generators, (positions, len(self.codebook_sizes)), labels.device)
        tokens = torch.full(uniform.shape, -1, device=labels.device)
        # An item alone is a chain of small operations: without what gradients would need each takes a fifth less time.
        with evaluating(self), torch.inference_mode():
            ended = torch.zeros(items, 1, dtype=torch.bool, device=labels.device)
            entering = self._class_token(torch.cat((labels, torch.full_like(labels, -1))) if guide else labels)
            for place in range(positions):
                scale = sampling.scale(place, positions) if guide else None
                here = slice(place, place + 1)
                codes, _ = self.codes.draw(advance(entering), sampling, scale, uniform[:, here], may_end=place > 0)
                if self.ragged:
                    ended = ended | (codes[..., 0] == self.codebook_sizes[0])
                    codes = codes.masked_fill(ended[..., None], -1)
                    if ended.all():
                        break
                tokens[:, here] = codes
                entering = self.codes.embed(codes.repeat(2, 1, 1) if guide else codes)
        return tokens_of_items(self, tokens)


def sample_without_memory(
    prior: AutoregressivePrior, labels: Int[Tensor, " b"], sampling: Sampling, generators: Sequence[Generator]
) -> Int[Tensor, "b ..."]:
    """What `sample` draws, to rounding, by going through all earlier positions again for each one."""
    return prior._sampled(labels, sampling, generators, _recomputing(prior))


def _remembering(prior: AutoregressivePrior, rows: int) -> Advance:
    table, kind = prior._rotary(prior.norm.weight.device), prior.norm.weight
    head_dim = prior.class_embedding.embedding_dim // prior._heads
    memories = [Memory(rows, prior._heads, math.prod(prior.positions), head_dim, kind) for _ in prior.blocks]
    angles = iter(torch.split(table, 1, dim=1))

    def advance(entering: Float[Tensor, "b 1 width"]) -> Float[Tensor, "b 1 width"]:
        rotary = next(angles)
        for block, memory in zip(prior.blocks, memories, strict=True):
            entering = block(entering, rotary, memory)
        hidden: Tensor = prior.norm(entering)
        return hidden

    return advance


def _recomputing(prior: AutoregressivePrior) -> Advance:
    entered: list[Tensor] = []

    def advance(entering: Float[Tensor, "b 1 width"]) -> Float[Tensor, "b 1 width"]:
        entered.append(entering)
        return prior._transformed(torch.cat(entered, 1))[:, -1:]

    return advance
