"""Upload the files of a store to the Hub, such that stores, `load_dataset` and the dataset viewer read them there."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .replacing import STORE

_DATA_FILES = "*.arrow"
_TEXT = """
# {name}

Cells of a [stformer_hf](https://github.com/stformer-hf/stformer_hf) store, one per row: `genes` are rows of
`genes.parquet`, and `counts` their counts. A compact store has `cell_codes` and `large_counts` instead of both, which
`CellStore` decodes.

```python
from stformer_hf import CellStore

store = CellStore("hf://datasets/{repo_id}")
```
"""


def push_files(
    folder: Path,
    shards: Sequence[str],
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload the files of a store in one commit, and return its address; see `CellStore.push_to_hub`.

    `shards` are the names of its data files; `datasets` may have put files of its own beside them. The card of the
    dataset is kept, or made if there is none; its `configs` name the data files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    there = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
    if "README.md" in there:
        card = DatasetCard.load(
            api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision, force_download=True)
        )
    else:
        card = DatasetCard("---\n{}\n---\n" + _TEXT.format(name=repo_id.split("/")[-1], repo_id=repo_id))
    card.data["configs"] = [{"config_name": "default", "data_files": _DATA_FILES}]
    stale = [name for name in there if fnmatch(name, _DATA_FILES) and "/" not in name and name not in shards]
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(folder / name)) for name in (*shards, *STORE.other_files)),
            CommitOperationAdd("README.md", str(card).encode()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=commit_message,
        repo_type="dataset",
        revision=revision,
    )
    return commit.commit_url
