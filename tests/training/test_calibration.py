"""Out-of-fold predictions belong to the weights that they were made for, however those are wrapped or stored."""

import copy
import pickle

import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import stformer_hf as sf
from stformer_hf.training.calibration import CALIBRATION_FILE, changed_weight, load_out_of_fold, sign, sketch_of

pytestmark = pytest.mark.usefixtures("two_folds")
STALE = "not those of this model: it was trained further"


@pytest.fixture(scope="module")
def cells() -> AnnData:
    rng = np.random.default_rng(0)
    types = np.arange(90) % 3
    rates = 2 + np.kron(np.eye(3), np.ones(10))
    adata = AnnData(rng.poisson(rates[types]).astype(np.float32))
    adata.var_names = [f"ENSG{i:011d}" for i in range(30)]
    adata.obs["type"] = np.array(["a", "b", "c"], object)[types]
    return adata


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration") / "model"
    return sf.finetune(cells, "type", num_train_epochs=0, output=folder), folder


@pytest.fixture
def classifier(trained):
    return copy.deepcopy(trained[0])


def rejects(cells, model, **settings) -> list[str]:
    found = cells.copy()
    sf.annotate(found, model, reject=0.3, **settings)
    return found.obs["stformer_label"].tolist()


def train(model, cells, folder, **changes) -> None:
    """Train as users of transformers do."""
    settings = {"max_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **changes}),
        data_collator=sf.DataCollatorForCellClassification(model.tokenizer, "type"),
        train_dataset=sf.CellStore.build(folder / "store", cells, obs=["type"], report=False),
    ).train()


def test_one_step_of_the_stock_trainer_is_noticed(classifier, trained, cells, tmp_path):
    expected = rejects(cells, classifier)
    assert "unknown" in expected and rejects(cells, str(trained[1])) == expected
    train(classifier, cells, tmp_path)
    with pytest.raises(ValueError, match=STALE):
        rejects(cells, classifier)
    with pytest.raises(ValueError, match=STALE):
        rejects(cells, nn.DataParallel(classifier))
    sf.annotate(cells.copy(), classifier)  # without rejection it is a classifier like any other

    folder = tmp_path / "model"  # saved over the checkpoint, as transformers does
    trained[0].save_pretrained(folder)
    trained[0].tokenizer.save_pretrained(folder)
    (folder / CALIBRATION_FILE).write_bytes((trained[1] / CALIBRATION_FILE).read_bytes())
    assert rejects(cells, str(folder)) == expected
    classifier.save_pretrained(folder)
    with pytest.raises(ValueError, match=STALE):
        rejects(cells, str(folder))


@pytest.mark.parametrize("part", ["", "classifier"])
def test_a_short_training_is_noticed_also_where_no_weight_is_0(part, classifier, cells, tmp_path):
    """As after pretraining: a weight of 0 shows the smallest step."""
    with torch.no_grad():
        for weight in classifier.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    sign(classifier.out_of_fold, classifier)
    rejects(cells, classifier)
    for name, weight in classifier.named_parameters():
        weight.requires_grad_(name.startswith(part))
    train(classifier, cells, tmp_path, max_steps=5, learning_rate=1e-5)
    with pytest.raises(ValueError, match=STALE):
        rejects(cells, classifier)


def test_an_adapter_is_noticed_once_it_changes_something(classifier, cells, tmp_path):
    peft = pytest.importorskip("peft")
    expected, tokenizer = rejects(cells, classifier), classifier.tokenizer
    adapted = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS"))
    assert rejects(cells, adapted) == expected  # it adds 0
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert rejects(cells, merged, tokenizer=tokenizer) == expected
    train(adapted, cells, tmp_path, max_steps=5, learning_rate=1e-3)
    for model in (adapted, adapted.merge_and_unload()):
        with pytest.raises(ValueError, match=STALE):
            rejects(cells, model, tokenizer=tokenizer)


def test_an_adapter_of_finetune_has_the_predictions_that_were_made_with_it(trained, cells, tmp_path):
    pytest.importorskip("peft")
    adapted = sf.finetune(
        cells, "type", model=str(trained[1]), lora=2, num_train_epochs=0, output=tmp_path / "adapter"
    )
    assert rejects(cells, adapted) == rejects(cells, str(tmp_path / "adapter"))
    with torch.no_grad():
        next(weight for name, weight in adapted.named_parameters() if "lora_B" in name).add_(0.1)
    with pytest.raises(ValueError, match=STALE):
        rejects(cells, adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_taken_for_training(dtype, classifier, trained, tmp_path):
    before = classifier.out_of_fold.weights
    loaded = AutoModelForSequenceClassification.from_pretrained(trained[1], dtype=dtype)
    assert changed_weight(before, loaded) is None
    loaded.float().save_pretrained(tmp_path)  # rounded weights
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert changed_weight(before, again) is None and changed_weight(before, again.to(dtype)) is None


@pytest.mark.parametrize("shape", [(1,), (7,), (4098,), (513, 128)])
@pytest.mark.parametrize("kind", ["constant", "normal", "tiny"])
def test_a_sketch_tells_rounding_from_a_change_of_a_fiftieth(shape, kind):
    model, generator = nn.Module(), torch.Generator().manual_seed(0)
    drawn = torch.full(shape, 1.0039) if kind == "constant" else torch.randn(shape, generator=generator)
    model.weight = nn.Parameter(drawn * (1e-6 if kind == "tiny" else 1.0))
    before = sketch_of(model)
    for dtype in (torch.bfloat16, torch.float16):
        assert changed_weight(before, copy.deepcopy(model).to(dtype)) is None
    with torch.no_grad():
        model.weight.mul_(1.2 if kind == "tiny" else 1.02)
    assert changed_weight(before, model) == "weight"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: pickle.loads(pickle.dumps(model))])
def test_wrapped_and_copied_models_keep_their_predictions(wrap, classifier, cells):
    wrapped = wrap(classifier)
    np.testing.assert_array_equal(load_out_of_fold(wrapped).rows, classifier.out_of_fold.rows)
    tokenizer = classifier.tokenizer
    assert rejects(cells, wrapped, tokenizer=tokenizer) == rejects(cells, classifier)


def test_predictions_of_an_earlier_version_are_not_checked(trained, classifier, cells, tmp_path):
    classifier.save_pretrained(tmp_path)
    classifier.tokenizer.save_pretrained(tmp_path)
    save_file(load_file(trained[1] / CALIBRATION_FILE), tmp_path / CALIBRATION_FILE)  # without metadata
    assert load_out_of_fold(tmp_path).weights is None
    assert rejects(cells, str(tmp_path)) == rejects(cells, classifier)
