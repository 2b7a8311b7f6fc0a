"""Stores on S3: a real client and file system, against the server of moto on the loopback."""

import pickle
import time

import numpy as np
import pytest
from conftest import make_adata
from torch.utils.data import DataLoader

from stformer_hf import CellStore, collate_cells
from stformer_hf.store import block_cache
from stformer_hf.store.remote_files import RemoteFolder

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
servers = pytest.importorskip("moto.server")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of botocore and moto, about themselves
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def server():
    server = servers.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A bucket, which is found by the environment as that of a user is; blocks hold a few cells."""
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", 512)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "of nobody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
        "STFORMER_HF_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket=tmp_path.name.replace("_", "-").lower())
    return tmp_path.name.replace("_", "-").lower()


def upload(store: CellStore, bucket: str) -> str:
    client = boto3.client("s3")
    for file in store.path.iterdir():
        client.put_object(Bucket=bucket, Key=f"atlas/{file.name}", Body=file.read_bytes())
    return f"s3://{bucket}/atlas"


@pytest.fixture
def local(tmp_path):
    return CellStore.build(tmp_path / "local", make_adata(150, 400), obs=["cell_type", "age"], rows_per_shard=64)


@pytest.mark.parametrize("compact", [False, True])
def test_cells_are_those_of_the_local_store(bucket, local, tmp_path, compact):
    if compact:
        local = CellStore.build(tmp_path / "compact", local, obs="all", compact=True, report=False)
    remote = CellStore(upload(local, bucket))
    rows = np.random.default_rng(0).integers(0, 150, 60)
    for store in (remote, pickle.loads(pickle.dumps(remote)), CellStore(RemoteFolder(f"s3://{bucket}/atlas"))):
        assert (store.rows(rows) != local.rows(rows)).nnz == 0
    assert remote.obs.equals(local.obs)
    remote.verify()
    loader = DataLoader(remote, 16, num_workers=2, collate_fn=collate_cells)
    assert np.concatenate([batch["cell_id"] for batch in loader]).tolist() == list(range(150))
    saved = remote.save(tmp_path / "saved")
    assert (saved.rows(slice(None)) != local.rows(slice(None))).nnz == 0


def test_a_replaced_store_is_noticed(bucket, local, tmp_path):
    remote = CellStore(upload(local, bucket))
    other = CellStore.build(tmp_path / "other", local.select(slice(None, None, -1)), obs="all", rows_per_shard=64)
    upload(other, bucket)
    with pytest.raises(ValueError, match="was replaced after this object opened it"):
        remote.rows(slice(None))
    assert CellStore(remote.path.address).obs_names[0] == local.obs_names[-1]


def test_what_is_not_there_is_not_tried_again(bucket, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for a new attempt"))
    with pytest.raises(FileNotFoundError, match=rf"There is no CellStore at s3://{bucket}/none"):
        CellStore(f"s3://{bucket}/none")
    with pytest.raises(FileNotFoundError, match="There is no CellStore at s3://no-such-bucket/atlas"):
        CellStore("s3://no-such-bucket/atlas")
