"""The GPU benchmark, every line of it on a CPU."""

import json
import time

import pytest

from benchmarks import gpu
from stformer_hf.training.throughput import BF16_PEAKS


@pytest.mark.slow
def test_every_line_runs_on_a_cpu(tmp_path):
    gpu.run(["--device", "cpu", "--minutes", "10", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "benchmark_gpu.json").read_text())
    assert set(found["profile"]) == {"packed", "packed, layers compiled"}
    assert all(part["both_tflops"] > 0 for part in found["attention"].values())
    assert not [name for name, part in found.items() if isinstance(part, dict) and "failed" in part]
    rows = {(row["size"], row["cells"], row["way"]): row for row in found["steps"]}
    assert {way for _, _, way in rows} == set(gpu.CONTENDERS)
    assert len(rows) == len(found["steps"]) == len(gpu.LATE) + 3 * (len(gpu.CONTENDERS) - len(gpu.LATE))
    for (_, _, way), row in rows.items():
        if "flex" in way:
            assert "backward" in row["failed"]  # which flex attention has on GPUs only
            continue
        assert row["tokens_per_second"] > 0
        _, batches, _, compiles = gpu.CONTENDERS[way]
        if batches == "one size" and compiles:
            # The last layer is computed for fewer tokens: compiled alone, it has another graph than the others share.
            assert row["graphs"] == {"model": 1, "layers": 2}[compiles]
    compiled = found["loader"]["0 workers, compiled"]
    assert compiled["graphs"] == 1 and 0 < compiled["padding_share"] < 1


def test_peaks_of_cards_are_those_of_the_log():
    for name, peak in BF16_PEAKS.items():
        found = next((value for key, value in gpu.PEAKS.items() if key in name), None)
        assert found is None or found == pytest.approx(peak, rel=2e-3), name


def test_a_part_that_takes_too_long_is_stopped_and_the_others_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 1)
    run = gpu._Run(gpu.parsed(["--device", "cpu", "--out", str(tmp_path)]))
    run.part("endless", lambda: time.sleep(60))
    run.part("short", lambda: {"n": 1})
    found = json.loads((tmp_path / "benchmark_gpu.json").read_text())
    assert "It took longer than 1 s" in found["endless"]["failed"] and found["short"] == {"n": 1}
    run.ends = time.monotonic()
    run.part("late", lambda: {"n": 2})
    assert "late" not in json.loads((tmp_path / "benchmark_gpu.json").read_text())
