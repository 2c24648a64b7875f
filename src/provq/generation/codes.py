"""The codes of a position: how they enter a transformer, and their distribution given what comes out.

codes --sum of embeddings--> transformer --> hidden --> logits of codebook 0
                                             hidden, codes of codebooks before k --> logits of codebook k

With one codebook there is nothing but a table of embeddings and a linear map to logits.
"""

from typing import NamedTuple, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from provq.generation.causal import SwiGlu
from provq.generation.sampling import Sampling, draw, guided
from provq.ops.masking import where_kept


class Drawn(NamedTuple):
    """Codes, and the logits of each codebook that they were drawn from, guided but neither cooled nor filtered."""

    tokens: Int[Tensor, "b positions codebooks"]
    logits: list[Float[Tensor, "b positions _"]]


@final
class PositionCodes(nn.Module):
    """Embeddings of codes, and the exact chain p(c_0 | hidden) p(c_1 | hidden, c_0) ... of those of one position.

    Logits of codebook k > 0 are a linear map of u + swiglu(u), where u = hidden + norm(the sum of the embeddings of
    the codes before); those of the first are a linear map of hidden alone.

    Args:
        codebook_sizes: Number of codes, one entry a codebook.
        width: Channels of a token.
        ends: Whether the first codebook has one more code, the last, which says that the item ended before.
    """

    def __init__(self, codebook_sizes: tuple[int, ...], width: int, ends: bool) -> None:
        super().__init__()
        later = codebook_sizes[1:]
        self.codebook_sizes = codebook_sizes
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in codebook_sizes)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in later)
        self.feed_forwards = nn.ModuleList(SwiGlu(width) for _ in later)
        self.outputs = nn.ModuleList(nn.Linear(width, size, bias=False) for size in (codebook_sizes[0] + ends, *later))
        for table in self.embeddings.parameters():
            nn.init.normal_(table, std=0.02)
        # All codes are equally likely before training.
        for output in self.outputs.parameters():
            nn.init.zeros_(output)

    def embed(self, tokens: Int[Tensor, "*batch codebooks"]) -> Float[Tensor, "*batch width"]:
        """The sum of the embeddings of a position's codes; nothing where there is no code."""
        return torch.stack([self._embed(book, codes) for book, codes in enumerate(tokens.unbind(-1))]).sum(0)

    def nats(
        self,
        hidden: Float[Tensor, "b positions width"],
        targets: Int[Tensor, "b positions codebooks"],
        may_end: bool = True,
    ) -> Float[Tensor, "b positions"]:
        """The negative log likelihood of the codes of each position; codes at -1 add nothing.

        Args:
            hidden: What the transformer made of each position.
            targets: The codes.
            may_end: Whether the code that ends an item is among those of which one must come.
        """
        before = torch.zeros_like(hidden)
        total = hidden.new_zeros(hidden.shape[:2], dtype=torch.promote_types(hidden.dtype, torch.float32))
        for book, codes in enumerate(targets.unbind(-1)):
            if book > 0:
                before = before + self._embed(book - 1, targets[..., book - 1])
            logits = self._logits(book, hidden, before, may_end).to(total.dtype)
            total = total + cross_entropy(logits.mT, codes, ignore_index=-1, reduction="none")
        return total

    def draw(
        self,
        hidden: Float[Tensor, "rows positions width"],
        sampling: Sampling,
        scale: float | None,
        uniform: Float64[Tensor, "b positions codebooks"],
        may_end: bool = True,
    ) -> Drawn:
        """Codes of positions, one codebook after the other.

        Args:
            hidden: What the transformer made of each position; where there is guidance, of all items with their
                classes, then of all without.
            sampling: How to draw.
            scale: The scale of guidance, or None for none.
            uniform: Numbers in [0, 1) that decide.
            may_end: Whether the code that ends an item may be drawn.
        """
        before = torch.zeros_like(hidden)
        tokens: list[Tensor] = []
        every = []
        for book, decisive in enumerate(uniform.unbind(-1)):
            if book > 0:
                codes = tokens[-1] if scale is None else tokens[-1].repeat(2, 1)
                before = before + self._embed(book - 1, codes)
            logits = self._logits(book, hidden, before, may_end)
            if scale is not None:
                logits = guided(logits, scale)
            tokens.append(draw(logits, sampling, decisive))
            every.append(logits)
        return Drawn(torch.stack(tokens, -1), every)

    def _logits(
        self, book: int, hidden: Float[Tensor, "*batch width"], before: Float[Tensor, "*batch width"], may_end: bool
    ) -> Float[Tensor, "*batch _"]:
        if book > 0:
            hidden = hidden + self.norms[book - 1](before)
            hidden = hidden + self.feed_forwards[book - 1](hidden)
        logits: Tensor = self.outputs[book](hidden)
        return logits if may_end else logits[..., : self.codebook_sizes[book]]

    def _embed(self, book: int, codes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        size = self.codebook_sizes[book]
        # The end of an item is no code of the codebook.
        present = (codes >= 0) & (codes < size)
        return where_kept(present, self.embeddings[book](codes.clamp(0, size - 1)), 0.0)
