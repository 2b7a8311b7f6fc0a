"""What a process reads of a stream."""

import pytest

from benchmarks import streams
from benchmarks.scale import _small_cells


@pytest.mark.parametrize("split", [True, False])
def test_the_first_of_some_processes_reads_an_epoch(tmp_path, split):
    _small_cells(tmp_path / "70.h5ad", 70)
    assert streams.first(tmp_path, 70, of=2, split=split) == 70
