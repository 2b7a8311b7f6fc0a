"""The GPU benchmark, every line of it on a CPU."""

import json
import time

import pytest
import torch

from benchmarks import gpu, gpu_kernels


def test_every_line_runs_on_a_cpu(tmp_path):
    gpu.run(["--device", "cpu", "--minutes", "10", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "benchmark_gpu.json").read_text())
    assert set(found["profile"]) == {"packed", "packed, layers compiled"}
    assert all(part["both_tflops"] > 0 for part in found["attention"].values())
    assert not [name for name, part in found.items() if isinstance(part, dict) and "failed" in part]
    rows = {(row["size"], row["cells"], row["way"]): row for row in found["steps"]}
    assert {way for _, _, way in rows} == set(gpu.CONTENDERS)
    assert len(rows) == len(found["steps"]) == len(gpu.CONTENDERS) + 2  # other cells, and another size
    for (_, _, way), row in rows.items():
        if "skipped" in row:
            assert way.endswith(("cuDNN", "flash-attn 2", "flash-attn 3", "flash-attn 4", "Liger"))
            continue
        if "flex" in way:
            assert "backward" in row["failed"]  # which flex attention has on GPUs only
            continue
        assert row["tokens_per_second"] > 0
        made = gpu.CONTENDERS[way]
        if made.layout == "one size" and made.compiled:
            # The last layer is computed for fewer tokens: compiled alone, it has another graph than the others share.
            assert row["graphs"] == {"model": 1, "layers": 2}[made.compiled]
    compiled = found["loader"]["0 workers, compiled"]
    assert compiled["graphs"] == 1 and 0 < compiled["padding_share"] < 1


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


def _attend_per_cell(query, key, value, cuts, scale):
    """Return attention (tokens, heads, head_dim) by its formula, and its weights, cell by cell."""
    for first, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        q, k, v = (part[first:end].transpose(0, 1) for part in (query, key, value))
        yield slice(first, end), q, k, v, (q @ k.mT * scale).softmax(-1)


def _cudnn_forward(query, key, value, bias, cuts, _, longest, __, sums, dropout=0.0, causal=False, *, scale):
    """Compute what torch's operator documents, for the arguments that are used here."""
    assert bias is None and cuts.dtype == torch.int32 and longest == cuts.diff().max() and sums
    assert not dropout and not causal
    out, none = torch.empty_like(query), torch.empty(0)
    for at, *_, v, weights in _attend_per_cell(query, key, value, cuts, scale):
        out[at] = (weights @ v).transpose(0, 1)
    return out, none, cuts, cuts, longest, longest, none, none, none


def _cudnn_backward(grad, query, key, value, *given, scale):
    cuts = next(part for part in given if torch.is_tensor(part) and part.dtype == torch.int32)
    grads = tuple(torch.empty_like(query) for _ in range(3))
    for at, q, k, v, weights in _attend_per_cell(query, key, value, cuts, scale):
        g = grad[at].transpose(0, 1)
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        for of, found in zip(grads, (of_scores @ k, of_scores.mT @ q, weights.mT @ g), strict=True):
            of[at] = found.transpose(0, 1)
    return grads


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_cudnn_attention_forward"), reason="this torch has no such operator")
def test_kernels_are_called_as_torch_documents_it(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "missing", lambda kernel, on_gpu: None if kernel == "cuDNN" else "not here")
    cuts = torch.tensor([0, 3, 10, 11], dtype=torch.int32)
    packing = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 7, "max_length_k": 7}
    states = torch.randn(3, 1, 2, 11, 8, generator=torch.manual_seed(0), requires_grad=True)
    expected = torch.empty(1, 11, 2, 8)
    query, key, value = states.detach().squeeze(1).transpose(1, 2)
    for at, *_, v, weights in _attend_per_cell(query, key, value, cuts, 8**-0.5):
        expected[0, at] = (weights @ v).transpose(0, 1)
    grads = {}
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cudnn_attention_forward", _cudnn_forward, "CPU")
        library.impl("_cudnn_attention_backward", _cudnn_backward, "CPU")
        (attend,) = gpu_kernels.attention_kernels(True).values()
        with gpu_kernels.packed_attention_by("cuDNN"):
            in_layers = gpu_kernels.ALL_ATTENTION_FUNCTIONS[gpu_kernels.PACKED_SDPA]
        nested = gpu_kernels.nested_attention_forward
        for name, made in (
            ("alone", attend(*states, **packing)),
            ("in layers", in_layers(torch.nn.Identity(), *states, None, scaling=8**-0.5, **packing)[0]),
            ("nested", nested(torch.nn.Identity(), *states, None, scaling=8**-0.5, **packing)[0]),
        ):
            torch.testing.assert_close(made, expected)
            (grads[name],) = torch.autograd.grad((made**2).sum(), states)
    by_sdpa = gpu_kernels.ALL_ATTENTION_FUNCTIONS[gpu_kernels.PACKED_SDPA]
    assert by_sdpa is gpu_kernels.packed_sdpa_attention_forward
    made, _ = by_sdpa(torch.nn.Identity(), *states, None, scaling=8**-0.5, **packing)
    (wanted,) = torch.autograd.grad((made**2).sum(), states)
    for found in grads.values():
        torch.testing.assert_close(found, wanted)
