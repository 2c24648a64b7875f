"""Repositories of the Hugging Face hub: named files come from there and go there, and never any code.

The library `huggingface_hub` is asked; it keeps what it downloaded in its cache and knows the user's token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from provq.errors import UserError

Kind = Literal["model", "dataset"]

_HOLDS: Mapping[Kind, str] = {"model": "tokenizer", "dataset": "token store"}
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_repository(words: str) -> bool:
    """Whether words have the form of a repository's name, `organisation/name`."""
    return _NAME.fullmatch(words) is not None


def download(repository: str, files: Sequence[str], revision: str | None = None, kind: Kind = "model") -> Path:
    """A folder with the named files of a repository; what else it holds is left there.

    Args:
        repository: Its name.
        files: The names of the files.
        revision: A branch, a tag or a commit; the newest state of the main branch by default.
        kind: Which kind of repository it is.

    Returns:
        The folder, which has the name of the commit.

    Raises:
        UserError: `huggingface_hub` is not installed, the hub cannot be reached, or it gives no such files.
    """
    about = f"{repository}: there is no such folder here, and"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"{about} the Hugging Face hub needs huggingface_hub: pip install 'provq[hub]'") from error
    try:
        folder = Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the library raises its own types, and those of its parts
        raise UserError(f"{about} {_reason(error, repository, kind)}") from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{about} the repository of that name on the hub holds no {missing[0]}: no {_HOLDS[kind]} of provq"
        )
    return folder


def upload(
    repository: str,
    files: Mapping[str, bytes | Path],
    *,
    kind: Kind = "model",
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload with provq",
) -> str:
    """Put files into a repository, which is made where it is missing, in one commit.

    Args:
        repository: Its name.
        files: What each file holds, by name, or the file on this machine that it is read from piece by piece; other
            files in the repository stay.
        kind: Which kind of repository it is.
        private: Whether nobody else may see it.
        revision: The branch, made where it is missing; the main branch by default.
        message: What the history says of it.

    Returns:
        The address of the commit.

    Raises:
        UserError: `huggingface_hub` is not installed, the hub cannot be reached or refuses, or the repository is there
            already and public though `private` is true.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise UserError(f"{repository}: pushing needs huggingface_hub: pip install 'provq[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        is_public = private and not api.repo_info(repository, repo_type=kind).private
        if revision is not None and not is_public:
            api.create_branch(repository, repo_type=kind, branch=revision, exist_ok=True)
        if not is_public:
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            commit = api.create_commit(
                repository, operations, repo_type=kind, commit_message=message, revision=revision
            )
            return str(commit.commit_url)
    except Exception as error:
        raise UserError(f"{repository}: nothing was pushed: {_reason(error, repository, kind)}") from error
    raise UserError(
        f"{repository}: nothing was pushed: the repository is there already and public; "
        "make it private in its settings, or choose another name"
    )


def card(repository: str, about: Mapping[str, str]) -> str:
    """The page of a repository that holds a tokenizer.

    Args:
        repository: Its name.
        about: What is said of the tokenizer, by what it is; plain words in one line.
    """
    return f"""---
library_name: provq
tags:
- vector-quantization
---

# {repository}

A vector-quantised tokenizer in the format of provq: it turns items into discrete tokens and back.

{_table(about)}
```python
import provq

tokenizer = provq.Tokenizer.from_pretrained("{repository}")
indices = tokenizer.encode(items)  # items as in training, such as pictures (batch, 3, height, width) in [-1, 1]
items = tokenizer.decode(indices)
```
"""


def store_card(repository: str, about: Mapping[str, str], split: str, files: str) -> str:
    """The page of a repository that holds a token store; its head tells `datasets` where the split is.

    Args:
        repository: Its name.
        about: What is said of the store, by what it is; plain words in one line.
        split: The name of the split.
        files: The pattern that the files of the split, and no others, match.
    """
    # In quotes, or else YAML takes a split called `no` or `1` for something else than a word.
    return f"""---
tags:
- provq
- vector-quantization
configs:
- config_name: default
  data_files:
  - split: {json.dumps(split, ensure_ascii=False)}
    path: {json.dumps(files, ensure_ascii=False)}
---

# {repository}

Discrete tokens of a data set in the format of provq: Parquet files with an item a row, and a manifest of checksums.

{_table(about)}
```python
import provq

store = provq.TokenStore("{repository}")  # downloaded once; every file is held against its checksum
item = store[0]  # indices in their shape (-1: absent), label (-1: none), key, split, augmentation
```

```python
import datasets

rows = datasets.load_dataset("{repository}", split="{split}")
row = rows[0]  # the same; indices in a row, the last axis fastest (None: absent), and their shape
```
"""


def _table(about: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in about.items())


def _reason(error: Exception, repository: str, kind: Kind) -> str:
    """What went wrong and what to do about it, in one line."""
    from huggingface_hub import errors

    words = " ".join(str(error).split())
    log_in = "log in by `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{'' if kind == 'model' else 'datasets/'}{repository}"
        return f"the one on the hub is gated: ask for access at {page}, and {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub shows none of that name: check the name, or {log_in} if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository of that name on the hub has no such revision: name a branch, a tag or a commit of it"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub does not allow it: {log_in}, with a token that may write there ({words})"
    if isinstance(error, errors.HFValidationError):
        return f"it cannot be a name on the hub: {words}"
    if isinstance(error, errors.HfHubHTTPError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"the hub answers with an error: {words}"
    return f"the hub cannot be reached: check the connection ({words})"
