"""Vision transformers for pictures of any size (in the manner of ViT-VQGAN, arXiv 2110.04627, section 3.1).

    (b, 3, H, W) --patches, embed--> (b, H/p, W/p, width) --blocks, norm--> --project--> (b, H/p, W/p, dim)
    and back in the mirror: embed, blocks, norm, paint, patches to pixels, smooth.

Unlike there, positions are rotary instead of learned, and seams between patches are smoothed.
"""

from typing import Annotated, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from provq.errors import UsageError
from provq.networks.base import Decoder, Encoder
from provq.networks.transformer import TransformerBlock, rotary_positions
from provq.spec import checked

Width = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=0)]
Heads = Annotated[int, Field(ge=1)]


@final
class VitEncoder(Encoder):
    """Pictures to a grid of latents, one for each patch.

    Args:
        dim: Length of a latent.
        width: Channels of a token; a multiple of four times `heads`.
        depth: Transformer blocks.
        heads: Attention heads a block.
        patch: How many pixels along a side become one latent.
        channels: Channels of the pictures.
        checkpoint_activations: Whether blocks are computed again in the backward pass, which takes less memory and
            as much time more as a second forward pass.

    Raises:
        UsageError: An argument is out of bounds, or `width` does not divide into heads of a multiple of 4 channels.
    """

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Width = 512,
        depth: Depth = 8,
        heads: Heads = 8,
        patch: Annotated[int, Field(ge=1)] = 16,
        channels: Annotated[int, Field(ge=1)] = 3,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        _require_even_heads(type(self).__name__, width, heads)
        self.dim, self.width, self.depth, self.heads = dim, width, depth, heads
        self.patch, self.channels, self.checkpoint_activations = patch, channels, checkpoint_activations
        self.reduction = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.blocks = GridTransformer(width, depth, heads, checkpoint_activations)
        self.project = nn.Linear(width, dim)

    def forward(self, items: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b rows columns dim"]:
        """Latents of pictures whose sides are multiples of `patch`."""
        patches = _to_patches(items, self.patch)
        # Under autocast a linear map gives bfloat16; what all blocks add to keeps the precision of the pictures.
        latents: Tensor = self.project(self.blocks(self.embed(patches).to(items.dtype)))
        return latents


@final
class VitDecoder(Decoder):
    """A grid of latents to pictures, one patch for each.

    Args:
        dim: Length of a latent.
        width: Channels of a token; a multiple of four times `heads`.
        depth: Transformer blocks.
        heads: Attention heads a block.
        patch: How many pixels along a side one latent becomes.
        channels: Channels of the pictures.
        checkpoint_activations: Whether blocks are computed again in the backward pass, which takes less memory and
            as much time more as a second forward pass.

    Raises:
        UsageError: An argument is out of bounds, or `width` does not divide into heads of a multiple of 4 channels.
    """

    @checked
    def __init__(
        self,
        dim: Annotated[int, Field(ge=1)],
        width: Width = 512,
        depth: Depth = 8,
        heads: Heads = 8,
        patch: Annotated[int, Field(ge=1)] = 16,
        channels: Annotated[int, Field(ge=1)] = 3,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        _require_even_heads(type(self).__name__, width, heads)
        self.dim, self.width, self.depth, self.heads = dim, width, depth, heads
        self.patch, self.channels, self.checkpoint_activations = patch, channels, checkpoint_activations
        self.embed = nn.Linear(dim, width)
        self.blocks = GridTransformer(width, depth, heads, checkpoint_activations)
        self.paint = nn.Linear(width, channels * patch**2)
        # No patch knows what its neighbour painted: only here are pixels on either side of a seam seen together. It
        # begins as the identity, and what it would blur inside of a patch the map before it can sharpen.
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.dirac_(self.smooth.weight)

    def forward(self, latents: Float[Tensor, "b rows columns dim"]) -> Float[Tensor, "b channels height width"]:
        """Pictures, not clipped to their range."""
        patches: Tensor = self.paint(self.blocks(self.embed(latents).to(latents.dtype)))
        pictures: Tensor = self.smooth(_to_pictures(patches, self.patch, self.channels))
        return pictures


@final
class GridTransformer(nn.Module):
    """Transformer blocks over a grid of tokens, and the norm behind the last of them.

    Args:
        width: Channels of a token.
        depth: Number of blocks.
        heads: Attention heads a block.
        checkpoint_activations: Whether blocks are computed again in the backward pass.
    """

    def __init__(self, width: int, depth: int, heads: int, checkpoint_activations: bool) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.checkpoint_activations = checkpoint_activations
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, grid: Float[Tensor, "b rows columns width"]) -> Float[Tensor, "b rows columns width"]:
        """The grid after all blocks, normalised."""
        rows, columns = grid.shape[1:3]
        rotary = rotary_positions(rows, columns, self.head_dim, grid.device)
        tokens = grid.flatten(1, 2)
        for block in self.blocks:
            tokens = (
                checkpoint(block, tokens, rotary, use_reentrant=False)
                if self.checkpoint_activations
                else block(tokens, rotary)
            )
        normalised: Tensor = self.norm(tokens)
        return normalised.reshape(grid.shape)


# torch's pixel_unshuffle and pixel_shuffle leave a batch of no pictures in its old shape.
def _to_patches(
    pictures: Float[Tensor, "b channels height width"], patch: int
) -> Float[Tensor, "b rows columns pixels"]:
    number, channels, height, width = pictures.shape
    split = pictures.reshape(number, channels, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _to_pictures(
    patches: Float[Tensor, "b rows columns pixels"], patch: int, channels: int
) -> Float[Tensor, "b channels height width"]:
    number, rows, columns, _ = patches.shape
    split = patches.reshape(number, rows, columns, channels, patch, patch)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(number, channels, rows * patch, columns * patch)


def _require_even_heads(owner: str, width: int, heads: int) -> None:
    """Each head has pairs of channels for rows and as many for columns."""
    step = 4 * heads
    if width % step:
        raise UsageError(
            f"{owner}: width must be a multiple of 4 * heads = {step}, got {width}; "
            f"nearest: {max(1, round(width / step)) * step}"
        )
