"""Stores on the Hub: what push_to_hub uploads opens again, against a stand-in on the loopback."""

import numpy as np
import pytest
from conftest import make_adata
from datasets import load_dataset
from hub_stand_in import StandIn
from huggingface_hub import DatasetCard, constants

from stformer_hf import CellStore
from stformer_hf.store.remote_files import RemoteFolder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # httpx, of huggingface_hub


@pytest.fixture
def hub(monkeypatch):
    with StandIn() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        of_files = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", of_files)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.fixture
def local(tmp_path):
    return CellStore.build(tmp_path / "local", make_adata(150), obs=["cell_type", "age"], rows_per_shard=64)


def opened(hub, tmp_path, name: str = "cells") -> CellStore:
    return CellStore(RemoteFolder(f"hf://datasets/someone/{name}", {"endpoint": hub.address}, tmp_path / "cache"))


def equal(one: CellStore, other: CellStore) -> bool:
    return (one.rows(slice(None)) != other.rows(slice(None))).nnz == 0 and one.obs.equals(other.obs)


def test_what_is_pushed_opens_again(hub, local, tmp_path):
    (local.path / "cache-1234.arrow").write_bytes(b"of datasets")
    address = local.push_to_hub("someone/cells", token="hf_of_nobody", commit_message="First cells")
    assert address == f"{hub.address}/someone/cells/commit/{1:040d}"
    assert [message for message, _ in hub.commits["someone/cells"]] == ["First cells"]  # whole
    assert hub.token == {"Bearer hf_of_nobody"}
    remote = opened(hub, tmp_path)
    assert equal(remote, local)
    remote.verify()
    read = [path for path in hub.asked if path.startswith("GET") and "/resolve/" in path and ".arrow" in path]
    assert read and all(f"/resolve/{1:040d}/" in path for path in read)
    assert not any("cache-1234" in name for name in hub.files("someone/cells"))


def test_load_dataset_and_the_viewer_read_the_card(hub, local, tmp_path):
    local.push_to_hub("someone/cells", token="hf_of_nobody")
    files = hub.files("someone/cells")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    card = DatasetCard.load(copy / "README.md")
    assert card.data.configs == [{"config_name": "default", "data_files": "*.arrow"}]
    assert 'CellStore("hf://datasets/someone/cells")' in card.text
    (copy / "state.json").unlink()  # by which load_dataset refuses local folders, but not those on the Hub
    dataset = load_dataset(str(copy), cache_dir=str(tmp_path / "datasets"))["train"]
    assert dataset.features == local.dataset.features
    assert dataset[:] == local.dataset[:]
    assert equal(CellStore(copy), local)


def test_an_open_store_stays_at_its_commit(hub, local, tmp_path):
    local.push_to_hub("someone/cells", token="hf_of_nobody")
    old = opened(hub, tmp_path)
    card = DatasetCard(hub.files("someone/cells")["README.md"].decode().replace("# cells", "# Cells of blood"))
    hub.commits["someone/cells"].append(("card", {"README.md": str(card).encode()}))
    selection = local.select(range(70, 10, -1))
    selection.push_to_hub("someone/cells", token="hf_of_nobody")
    files = hub.files("someone/cells")
    assert sorted(name for name in files if name.endswith(".arrow")) == ["data-00000-of-00001.arrow"]
    assert b"# Cells of blood" in files["README.md"]  # what users wrote is kept
    assert equal(old, local)
    with pytest.raises(ValueError, match="hf://datasets/someone/cells was replaced after"):
        old.must_be_unchanged()
    new = opened(hub, tmp_path)
    assert equal(new, selection)
    np.testing.assert_array_equal(new.lengths, selection.lengths)


def test_a_dataset_that_is_no_store_is_refused(hub, tmp_path):
    hub.commits["someone/texts"] = [("texts", {"README.md": b"# Texts"})]
    with pytest.raises(FileNotFoundError, match="no CellStore at hf://datasets/someone/texts"):
        opened(hub, tmp_path, "texts")
