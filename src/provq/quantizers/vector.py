"""Vector quantization with a learned codebook (VQ-VAE, van den Oord et al., arXiv 1711.00937).

The codebook is learned by gradient or by moving averages, compared by Euclidean or by cosine distance, started
by k-means or at random, and its dead codes are revived on request.
"""

import math
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from provq.errors import UsageError, UserError
from provq.ops import estimators
from provq.ops.codes import counts_of_codes, move_codes, random_rows
from provq.ops.collectives import mean_over_ranks
from provq.ops.kmeans import kmeans
from provq.ops.masking import where_kept
from provq.ops.mean_square import mean_square
from provq.ops.nearest import nearest_code
from provq.ops.soft_assignment import sampled_code, soft_usage
from provq.quantizers.base import Quantizer, projecting_as
from provq.quantizers.bridge import CodebookBridge
from provq.spec import checked

Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@final
class VectorQuantizer(Quantizer):
    """A table of `codebook_size` learned vectors; a latent becomes the nearest of them.

    Args:
        dim: Length of latents.
        codebook_size: Number of codes.
        codebook_dim: Length of a code; `dim / heads` if not given. Where `heads * codebook_dim` is not `dim`,
            learned linear maps lead there and back (ViT-VQGAN, arXiv 2110.04627).
        heads: Parts of a latent, each of which gets a code of its own from the one codebook. (For a codebook a part
            see `GroupedQuantizer`.)
        distance: "euclidean", or "cosine": latents and codes on the unit sphere.
        update: How codes learn: by "gradient" of the codebook loss, as moving averages ("ema") of their latents, or
            not at all: "frozen", for codes that `load_codebook` is given.
        decay: Share of the old value that a moving average keeps in a step; also that of the usage statistics.
        commitment_weight: Weight of the loss that draws latents to their codes.
        commitment_follows_hardness: Multiply that weight by hardness in training, so that latents are not drawn
            to codes that have not yet been settled on them.
        codebook_weight: Weight of the loss that draws codes to their latents; read with update="gradient" only.
        orthogonal_weight: Weight of the mean squared cosine between different codes; with update="gradient" only.
        diversity_weight: Weight of log(codebook_size) minus the entropy of the mean soft assignment, in nats: it is 0
            where a batch uses all codes alike.
        diversity_temperature: The soft assignment is softmax(-||u - c||^2 / temperature).
        estimator: Which gradient passes a code.
        sampling_temperature: In training draw the code from softmax(-||u - c||^2 / temperature); 0 takes the nearest.
        init: "kmeans" on the latents of the first training batch, "normal" of variance 1/codebook_dim, or "uniform"
            in [-1/codebook_size, 1/codebook_size].
        revive_below: A code whose moving share of tokens is below this ratio of the uniform share is moved to a
            random latent; 0 revives none.
        bridge_blocks: Transformer blocks through which all codes are seen, so that a gradient reaches each of them
            (see `CodebookBridge`); 0 sees the plain table. With update="gradient" only.

    Raises:
        UsageError: An argument is out of bounds, or two of them contradict each other.
    """

    codebook: Tensor
    usage: Tensor
    founded: Tensor
    ema_counts: Tensor

    @checked
    def __init__(
        self,
        dim: Positive,
        codebook_size: Positive,
        *,
        codebook_dim: Positive | None = None,
        heads: Positive = 1,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        update: Literal["gradient", "ema", "frozen"] = "gradient",
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.99,
        commitment_weight: Weight = 0.25,
        commitment_follows_hardness: bool = True,
        codebook_weight: Weight = 1.0,
        orthogonal_weight: Weight = 0.0,
        diversity_weight: Weight = 0.0,
        diversity_temperature: Annotated[float, Field(gt=0)] = 1.0,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
        sampling_temperature: Weight = 0.0,
        init: Literal["kmeans", "normal", "uniform"] = "kmeans",
        revive_below: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bridge_blocks: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        if codebook_dim is None and dim % heads:
            raise UsageError(f"VectorQuantizer: heads={heads} must divide dim={dim}, or give codebook_dim")
        if update != "gradient" and (orthogonal_weight or bridge_blocks):
            raise UsageError(
                "VectorQuantizer: orthogonal_weight and bridge_blocks teach codes by gradient, "
                f"take update='gradient' for them, got {update!r}"
            )
        if bridge_blocks and revive_below:
            raise UsageError(
                "VectorQuantizer: behind a bridge every code moves; leave out revive_below or bridge_blocks"
            )
        if update == "frozen" and (init == "kmeans" or revive_below):
            raise UsageError(
                "VectorQuantizer: a frozen codebook neither settles on latents nor moves to them; "
                "with update='frozen' give init='normal' and revive_below=0"
            )
        if sampling_temperature and estimator == "rotation":
            raise UsageError(
                "VectorQuantizer: the rotation to a code that was drawn at random, maybe far away, makes training "
                "diverge; with sampling_temperature take estimator='straight_through'"
            )
        code_length = dim // heads if codebook_dim is None else codebook_dim
        super().__init__(dim, (codebook_size,) * heads, code_dim=heads * code_length)
        self.codebook_size = codebook_size
        self.codebook_dim = code_length
        self.heads = heads
        self.distance = distance
        self.update = update
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.commitment_follows_hardness = commitment_follows_hardness
        self.codebook_weight = codebook_weight
        self.orthogonal_weight = orthogonal_weight
        self.diversity_weight = diversity_weight
        self.diversity_temperature = diversity_temperature
        self.estimator = estimator
        self.sampling_temperature = sampling_temperature
        self.init = init
        self.revive_below = revive_below
        self.bridge_blocks = bridge_blocks
        self.reviving = revive_below > 0
        start = torch.empty(codebook_size, code_length)
        if init == "uniform":
            start.uniform_(-1 / codebook_size, 1 / codebook_size)
        else:
            start.normal_(std=1 / math.sqrt(code_length))
        if distance == "cosine":
            start = normalize(start, dim=1)
        if update == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
        if update == "ema":
            self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.bridge = CodebookBridge(codebook_size, code_length, bridge_blocks) if bridge_blocks else None
        self.register_buffer("usage", torch.full((codebook_size,), 1 / codebook_size))
        self.register_buffer("founded", torch.tensor(init != "kmeans"))
        # The buffer is the saved state; forward reads this copy of it, which a compiler can branch on.
        self._is_founded = init != "kmeans"
        self._is_resting = False

    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The vectors themselves, or with cosine distance the directions of their heads."""
        return normalize(self._split(z), dim=-1).flatten(-2) if self.distance == "cosine" else z

    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "..."]:
        """The index of the nearest code of each head, searched in float32."""
        with torch.no_grad():
            return self._by_heads(nearest_code(self._vectors(u).float(), self.table()), u)

    def choose(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "..."]:
        """In training with a sampling temperature a code drawn at random, else the nearest."""
        if not self.training or not self.sampling_temperature:
            return self.assign(u)
        with torch.no_grad():
            return self._by_heads(sampled_code(self._vectors(u), self.table(), self.sampling_temperature), u)

    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch code_dim"]:
        """The codes at the indices; zeros at -1."""
        table = self.codebook if self.bridge is None else self.bridge(self.codebook)
        values = embedding(indices.clamp_min(0), table).float()
        if self.distance == "cosine":
            values = normalize(values, dim=-1)
        values = where_kept(indices != -1, values, 0.0)
        return values.flatten(-2) if self.heads > 1 else values

    def table(self) -> Float[Tensor, "codes codebook_dim"]:
        """All codes as latents are compared with them, in float32."""
        codes = (self.codebook if self.bridge is None else self.bridge(self.codebook)).float()
        return normalize(codes, dim=1) if self.distance == "cosine" else codes

    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """The codes, with the chosen gradient, head by head."""
        if self.estimator == "straight_through":
            return estimators.straight_through(u, q)
        return estimators.rotation(self._split(u), self._split(q)).flatten(-2)

    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "..."],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """Commitment ||u - sg q||^2, by gradient the codebook loss ||sg u - q||^2 (1711.00937, eq. 3), and the rest."""
        weight = self.weight_of_commitment(self.commitment_weight, self.commitment_follows_hardness)
        total = mean_square(u, q.detach(), keep) * weight
        if self.update == "gradient":
            # Weighted by 0 rather than left out: the codebook takes part in every exchange of gradients between ranks.
            awake = 0.0 if self._is_resting else 1.0
            total = total + mean_square(u.detach(), q, keep) * (awake * self.codebook_weight)
            if self.orthogonal_weight:
                total = total + self._likeness() * (awake * self.orthogonal_weight) * keep.any()
        if self.diversity_weight:
            total = total + self._missing_entropy(u, keep) * self.diversity_weight
        return total

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Start the codebook by k-means on the first training batch that has any token."""
        if self.awaits_latents:
            self._settle(self._vectors(u), self._of_heads(keep))

    @torch.no_grad()
    def adapt(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]
    ) -> None:
        """Follow the batch with usage, moving averages and revival; one exchange between ranks for the averages."""
        if self._is_resting or self.update == "frozen" or (self.update == "gradient" and not self.reviving):
            return
        vectors, indices, keep = self._vectors(u), indices.flatten(), self._of_heads(keep)
        if self.update == "ema":
            counts = move_codes(self.codebook, self.ema_counts, vectors, indices, keep, self.decay)
        else:
            counts = counts_of_codes(indices, keep, self.codebook_size)
        tokens = counts.sum()
        # A batch without a token leaves usage where it is.
        self.usage.lerp_(counts / tokens.clamp_min(1), tokens.clamp_max(1) * (1 - self.decay))
        if self.reviving:
            self._revive(vectors, keep)

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Settle the codebook by k-means on all heads of latents, and forget all statistics of the old one."""
        if self.update == "frozen":
            return
        vectors = self._vectors(latents)
        self._settle(vectors, torch.ones(len(vectors), dtype=torch.bool, device=latents.device))

    def load_codebook(self, codes: Float[Tensor, "codes codebook_dim"]) -> None:
        """Take these codes, such as pretrained ones, and forget all statistics of the old ones.

        Raises:
            UserError: Their shape is not (codebook_size, codebook_dim), or one of them is not finite.
        """
        wrong = int((~codes.isfinite()).sum())
        if codes.shape != self.codebook.shape or wrong:
            raise UserError(
                f"VectorQuantizer: codes must be finite and of shape {tuple(self.codebook.shape)}, "
                f"got shape {tuple(codes.shape)} with {wrong} values that are not finite"
            )
        self._take(codes, torch.ones(self.codebook_size, device=self.codebook.device))

    @property
    def codes_to_found(self) -> int:
        """A latent a code, or a head; none where codes are frozen."""
        return 0 if self.update == "frozen" else -(-self.codebook_size // self.heads)

    def rest(self, resting: bool) -> None:
        """Leave the codebook as it is, whatever latents pass, or take up learning again."""
        self._is_resting = resting

    def found_on_next_batch(self) -> None:
        """Forget that the codebook was settled; the next training batch settles it anew."""
        if self.update != "frozen":
            self.founded.fill_(False)
            self._is_founded = False

    @property
    def awaits_latents(self) -> bool:
        """Whether k-means is to settle the codebook on the next latents."""
        if not self._is_founded and not torch.compiler.is_compiling():
            self._is_founded = bool(self.founded)  # the buffer may have come from another rank since
        return not self._is_founded and not self._is_resting

    def steady(self) -> None:
        """Revive no more codes."""
        self.reviving = False

    @property
    def residual_scale(self) -> float | None:
        """1, as codes find their own scale; directions do not add up."""
        return None if self.distance == "cosine" else 1.0

    def baked(self) -> "VectorQuantizer":
        """With a bridge, the same codes as a plain frozen table; itself without one."""
        return self if self.bridge is None else frozen(self, self.table(), heads=self.heads, distance=self.distance)

    @property
    def float32_buffers(self) -> tuple[str, ...]:
        """The statistics, and the codebook where it is one of them."""
        return ("usage", "codebook", "ema_counts") if self.update == "ema" else ("usage",)

    def _split(self, u: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch heads codebook_dim"]:
        return u.reshape(*u.shape[:-1], self.heads, self.codebook_dim)

    def _vectors(self, u: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "n codebook_dim"]:
        return u.reshape(-1, self.codebook_dim)

    def _of_heads(self, keep: Bool[Tensor, "*batch"]) -> Bool[Tensor, " n"]:
        return keep.flatten() if self.heads == 1 else keep[..., None].expand(*keep.shape, self.heads).flatten()

    def _by_heads(self, indices: Int[Tensor, " n"], u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "..."]:
        return indices.reshape(u.shape[:-1] if self.heads == 1 else (*u.shape[:-1], self.heads))

    def _likeness(self) -> Float[Tensor, ""]:
        """The mean of squared cosines over pairs of different codes, through the smaller of the two Gram matrices."""
        unit = normalize(self._table_of_now(), dim=1)
        # ||C C'|| = ||C' C|| in Frobenius' norm: no table of codes x codes. The diagonal holds `codebook_size` ones.
        pairs: Tensor = (unit.T @ unit).square().sum() - self.codebook_size
        return pairs / max(1, self.codebook_size * (self.codebook_size - 1))

    def _table_of_now(self) -> Float[Tensor, "codes codebook_dim"]:
        # A copy, since `adapt` writes the codebook before the backward pass that needs its values.
        return self.table().clone()

    def _missing_entropy(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> Float[Tensor, ""]:
        of_heads = self._of_heads(keep)
        table = self._table_of_now().detach() if self._is_resting else self._table_of_now()
        usage = soft_usage(self._vectors(u), table, of_heads, self.diversity_temperature)
        if self.training:
            usage = mean_over_ranks(usage, of_heads.sum())
        # Far codes have the share 0, where the entropy is 0 too and its gradient must stay finite.
        entropy = -(usage * usage.clamp_min(torch.finfo(usage.dtype).tiny).log()).sum()
        missing: Tensor = (math.log(self.codebook_size) - entropy) * keep.any()
        return missing

    @torch.no_grad()
    def _settle(self, vectors: Float[Tensor, "n codebook_dim"], keep: Bool[Tensor, " n"]) -> None:
        centres, counts = kmeans(vectors, keep, self.codebook_size, spherical=self.distance == "cosine")
        # Without a token on any rank there is nothing to settle on yet. A compiled graph cannot stop to look: it keeps
        # the codes, and the buffer says so.
        if not torch.compiler.is_compiling() and not counts.any():
            return
        any_token = counts.any()
        self._take(torch.where(any_token, centres, self.codebook), torch.where(any_token, counts, 1.0))
        self.founded.copy_(any_token)

    @torch.no_grad()
    def _take(self, codes: Float[Tensor, "codes codebook_dim"], counts: Float[Tensor, " codes"]) -> None:
        self.codebook.copy_(codes)
        self.usage.fill_(1 / self.codebook_size)
        if self.update == "ema":
            self.ema_counts.copy_(counts)
        if self.bridge is not None:
            self.bridge.lead_straight()
        self.founded.fill_(True)
        self._is_founded = True

    def _revive(self, vectors: Float[Tensor, "n codebook_dim"], keep: Bool[Tensor, " n"]) -> None:
        dead = self.usage < self.revive_below / self.codebook_size
        # All ranks have one usage, and so they agree that there is nothing to exchange. A compiled graph cannot look.
        if not torch.compiler.is_compiling() and not dead.any():
            return
        rows, available = random_rows(vectors, keep, self.codebook_size)
        # The i-th dead code takes the i-th drawn row, so that no row is taken twice.
        place = dead.cumsum(0) - 1
        revived = dead & (place < available)
        rows = rows[place.clamp_min(0)]
        self.codebook.copy_(torch.where(revived[:, None], rows, self.codebook))
        self.usage.copy_(torch.where(revived, 1 / self.codebook_size, self.usage))
        if self.update == "ema":
            self.ema_counts.copy_(torch.where(revived, 1.0, self.ema_counts))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_founded = bool(self.founded)


def frozen(
    quantizer: Quantizer,
    codes: Float[Tensor, "codes codebook_dim"],
    *,
    heads: int = 1,
    distance: Literal["euclidean", "cosine"] = "euclidean",
) -> VectorQuantizer:
    """A quantizer that looks codes up in a table that nothing moves, and projects as `quantizer` does."""
    made = VectorQuantizer(
        quantizer.dim,
        len(codes),
        codebook_dim=codes.shape[1],
        heads=heads,
        distance=distance,
        update="frozen",
        init="normal",
    )
    made.load_codebook(codes.detach())
    return projecting_as(quantizer, made)
