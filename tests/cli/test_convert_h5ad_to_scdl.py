"""`convert_h5ad_to_scdl`, as a user types it."""

import numpy as np
import pytest
from conftest import make_adata

from stformer_hf.cli import convert_h5ad_to_scdl
from stformer_hf.compat.scdl import SingleCellMemMapDataset
from stformer_hf.compat.scdl_collection import SingleCellCollection


@pytest.fixture
def folder(tmp_path):
    """Three files, of which one has raw counts beside X; the last in the order of the paths comes first here."""
    for name, seed in (("b/one", 1), ("a/one", 2), ("a/two", 3)):
        adata = make_adata(12, 8, seed=seed)
        if name == "a/two":
            adata.raw = adata
            adata.X = adata.X * 0.5
        (tmp_path / "hdf5s" / name).parent.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(tmp_path / "hdf5s" / f"{name}.h5ad")
    return tmp_path / "hdf5s"


@pytest.fixture
def convert(folder, tmp_path):
    def run(*flags, data=folder, save=tmp_path / "out"):
        return convert_h5ad_to_scdl.main(["--data-path", str(data), "--save-path", str(save), *flags])

    return run


def test_a_folder_becomes_one_dataset(convert, folder, tmp_path, capsys):
    assert convert() == 0
    assert "out': 36 rows, 8 variables" in capsys.readouterr().out
    data = SingleCellMemMapDataset(tmp_path / "out")
    expected = np.concatenate([make_adata(12, 8, seed=seed).X.toarray() for seed in (2, 3, 1)])
    np.testing.assert_array_equal(data.store.rows(slice(None)).toarray(), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdf5s", "out"]


def test_the_flags_reach_the_dataset(convert, tmp_path, monkeypatch):
    load, given = SingleCellCollection.load_h5ad_multi, {}

    def in_threads(self, folder, use_processes, **options):  # processes take seconds to start
        given.update(options, use_processes=use_processes)
        load(self, folder, **options)

    monkeypatch.setattr(SingleCellCollection, "load_h5ad_multi", in_threads)
    assert convert("--use-X-not-raw", "--num-workers", "2", "--data-dtype", "float64") == 0
    assert given == {
        "max_workers": 2,
        "use_processes": True,
        "data_dtype": "float64",
        "use_X_not_raw": True,
        "paginated_load_cutoff": 10_000,
        "load_block_row_size": 1_000_000,
    }
    data = SingleCellMemMapDataset(tmp_path / "out")
    expected = make_adata(12, 8, seed=3).X.toarray() * 0.5
    np.testing.assert_array_equal(data.store.rows(slice(12, 24)).toarray(), expected)


def test_the_flags_of_bionemos_command_are_taken(convert, monkeypatch):
    load, given = SingleCellCollection.load_h5ad_multi, {}

    def in_threads(self, folder, use_processes, **options):
        given.update(options, use_processes=use_processes)
        load(self, folder, **options)

    monkeypatch.setattr(SingleCellCollection, "load_h5ad_multi", in_threads)
    assert convert("--use-mp", "--paginated-load-cutoff", "100", "--load-block-row-size", "5") == 0
    assert given["use_processes"] and given["max_workers"] == 1
    assert (given["paginated_load_cutoff"], given["load_block_row_size"]) == (100, 5)


def test_errors_are_told_and_the_command_can_be_called_again(convert, folder, tmp_path, capsys):
    def told(*flags, **paths):
        assert convert(*flags, **paths) == 1
        error = capsys.readouterr().err
        assert error.startswith("convert_h5ad_to_scdl: error: ") and error.count("\n") == 2
        return error

    assert "There are no h5ad files in " in told(data=tmp_path / "nothing")
    assert "hdf5s exists. Choose another --save-path" in told(save=folder)
    assert "data_dtype='number': use a numeric type" in told("--data-dtype", "number")
    assert "does not fit uint8 exactly" in told("--use-X-not-raw", "--data-dtype", "uint8")
    good = (folder / "a" / "two.h5ad").read_bytes()
    (folder / "a" / "two.h5ad").write_bytes(good[:2000])
    assert "two.h5ad could not be converted: " in told()
    assert not (tmp_path / "out").exists()
    (folder / "a" / "two.h5ad").write_bytes(good)
    assert convert("--data-dtype", "uint8") == 0
    assert len(SingleCellMemMapDataset(tmp_path / "out")) == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdf5s", "out"]


def test_wrong_command_lines_and_help(capsys):
    with pytest.raises(SystemExit) as raised:
        convert_h5ad_to_scdl.main(["--data-path", "x"])
    assert raised.value.code == 2
    with pytest.raises(SystemExit) as raised:
        convert_h5ad_to_scdl.main(["--help"])
    assert raised.value.code == 0
    assert "convert_h5ad_to_scdl --data-path hdf5s --save-path example_dataset" in capsys.readouterr().out
