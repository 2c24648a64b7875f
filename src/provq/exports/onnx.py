"""A tokenizer as two ONNX networks, which run without torch and without provq.

    encode.onnx: items (batch, ...) float32 --> indices (batch, ...) int64
    decode.onnx: indices --> items

Quantizers are traced as they are. What has no counterpart in ONNX, or none that onnxruntime can run, is written in
other operations of torch (`_DECOMPOSITIONS`) before torch translates the graph.
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provq.errors import UserError
from provq.exports.base import Exported
from provq.files import appearing
from provq.ops import nearest  # noqa: F401  declares the operator that is replaced below
from provq.tokenizer import FORMAT, Tokenizer, decoded

OPSET = 18
_CHECKED = 3  # items; another number than the graph is traced with
# A random item may lie so near to the border between two codes that two libraries disagree on it.
_MOST_DIFFERENT = 0.01
_TOLERANCE = 1e-3


def export_onnx(tokenizer: Tokenizer, out: Path, item: Float[Tensor, "1 ..."]) -> Exported:
    """Write `encode.onnx` and `decode.onnx` into a folder; neither appears unless both agree with torch.

    Networks compute in float32. The number of items is free, their other axes are those of `item`. Neither network
    looks whether values are finite or indices in range.

    Args:
        tokenizer: It is left as it was.
        out: The folder, made where it is missing.
        item: One item of the shape that the networks are to take; its values play no part.

    Returns:
        The two files, and what the comparison in onnxruntime gave, where that is installed.

    Raises:
        UserError: onnx or onnxscript is not installed, the tokenizer makes no tokens, torch cannot translate its
            networks, or onnxruntime computes something else.
    """
    _require_onnx()
    if not tokenizer.codebook_sizes:
        raise UserError(f"a tokenizer with a {type(tokenizer.quantizer).__name__} bottleneck makes no tokens to export")
    tokenizer = copy.deepcopy(tokenizer).cpu().float().eval()
    # Two, since a tracer takes one for a constant.
    items = torch.zeros(2, *item.shape[1:])
    with torch.no_grad():
        indices = tokenizer.encode(items)
    encoding = _translated(_Encoding(tokenizer), items, "items", "indices", tokenizer)
    decoding = _translated(_Decoding(tokenizer), indices, "indices", "items", tokenizer)
    encode, decode = out / "encode.onnx", out / "decode.onnx"
    with appearing(encode) as unfinished_encode, appearing(decode) as unfinished_decode:
        encoding.save(unfinished_encode, external_data=False)
        decoding.save(unfinished_decode, external_data=False)
        note = _compared(tokenizer, item, unfinished_encode, unfinished_decode)
    return Exported([encode, decode], note)


@final
class _Encoding(nn.Module):
    """What `Tokenizer.encode` computes, with a plain table of codes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.quantizer = tokenizer.quantizer.baked()

    def forward(self, items: Float[Tensor, "b ..."]) -> Int[Tensor, "b ..."]:
        """The tokens of items."""
        return self.quantizer.assign(self.quantizer.enter(self.encoder(items)))


@final
class _Decoding(nn.Module):
    """What `Tokenizer.decode` computes, with a plain table of codes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.decoder = tokenizer.decoder
        self.quantizer = tokenizer.quantizer.baked()

    def forward(self, indices: Int[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The items that tokens stand for."""
        return decoded(self.decoder, self.quantizer, self.quantizer.lookup(indices), indices)


def _translated(
    network: nn.Module, values: Tensor, given: str, made: str, tokenizer: Tokenizer
) -> torch.onnx.ONNXProgram:
    """A network, traced on an example, that says whose it is."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    free = ({0: torch.export.Dim("batch")},)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(network, (values,), dynamic_shapes=free, strict=False)
            translated = torch.onnx.export(
                program.run_decompositions(_DECOMPOSITIONS),
                dynamo=True,
                opset_version=OPSET,
                input_names=[given],
                output_names=[made],
                dynamic_shapes=free,
                verbose=False,
            )
        except Exception as error:  # torch raises whatever its parts raise
            kind = type(tokenizer.encoder if given == "items" else tokenizer.decoder).__name__
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"a tokenizer with a {kind} cannot be written as ONNX by torch: {reason}") from error
    assert translated is not None  # it is where dynamo is true
    # Traces name the folders of whoever exports.
    ClearMetadataAndDocStringPass()(translated.model)
    translated.model.metadata_props.update(
        {
            "provq_format": str(FORMAT),
            "provq_fingerprint": tokenizer.fingerprint,
            "provq_codebook_sizes": json.dumps(tokenizer.codebook_sizes),
        }
    )
    return translated


def _compared(tokenizer: Tokenizer, item: Float[Tensor, "1 ..."], encode: Path, decode: Path) -> str:
    """Run both networks on random items in [-1, 1], and say how far they are from the tokenizer's own."""
    try:
        import onnxruntime
    except ImportError:
        return f"opset {OPSET}; not checked: onnxruntime is not installed"
    chance = torch.Generator().manual_seed(0)
    items = torch.rand(_CHECKED, *item.shape[1:], generator=chance) * 2 - 1
    with torch.no_grad():
        indices = tokenizer.encode(items)
        output = tokenizer.decode(indices)
    try:
        found = _run(onnxruntime, encode, items)
        made = _run(onnxruntime, decode, indices)
    except Exception as error:  # onnxruntime has a type for each of its codes
        reason = " ".join(str(error).split())
        raise UserError(f"onnxruntime cannot run the ONNX networks, which are not written: {reason}") from error
    different = int((found != indices).sum())
    furthest = float((made - output).abs().max())
    told = (
        f"opset {OPSET}; checked with onnxruntime {onnxruntime.__version__} on {_CHECKED} random items: "
        f"{indices.numel() - different:,} of {indices.numel():,} indices equal, decoded items within {furthest:.1e}"
    )
    allowed = _TOLERANCE * max(1.0, float(output.abs().max()))
    if different > _MOST_DIFFERENT * indices.numel() or not furthest <= allowed:
        raise UserError(f"the ONNX networks do not compute what the tokenizer does, and are not written: {told}")
    return told


def _run(onnxruntime: Any, path: Path, values: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    return torch.from_numpy(output)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the export to ONNX needs onnx and onnxscript ({error}): pip install 'provq[onnx]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch tells about libraries that it does not find and parts of itself that it will replace."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _nearest_code(vectors: Float[Tensor, "n dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, " n"]:
    """The search of `ops.nearest`, with the one table of vectors x codes that it does without."""
    centre = codebook.mean(0)
    centred = codebook - centre
    return ((vectors - centre) @ centred.T - centred.square().sum(1) / 2).argmax(1)


def _where(condition: Bool[Tensor, "..."], chosen: Tensor, other: Tensor) -> Any:
    """A choice between truth values, which onnxruntime has not; other choices stay."""
    if chosen.dtype != torch.bool:
        return NotImplemented
    return (condition & chosen) | (~condition & other)


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.provq.nearest_code.default: _nearest_code,
    torch.ops.aten.where.self: _where,
    # Only the longer names of shifts have a translation.
    torch.ops.aten.__lshift__.Tensor: torch.bitwise_left_shift,
    torch.ops.aten.__rshift__.Tensor: torch.bitwise_right_shift,
}
