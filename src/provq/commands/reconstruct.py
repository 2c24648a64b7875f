"""Items through a tokenizer and back."""

from collections.abc import Sequence
from pathlib import Path

from provq.modalities import files_of
from provq.modalities.files import Reconstructions
from provq.tokenizer import Tokenizer, opened


def reconstruct(tokenizer: Tokenizer | str | Path, inputs: Sequence[str], *, out: str | Path) -> Reconstructions:
    """Write what comes back of pictures or structures when they pass through tokens.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        inputs: Pictures, folders, tars, patterns of tars; or structure files and folders of them.
        out: A folder, for one PNG a picture or one file a structure, the same that `encode` and `decode` make but that
            chains are laid upon their originals; or, of pictures, a file that ends in .png, for one sheet with each
            original beside its reconstruction.

    Returns:
        The files that were written, and, of structures, a row a chain: `file`, `chain`, `residues`, `rmsd` (angstrom),
        `tm`, `lddt` and `gdt_ts`.

    Raises:
        UserError: A path is missing, no input can be read, or there are too many for a sheet.
    """
    return files_of(opened(tokenizer)).reconstruct(inputs, Path(out))
