"""Models whose `[CLS]` is the whole cell in the hands of others: backends, compile, precision, ONNX, FSDP, PEFT."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import of_epoch
from scipy import sparse
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from stformer_hf import (
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneBertModel,
    GeneTokenizer,
)
from tests.models.test_whole_cell import randomise

CLASSES = [GeneBertModel, GeneBertForPhenotypicMLM, GeneBertForClassification, GeneBertForTokenClassification]
CELLS = ("cell_genes", "cell_counts", "cell_indptr", "measured_genes")


@pytest.fixture
def tokenizer(store):
    """With two genes that the store does not measure."""
    genes = [*store.gene_ids, "ENSG90000000000", "ENSG90000000001"]
    tokenizer = GeneTokenizer(
        genes, bin_edges=[0.5, 1.5], phenotypes={"cell_type": ["B cell", "T cell"]}, whole_cell=True, max_length=12
    )
    tokenizer.included_phenotypes = []
    return tokenizer


def make_model(tokenizer, model_class=GeneBertForClassification, backend="sdpa", **fields):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "residual_init": "normal"}
    if model_class is GeneBertForClassification:
        others.update(wide_head=True, num_labels=2)
    config = GeneBertConfig.from_tokenizer(tokenizer, **{**sizes, **others, **fields})
    model = model_class(config).eval()
    randomise(model)
    if hasattr(model, "wide_head"):
        torch.nn.init.normal_(model.wide_head.genes.weight, std=0.1)
    model.set_attn_implementation(backend)
    return model


def collator_of(model_class, tokenizer, packing=False):
    if model_class is GeneBertForPhenotypicMLM:
        return of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4, packing=packing))
    return DataCollatorForCellClassification(tokenizer, "cell_type", packing=packing)


@pytest.fixture
def batches(tokenizer, store):
    """The same cells, one of them without counts, padded and packed."""
    cells = store.__getitems__(range(9))
    return {packing: collator_of(GeneBertForClassification, tokenizer, packing)(cells) for packing in (False, True)}


# ---------------------------------------------------------------------- backends, padded and packed


@pytest.mark.parametrize("model_class", [GeneBertForPhenotypicMLM, GeneBertForClassification])
@pytest.mark.parametrize("backend", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_loss_logits_and_gradients_on_every_backend(tokenizer, store, backend, model_class):
    if backend == "flex_attention" and model_class is GeneBertForClassification:
        pytest.skip("compiled for a minute: one model shows it")
    results = []
    cells = store.__getitems__(range(9))
    for on, packing in (("eager", False), (backend, False), (backend, True)):
        batch = collator_of(model_class, tokenizer, packing)(cells)
        assert "measured_genes" in batch
        model = make_model(tokenizer, model_class, on)
        with torch.set_grad_enabled(on != "flex_attention"):  # has no backward on a CPU
            sparse = {"sparse_prediction": True} if model_class is GeneBertForPhenotypicMLM else {}
            output = model(**batch, **sparse)
        gradients = None
        if on != "flex_attention":
            output.loss.backward()
            gradients = torch.cat([p.grad.ravel() for p in model.parameters()])
        results.append((output.loss.detach(), output.logits.detach(), gradients))
    for loss, logits, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, results[0][1], atol=1e-5, rtol=1e-5)
        if gradients is not None:
            torch.testing.assert_close(gradients, results[0][2], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "packing"),
    [(GeneBertForPhenotypicMLM, True), (GeneBertForClassification, False)],
)
def test_compiles_without_a_graph_break(tokenizer, store, packing, model_class):
    torch._dynamo.reset()
    model = make_model(tokenizer, model_class)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    collate = collator_of(model_class, tokenizer, packing)
    for cells in (store.__getitems__(range(9)), store.__getitems__(range(20, 27))):
        batch, results = collate(cells), []
        for one in (model, compiled):
            model.zero_grad()
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                loss = one(**batch).loss
            loss.backward()
            results.append([loss, *(p.grad.clone() for p in model.parameters())])
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(tokenizer, batches, packing):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(tokenizer).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batches[packing]).loss.backward()
        gradients.append(torch.cat([p.grad.ravel() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_last_of_all_hidden_states_is_the_last_hidden_state(tokenizer, batches, model_class):
    """Of a model with a norm at its end too."""
    model = make_model(tokenizer, model_class)
    assert model.config.pre_norm
    batch = {name: value for name, value in batches[False].items() if name != "labels"}
    with torch.no_grad():
        outputs = model.base_model(**batch, output_hidden_states=True)
        through_the_head = model(**batch, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(through_the_head.hidden_states[-1], outputs.last_hidden_state)


# ---------------------------------------------------------------------- precision


@pytest.fixture
def large_cells(tokenizer):
    """Cells of more than 100,000 counts."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 2, (6, 40)) * 5000)
    assert counts.sum(1).min() > 100_000
    return tokenizer(sparse.csr_array(counts), genes=tokenizer.genes[:40], padding=True, return_tensors="pt")


@pytest.mark.parametrize("how", ["autocast", "weights", "weights, counts"])
def test_bfloat16_is_near_and_totals_are_exact(tokenizer, large_cells, how):
    exact = make_model(tokenizer)
    model = copy.deepcopy(exact)
    batch = dict(large_cells)
    if "weights" in how:
        model.bfloat16()
    if "counts" in how:  # as FSDP's mixed precision hands them on
        batch["cell_counts"] = batch["cell_counts"].bfloat16()
    statistics = model.gene_bert.cell_embedding.statistics
    for name, tensor in exact.gene_bert.cell_embedding.statistics.named_buffers():
        assert torch.equal(getattr(statistics, name), tensor)
        assert getattr(statistics, name).dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = model(**batch).logits
        cells = model.gene_bert.read_cells(*(batch.get(name) for name in CELLS))
        states = model.gene_bert.cell_embedding(cells)
    with torch.no_grad():
        wanted = exact(**large_cells).logits
        whole = exact.gene_bert.read_cells(*(large_cells.get(name) for name in CELLS))
        of_cells = exact.gene_bert.cell_embedding(whole)
    assert states.dtype == logits.dtype == torch.float32
    if "counts" not in how:
        assert torch.equal(cells.depth, whole.depth)
        present = large_cells["measured_genes"][0].double() @ statistics.shares.double()
        total = large_cells["cell_counts"].double().sum(1)
        torch.testing.assert_close(cells.depth.double(), total / present, rtol=1e-6, atol=0)
    if how == "autocast":
        assert torch.equal(states, of_cells)
    assert (states - of_cells).norm() < 0.01 * of_cells.norm()
    torch.testing.assert_close(logits, wanted, atol=0.1, rtol=0.1)


def test_gradients_in_bfloat16_are_near(tokenizer, batches):
    gradients = []
    for half in (False, True):
        model = make_model(tokenizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batches[False]).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.ravel() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loaded_in_half_precision_the_statistics_stay_float32(tokenizer, tmp_path, dtype):
    model = make_model(tokenizer)
    statistics = model.gene_bert.cell_embedding.statistics
    statistics.n_cells.fill_(1_234_567)  # infinite in float16
    statistics.shares[5] = 1e-8  # 0 in float16
    model.save_pretrained(tmp_path)
    for again in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype),
        AutoModelForSequenceClassification.from_pretrained(tmp_path).to(dtype),
    ):
        assert again.gene_bert.cell_embedding.genes.weight.dtype == dtype
        for name, tensor in statistics.named_buffers():
            found = getattr(again.gene_bert.cell_embedding.statistics, name)
            assert found.dtype == torch.float32
            assert torch.equal(found, tensor), name


# ---------------------------------------------------------------------- cut into parts


@pytest.mark.parametrize("n_parts", [2, 3])
def test_a_padded_batch_cut_along_the_first_dimension_is_the_same_cells(tokenizer, batches, n_parts):
    """As torch.nn.DataParallel, and accelerate with dispatch_batches or split_batches, cut it."""
    from accelerate.utils import slice_tensors

    model, batch = make_model(tokenizer), batches[False]
    assert {"cell_genes", "cell_counts", "measured_genes"} < batch.keys()
    assert {len(tensor) for tensor in batch.values()} == {9}
    with torch.no_grad():
        whole = model(**batch).logits
        chunks = zip(*(tensor.chunk(n_parts) for tensor in batch.values()), strict=True)
        parts = [model(**dict(zip(batch, chunk, strict=True))).logits for chunk in chunks]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
        parts = [model(**slice_tensors(batch, slice(first, first + 4))).logits for first in range(0, 9, 4)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_a_packed_batch_cut_along_the_first_dimension_is_refused(tokenizer, batches):
    from accelerate.utils import slice_tensors

    model, batch = make_model(tokenizer), batches[True]
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="packed batch .*split"):
        model(**slice_tensors(tensors, slice(0, 4)))
    with pytest.raises(ValueError, match="counts of 4 cells, but tokens of 9.* packed batch .*split"):
        model(**{**tensors, "cell_indptr": tensors["cell_indptr"][[0, 1, 2, 3, 9]]})
    some = {name: tensors[name][:, :20] for name in ("cell_genes", "cell_counts")}
    with pytest.raises(ValueError, match="packed batch .*split"):
        model(**{**tensors, **some})
    with pytest.raises(ValueError, match="cell_indptr"):
        model(**{name: value for name, value in tensors.items() if name != "cell_indptr"})


# ---------------------------------------------------------------------- saved, loaded, exported


@pytest.mark.parametrize("model_class", CLASSES)
def test_saved_and_loaded_by_the_auto_classes(tokenizer, batches, tmp_path, model_class):
    auto = {
        GeneBertModel: AutoModel,
        GeneBertForPhenotypicMLM: AutoModelForMaskedLM,
        GeneBertForClassification: AutoModelForSequenceClassification,
    }.get(model_class, model_class)
    model = make_model(tokenizer, model_class)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is model_class
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for packing in (False, True):
        batch = {name: value for name, value in batches[packing].items() if name != "labels"}
        encoder = AutoModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():  # equal weights; on some processors, sums depend on their place in memory
            torch.testing.assert_close(again(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(encoder(**batch)[0], model.base_model(**batch)[0], rtol=1e-5, atol=1e-6)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.whole_cell
    assert loaded.fingerprint == tokenizer.fingerprint == again.config.vocabulary_fingerprint


def test_every_weight_and_statistic_is_initialised(tokenizer):
    """On the meta device first, as from_pretrained does it."""
    config = make_model(tokenizer).config
    with torch.device("meta"):
        empty = GeneBertForClassification(config)
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(torch.nan)
    empty.init_weights()
    assert not [name for name, tensor in empty.state_dict().items() if tensor.isnan().any()]
    fresh = GeneBertForClassification(config)
    for name, tensor in fresh.gene_bert.cell_embedding.statistics.named_buffers():
        assert torch.equal(empty.gene_bert.cell_embedding.statistics.get_buffer(name), tensor)
    assert not empty.wide_head.genes.weight.any()
    assert empty.gene_bert.cell_embedding.genes.weight.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "with_measured"), [(GeneBertModel, False), (GeneBertForClassification, True)])
def test_runs_as_onnx_on_other_batches(tokenizer, store, tmp_path, model_class, with_measured):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_model(tokenizer, model_class)
    names = ["input_ids", "attention_mask", "token_type_ids", "cell_genes", "cell_counts"]
    names += ["measured_genes"] * with_measured

    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids, cell_genes, cell_counts, measured_genes=None):
            cells = {"cell_genes": cell_genes, "cell_counts": cell_counts, "measured_genes": measured_genes}
            return self.model(input_ids, attention_mask, token_type_ids, **cells)[0]

    collate = DataCollatorForCellClassification(tokenizer, "cell_type")
    batch = collate(store.__getitems__(range(5)))
    cells, length, entries = (torch.export.Dim(name, min=2) for name in ("cells", "length", "entries"))
    sizes = [{0: cells, 1: length}] * 3 + [{0: cells, 1: entries}] * 2 + [{0: cells}] * with_measured
    program = torch.onnx.export(
        Exported().eval(), tuple(batch[name] for name in names), dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows in (range(5), range(10, 30), range(2, 4)):
        batch = collate(store.__getitems__(rows))
        with torch.no_grad():
            expected = model(**{name: batch[name] for name in names})[0].numpy()
        given = zip((one.name for one in session.get_inputs()), names, strict=True)
        (found,) = session.run(None, {name: batch[of].numpy() for name, of in given})
        if model_class is GeneBertModel:
            attended = batch["attention_mask"].bool().numpy()
            found, expected = found[attended], expected[attended]
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="exporting whole cells needs torch 2.7")
@pytest.mark.parametrize("model_class", [GeneBertForPhenotypicMLM, GeneBertForClassification])
@pytest.mark.parametrize("n_labels", [0, 1])
def test_torch_export_takes_any_number_of_cells_tokens_and_genes(tokenizer, store, model_class, n_labels):
    """In its default mode, where the length of a tensor by `len` is a constant; with labels, the loss too."""
    model = make_model(tokenizer, model_class).eval()

    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(**batch)[0]

    def batch_of(rows):
        batch = dict(collator_of(model_class, tokenizer)(store.__getitems__(rows)))
        return batch if n_labels else {name: value for name, value in batch.items() if name != "labels"}

    first = batch_of(range(5))
    any_size = torch.export.Dim.DYNAMIC
    sizes = {
        name: dict.fromkeys(range(1 if name == "measured_genes" else value.ndim), any_size)
        for name, value in first.items()
    }
    program = torch.export.export(Exported(), (first,), dynamic_shapes=(sizes,))
    for rows in (range(5), range(10, 30), range(2, 4)):
        batch = batch_of(rows)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(batch), model(**batch)[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- PEFT


def test_lora_trains_and_merges(tokenizer, batches, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = make_model(tokenizer), batches[False]
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_lin", "v_lin"], modules_to_save=["classifier", "wide_head"]
    )
    tuned = peft.get_peft_model(model, settings)
    frozen = {name: p.detach().clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    assert any("cell_embedding" in name for name in frozen)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(tuned(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)
    tuned.eval()
    tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = tuned(**batch).logits
        loaded = peft.PeftModel.from_pretrained(make_model(tokenizer), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, logits, atol=1e-5, rtol=1e-5)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    assert type(merged) is GeneBertForClassification


def test_an_adapter_that_would_have_no_effect_is_refused(tokenizer, batches):
    peft = pytest.importorskip("peft")
    for layer in ("cell_embedding.genes", "wide_head.genes"):
        tuned = peft.get_peft_model(make_model(tokenizer), peft.LoraConfig(r=2, target_modules=["q_lin", layer]))
        with pytest.raises(ValueError, match=r"no effect on the embeddings cell_embedding.genes.*modules_to_save"):
            tuned(**batches[False])
    whole = peft.LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["genes"])
    tuned = peft.get_peft_model(make_model(tokenizer), whole)
    tuned(**batches[False]).loss.backward()
    learnt = [p.grad.abs().sum() > 0 for name, p in tuned.named_parameters() if "genes.modules_to_save" in name]
    assert learnt and all(learnt)


def test_the_embedding_of_whole_cells_is_not_offloaded(tokenizer, batches, tmp_path):
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    model_class, batch = type(make_model(tokenizer)), batches[False]
    places = {"gene_bert.cell_embedding": "cpu", "wide_head": "cpu", "gene_bert.embeddings": "disk"}
    places |= {name: "cpu" for name in ("gene_bert.final_norm", "dropout", "classifier")}
    places["gene_bert.layers"] = "disk"
    settings = {"offload_folder": tmp_path / "disk"}
    with torch.no_grad():
        wanted = model_class.from_pretrained(tmp_path / "model").eval()(**batch).logits
        model = model_class.from_pretrained(tmp_path / "model", device_map=places, **settings).eval()
        torch.testing.assert_close(model(**batch).logits, wanted)
        model = model_class.from_pretrained(
            tmp_path / "model", device_map={**places, "gene_bert.cell_embedding": "disk"}, **settings
        ).eval()
        with pytest.raises(ValueError, match="cannot be offloaded: keep them on a device"):
            model(**batch)


# ---------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_ddp_and_fsdp_on_unequal_numbers_of_counts():
    script = Path(__file__).with_name("whole_cell_ranks.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("the same") == 2
