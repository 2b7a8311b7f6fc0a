"""STFormerPreCollator and files of lengths."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from stformer_hf import GeneTokenizer, STFormerPreCollator, load_example_lengths, write_example_lengths

TOKENS = {"<pad>": 0, "<mask>": 1, **{f"g{i}": i + 2 for i in range(20)}}
EXAMPLES = [{"input_ids": [2, 3, 4]}, {"input_ids": [5]}, {"input_ids": [6, 7, 8, 9, 10]}]


@pytest.fixture
def collator():
    return STFormerPreCollator(TOKENS)


def test_names_and_ids(collator):
    assert len(collator) == 22
    assert collator.convert_tokens_to_ids("g3") == 5
    assert collator.convert_tokens_to_ids(["<mask>", "g0", "none"]) == [1, 2, None]
    assert collator.convert_ids_to_tokens(5) == "g3"
    assert collator.convert_ids_to_tokens([1, 2, 99]) == ["<mask>", "g0", None]
    assert collator.get_special_tokens_mask([0, 1, 2, 0]) == [1, 1, 0, 1]
    assert collator.get_special_tokens_mask([0, 5], already_has_special_tokens=True) == [1, 0]
    with_ends = STFormerPreCollator({**TOKENS, "<cls>": 22, "<eos>": 23})
    assert with_ends.get_special_tokens_mask([22, 2, 23]) == [1, 0, 1]
    assert collator(EXAMPLES)["input_ids"] == [example["input_ids"] for example in EXAMPLES]


def test_padding_heeds_its_arguments_and_truncates(collator):
    batch = collator.pad(EXAMPLES)
    assert batch["input_ids"] == [[2, 3, 4, 0, 0], [5, 0, 0, 0, 0], [6, 7, 8, 9, 10]]
    assert batch["attention_mask"] == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert collator.pad(collator(EXAMPLES))["input_ids"] == batch["input_ids"]
    assert collator.pad(EXAMPLES, max_length=2)["input_ids"] == [[2, 3], [5, 0], [6, 7]]
    assert collator.pad(EXAMPLES, max_length=7, return_tensors="pt")["input_ids"].shape == (3, 7)
    assert collator.pad(EXAMPLES, padding=False, max_length=2)["input_ids"] == [[2, 3], [5], [6, 7]]
    tensors = collator.pad(EXAMPLES, pad_to_multiple_of=4, return_tensors="pt")
    assert tensors["input_ids"].shape == tensors["attention_mask"].shape == (3, 8)
    assert tensors["input_ids"].dtype == torch.int64
    labelled = [{**example, "labels": example["input_ids"], "length": 1} for example in EXAMPLES]
    batch = collator.pad(labelled, return_tensors="np")
    assert batch["labels"][1].tolist() == [5, -100, -100, -100, -100]
    assert batch["length"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="padding must be True"):
        collator.pad(EXAMPLES, padding="left")
    for wrong in ([], {"input_ids": [4, 4]}):
        with pytest.raises(ValueError, match="no examples|a list of cells"):
            collator.pad(wrong)
    with pytest.raises(ValueError, match="needs max_length"):
        collator.pad(EXAMPLES, padding="max_length")


def test_the_stock_collator_masks_with_it(collator):
    torch.manual_seed(0)
    many = [{"input_ids": list(range(2, 3 + i % 19))} for i in range(200)]
    batch = DataCollatorForLanguageModeling(collator, mlm_probability=0.3)(many)
    labelled = batch["labels"] != -100
    assert not labelled[batch["attention_mask"] == 0].any()
    share = labelled.sum() / batch["attention_mask"].sum()
    assert 0.25 < share < 0.35


def test_it_is_the_vocabulary_of_a_rank_tokenizer(collator, tmp_path):
    (path,) = collator.save_pretrained(tmp_path / "new")
    genes = {f"g{i}": 1.0 for i in range(20)}
    assert (
        GeneTokenizer.from_token_dictionary(path, genes).get_vocab() == STFormerPreCollator(path).token_dict == TOKENS
    )


def test_bad_dictionaries_raise():
    with pytest.raises(ValueError, match="<mask>"):
        STFormerPreCollator({"<pad>": 0, "g": 1})
    for wrong in (2.7, True, "7", None, -3):
        with pytest.raises(ValueError, match="must be an integer|negative"):
            STFormerPreCollator({**TOKENS, "x": wrong})
    with pytest.raises(ValueError, match="same id"):
        STFormerPreCollator({"<pad>": 0, "<mask>": 0})


# ---------------------------------------------------------------------- lengths


def test_lengths_of_lists_stores_and_datasets_come_back(tmp_path, store):
    file = tmp_path / "lengths.json"
    for source, wanted in (
        ([3, 1, 2], [3, 1, 2]),
        (np.array([5, 0], np.uint16), [5, 0]),
        ([], []),
        (store, store.lengths.tolist()),
        (Dataset.from_dict({"length": [4, 2]}), [4, 2]),
        (Dataset.from_dict({"input_ids": [[1, 2, 3], [], [4]]}).select([2, 0]), [1, 3]),
    ):
        write_example_lengths(source, file)
        assert load_example_lengths(file) == wanted
    (tmp_path / "old.pkl").write_bytes(pickle.dumps([7, np.int64(8)]))
    assert load_example_lengths(tmp_path / "old.pkl") == [7, 8]


def test_bad_lengths_raise(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"echo harm > {tmp_path / 'harm'}",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([1, Evil()]))
    with pytest.raises(ValueError, match="refused: it refers to (posix|nt).system"):
        load_example_lengths(tmp_path / "evil.pkl")
    assert not (tmp_path / "harm").exists()
    for wrong in ([1.5], [-1], [[], []], {"a": 1}, "123", [[1], [2]], 5):
        (tmp_path / "x.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"x.json: Lengths must be non-negative integers"):
            load_example_lengths(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="not JSON.*end in .pkl"):
        load_example_lengths(tmp_path / "x.json")
    with pytest.raises(ValueError, match="as .json"):
        write_example_lengths([1], tmp_path / "x.pkl")
    with pytest.raises(ValueError, match="no column `length`; it has x"):
        write_example_lengths(Dataset.from_dict({"x": [1]}), tmp_path / "x.json")
