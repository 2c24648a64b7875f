"""The model: encoder -> quantizer -> decoder.

items --encoder--> latents --quantizer--> quantized, indices --decoder--> output
                              indices --lookup--> quantized
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn

from provq import hub, networks, quantizers
from provq.errors import UsageError, UserError
from provq.files import newest_saved, write_whole
from provq.networks import Decoder, Encoder
from provq.ops.masking import where_kept
from provq.quantizers import Quantizer
from provq.spec import build, describe

FORMAT = 1
# Options of networks that came later, at the values at which they change nothing.
_LATER = {"stages": 1, "shortcuts": False, "pair_rows": 0, "inverse_folding": False}


class Reconstruction(NamedTuple):
    """What a tokenizer makes of a batch; `loss` is the quantizer's own.

    `beside` is what the decoder says of the items in training, by name, for an objective to judge; most say nothing.
    """

    output: Float[Tensor, "b ..."]
    indices: Int[Tensor, "b ..."]
    loss: Float[Tensor, ""]
    beside: Mapping[str, Tensor]


@final
class Tokenizer(nn.Module):
    """Turns items into a grid of discrete tokens and back.

    Args:
        encoder: Items to latents.
        quantizer: Latents to tokens.
        decoder: Latents to items.
        metadata: Plain values that travel with the tokenizer and that it does not read, such as the size of the
            pictures it was trained on.

    Raises:
        UserError: The three do not agree on the length of a latent.
        UsageError: The decoder is made for another number of codebooks.
    """

    def __init__(
        self, encoder: Encoder, quantizer: Quantizer, decoder: Decoder, metadata: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not encoder.dim == quantizer.dim == decoder.dim:
            raise UserError(
                f"Tokenizer: encoder, quantizer and decoder must share one dim, "
                f"got {encoder.dim}, {quantizer.dim} and {decoder.dim}"
            )
        if decoder.stages not in (1, len(quantizer.codebook_sizes)):
            raise UsageError(
                f"Tokenizer: decoder.stages is {decoder.stages}, and the quantizer's number of codebooks is "
                f"{len(quantizer.codebook_sizes)}; let them be equal, or leave decoder.stages out"
            )
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.metadata = dict(metadata or {})

    def forward(self, items: Float[Tensor, "b ..."]) -> Reconstruction:
        """Items through the bottleneck: blended by hardness in training, hard in evaluation."""
        quantized, indices, loss = self.quantizer(self.encoder(items))
        output, beside = self.decoder.with_beside(quantized, *_stages(self.decoder, self.quantizer, indices))
        return Reconstruction(output, indices, loss, beside)

    def encode(self, items: Float[Tensor, "b ..."]) -> Int[Tensor, "b ..."]:
        """The tokens of items, always hard.

        Where an item of a ragged encoder lacks a position, the token is -1.

        Raises:
            UserError: The quantizer makes no tokens, or the encoder gives a value that is not finite where it must be;
                of a ragged one every item needs a position at least.
        """
        if not self.codebook_sizes:
            raise UserError(f"a tokenizer with a {type(self.quantizer).__name__} bottleneck makes no tokens")
        latents = self.encoder(items).float()
        present = latents.isfinite().all(-1)
        if not (present.flatten(1).any(1) if self.encoder.ragged else present).all():
            raise UserError("the encoder gives values that are not finite for these items; they have no tokens")
        return self.quantizer.nearest(latents).indices

    def decode(self, indices: Int[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The items that tokens stand for.

        With several codebooks -1 stands for a token that is left out, such as that of a later stage. Where the encoder
        is ragged, a position without any token comes out as NaN.

        Raises:
            UserError: An index is not that of a code.
        """
        several = len(self.codebook_sizes) > 1
        sizes = torch.tensor(self.codebook_sizes or (0,), device=indices.device)
        absent_may_be = several or bool(self.quantizer.members) or self.encoder.ragged
        wrong = (indices < (-1 if absent_may_be else 0)) | (indices >= (sizes if several else sizes[0]))
        if wrong.any():
            raise UserError(
                f"token {int(indices[wrong][0])} is out of range: this tokenizer has codebooks of {self.codebook_sizes}"
            )
        values = self.quantizer.lookup(indices)
        if self.encoder.ragged:
            values = where_kept(self.quantizer.has_token(indices), values, math.nan)
        # A quantizer computes in float32 even where the model was cast.
        kind = next((parameter.dtype for parameter in self.decoder.parameters()), values.dtype)
        return decoded(self.decoder, self.quantizer, values.to(kind), indices)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes, one entry a codebook."""
        return self.quantizer.codebook_sizes

    @property
    def config(self) -> dict[str, Any]:
        """The plain mapping from which `from_config` builds an equal tokenizer, weights aside."""
        return {
            "format": FORMAT,
            "encoder": _without_later(describe(self.encoder, networks.ENCODERS)),
            "quantizer": describe(self.quantizer, quantizers.KINDS),
            "decoder": _without_later(describe(self.decoder, networks.DECODERS)),
            "metadata": self.metadata,
        }

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name this tokenizer: a hash over its config and all that encoding reads.

        Two tokenizers with one fingerprint give the same tokens.
        """
        digest = hashlib.sha256(json.dumps({**self.config, "metadata": None}, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    def _files(self) -> dict[str, bytes]:
        """What is saved, by the names of files, in the order in which they are written."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return {
            "model.safetensors": save(weights, metadata={"format": "pt"}),
            "config.json": (json.dumps(self.config, indent=2) + "\n").encode(),
        }

    def _about(self) -> dict[str, str]:
        parts = (self.encoder, self.quantizer, self.decoder)
        reduction, several = self.encoder.reduction, len(self.codebook_sizes)
        return {
            "parts": ", ".join(type(part).__name__ for part in parts),
            "parameters": f"{sum(parameter.numel() for parameter in self.parameters()):,}",
            "codes": ", ".join(f"{size:,}" for size in self.codebook_sizes) or "none: nothing is quantized",
            "tokens": f"up to {several} for every {reduction} positions along each axis of an item",
            "fingerprint": f"`{self.fingerprint}`",
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "", local: bool = False) -> "Tokenizer":
        """Build a tokenizer, with fresh weights, from the tables `encoder`, `quantizer` and `decoder`.

        The length of a latent is the quantizer's.

        Args:
            config: The tables.
            where: What to put before the names of tables in error sentences.
            local: Whether a kind may name a class outside of provq; never for anything that was downloaded.

        Raises:
            UsageError: A table names an unknown kind, or holds a wrong key or value.
        """
        missing = [table for table in ("encoder", "quantizer", "decoder") if not isinstance(config.get(table), Mapping)]
        if missing:
            raise UsageError(f"{where}the table {missing[0]!r} is missing")
        if not isinstance(config.get("metadata", {}), Mapping | None):
            raise UsageError(f"{where}metadata: expected a mapping, got {config['metadata']!r}")
        quantizer: Quantizer = build(config["quantizer"], quantizers.KINDS, where=f"{where}quantizer", local=local)
        sides = []
        for side in ("encoder", "decoder"):
            table = dict(config[side])
            if table.pop("dim", quantizer.dim) != quantizer.dim:
                raise UsageError(f"{where}{side}.dim: it is the quantizer's, {quantizer.dim}; leave it out")
            sides.append(table)
        return cls(
            build(sides[0], networks.ENCODERS, where=f"{where}encoder", local=local, dim=quantizer.dim),
            quantizer,
            build(sides[1], networks.DECODERS, where=f"{where}decoder", local=local, dim=quantizer.dim),
            config.get("metadata"),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which is made where it is missing."""
        for name, content in self._files().items():
            write_whole(Path(folder) / name, content)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str = "Upload a tokenizer",
        about: Mapping[str, str] | None = None,
    ) -> str:
        """Put what `save_pretrained` writes, and a page about it, into a repository of the Hugging Face hub.

        The metadata travels along: that of a trained tokenizer names the folders that training read.

        Args:
            repository: Its name, `organisation/name`; it is made where it is missing.
            private: Whether nobody else may see it.
            revision: The branch, made where it is missing; the main branch by default.
            message: What the history of the repository says of it.
            about: What else the page says of the tokenizer, by what it is.

        Returns:
            The address of the commit.

        Raises:
            UsageError: The name has another form.
            UserError: `huggingface_hub` is not installed, the hub cannot be reached or refuses, or the repository is
                public though `private` is true.
        """
        if not hub.is_repository(repository):
            raise UsageError(f"push_to_hub: a repository is called organisation/name, got {repository!r}")
        page = hub.card(repository, {**self._about(), **(about or {})})
        files = {**self._files(), "README.md": page.encode()}
        return hub.upload(repository, files, private=private, revision=revision, message=message)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None, local: bool = False) -> "Tokenizer":
        """Read a tokenizer, in evaluation mode, from what `save_pretrained`, `push_to_hub` or a training run wrote.

        Nothing that is read can run code: unless `local` is true the config may name provq's own classes only.

        Args:
            folder: A saved tokenizer, or the folder of a run, whose newest checkpoint is taken; or, as text, the name
                `organisation/name` of a repository of the Hugging Face hub, where there is no such folder. Of that
                `config.json` and `model.safetensors` are downloaded once and kept in its cache.
            revision: A branch, a tag or a commit of the repository; the newest state of its main branch by default.
            local: Whether the config may name any importable class, as a recipe of one's own may; never for anything
                that was downloaded.

        Raises:
            UsageError: A revision was given for a folder.
            UserError: There is no tokenizer, its files are damaged or of a newer format, or the hub cannot be reached.
        """
        folder = _found(folder, revision, local)
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
        except Exception as error:  # safetensors raises its own type, which derives from Exception alone
            raise UserError(f"{folder}: cannot read the tokenizer: {error}") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            found = config.get("format") if isinstance(config, dict) else None
            raise UserError(f"{folder}/config.json: expected format {FORMAT}, found {found!r}; update provq")
        tokenizer = cls.from_config(config, where=f"{folder}/config.json: ", local=local)
        try:
            tokenizer.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{folder}/model.safetensors does not fit config.json: {error}") from error
        return tokenizer.eval()


def decoded(
    decoder: Decoder, quantizer: Quantizer, values: Float[Tensor, "b ... dim"], indices: Int[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """What a decoder makes of values; one of several stages is told of how many codebooks each item has tokens."""
    output: Tensor = decoder(values, *_stages(decoder, quantizer, indices))
    return output


def _stages(
    decoder: Decoder, quantizer: Quantizer, indices: Int[Tensor, "b ..."]
) -> tuple[()] | tuple[Int[Tensor, " b"]]:
    """What a decoder takes beside values."""
    # It is known beforehand which decoder this is, so a compiled graph holds one of the two.
    return () if decoder.stages == 1 else (quantizer.prefix(indices),)


def opened(tokenizer: Tokenizer | str | Path) -> Tokenizer:
    """The tokenizer itself, or the one that a folder or a repository holds."""
    return tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_pretrained(tokenizer)


def _without_later(table: dict[str, Any]) -> dict[str, Any]:
    """A table without later options that change nothing: tokenizers keep the fingerprints that they had before."""
    return {name: value for name, value in table.items() if name not in _LATER or value != _LATER[name]}


def _found(place: str | Path, revision: str | None, local: bool) -> Path:
    folder = Path(place)
    if isinstance(place, str) and hub.is_repository(place) and not folder.exists() and not local:
        return hub.download(place, ("config.json", "model.safetensors"), revision)
    if revision is not None:
        raise UsageError(f"revision={revision!r} is for a repository of the hub, and {folder} is read as a folder")
    return newest_saved(folder, "tokenizer")
