"""Pictures in a data set of the Hugging Face hub, or in a folder laid out like one.

    hf:NAME[?config=..&split=..&image=COLUMN&label=COLUMN] --open_hub--> HubSource

The data set is downloaded once, by the `datasets` library, and read from its cache; no code of its owner is run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final
from urllib.parse import parse_qsl

from PIL import Image

from provq.errors import UsageError, UserError, nearest
from provq.modalities.image.pixels import UnreadableImage, read_image
from provq.modalities.image.sources import ImageSource, Split
from provq.modalities.image.tars import LARGEST_MEMBER

if TYPE_CHECKING:
    from datasets import Dataset

OPTIONS = ("config", "split", "image", "label")
_SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "dev", "test")}


@final
class HubSource(ImageSource):
    """The pictures in one column of a table, and the classes in another."""

    def __init__(self, rows: "Dataset", name: str, labels: Sequence[int], classes: tuple[str, ...]) -> None:
        super().__init__([f"{name}[{index}]" for index in range(len(rows))], labels, classes)
        self._rows = rows

    def read(self, index: int) -> Image.Image:
        """The picture in the row at `index`."""
        (value,) = self._rows[index].values()
        if value is None:
            raise UnreadableImage("there is no picture in this row")
        data = value["bytes"]
        return read_image(_bytes_of(Path(value["path"])) if data is None else data)


def open_hub(words: str, *, split: Split) -> HubSource:
    """The pictures that the words behind `hf:` name.

    Args:
        words: A name such as `org/name`, or a folder of Parquet files or pictures; options behind a question mark:
            `config`, `split`, and the columns `image` and `label`. Left out, the split is the one whose name says that
            it is to train on or is held out, and the columns are the only one of pictures and the only one of classes.
        split: Which of them is wanted, where the words do not say.

    Raises:
        UsageError: An option is unknown, or names a split or a column that is not there.
        UserError: `datasets` is not installed, or the data set cannot be read or downloaded.
    """
    name, _, query = words.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in OPTIONS:
            raise UsageError(f"data 'hf:{words}': unknown option {option!r}; {nearest(option, OPTIONS)}")
    rows = _loaded(words, name, options, split)
    image = options.get("image") or _only(words, rows, "Image", "image")
    label = options.get("label") or _only(words, rows, "ClassLabel", "label", optional=True)
    for column in filter(None, (image, label)):
        if column not in rows.features:
            raise UsageError(f"data 'hf:{words}': no column {column!r}; {nearest(column, rows.features)}")
    if _kind(rows, image) != "Image":
        raise UsageError(f"data 'hf:{words}': the column {image!r} holds no pictures, but {rows.features[image]}")
    labels, classes = ([-1] * len(rows), ()) if label is None else _classes(words, rows, label)

    from datasets import Image as Pictures

    pictures = rows.select_columns([image]).cast_column(image, Pictures(decode=False))
    return HubSource(pictures, f"{name}/{rows.split}", labels, classes)


def _loaded(words: str, name: str, options: dict[str, str], split: Split) -> "Dataset":
    try:
        from datasets import Dataset, get_dataset_split_names, load_dataset
    except ImportError as error:
        raise UserError(f"data 'hf:{words}': needs datasets ({error}): pip install 'provq[hub]'") from error
    config = options.get("config")
    # The library raises whatever its parts raise: errors of the network, of files, of Arrow.
    try:
        splits = get_dataset_split_names(name, config)
    except Exception as error:
        raise UserError(f"data 'hf:{words}': it cannot be found or reached: {' '.join(str(error).split())}") from error
    wanted = options.get("split") or next((each for each in _SPLITS[split] if each in splits), None)
    if wanted is None or wanted.partition("[")[0] not in splits:
        raise UsageError(f"data 'hf:{words}': it has the splits {', '.join(splits)}; name one as hf:{name}?split=...")
    try:
        rows = load_dataset(name, config, split=wanted)
    except Exception as error:
        raise UserError(f"data 'hf:{words}': it cannot be read: {' '.join(str(error).split())}") from error
    assert isinstance(rows, Dataset)  # of one split, not streamed
    return rows


def _kind(rows: "Dataset", column: str) -> str:
    return type(rows.features[column]).__name__


def _only(words: str, rows: "Dataset", kind: str, option: str, *, optional: bool = False) -> Any:
    """The one column of a kind; none may be there where it is optional."""
    found = [column for column in rows.features if _kind(rows, column) == kind]
    if len(found) == 1 or (optional and not found):
        return found[0] if found else None
    raise UsageError(
        f"data 'hf:{words}': it has {', '.join(found) or 'no columns'} of {kind} among {', '.join(rows.features)}; "
        f"say which with {option}=COLUMN"
    )


def _classes(words: str, rows: "Dataset", column: str) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row, -1 where there is none, and the names of the classes."""
    values = rows[column][:]
    if _kind(rows, column) == "ClassLabel":
        return [-1 if value is None else int(value) for value in values], tuple(rows.features[column].names)
    if all(value is None or isinstance(value, str | int) for value in values):
        names = sorted({value for value in values if value is not None})
        numbers = {value: number for number, value in enumerate(names)}
        return [numbers.get(value, -1) for value in values], tuple(map(str, names))
    raise UsageError(f"data 'hf:{words}': the column {column!r} holds no classes, but {rows.features[column]}")


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_MEMBER:
            raise UnreadableImage("it is no file, or larger than any picture")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"the file cannot be read: {error.strerror}") from error
