"""Vocabularies, medians and pickles of STFormer, Geneformer and PerturbGene."""

import gzip
import json
import os
import pickle
from collections import OrderedDict, defaultdict

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from stformer_hf import GeneBertConfig, GeneTokenizer, estimate_gene_medians
from stformer_hf.models.gene_bert.legacy_files import load_mapping, load_pickle

DICTIONARY = {"<pad>": 0, "<mask>": 1, "g1": 2, "g2": 3, "g3": 4}
MEDIANS = {"g1": 1.0, "g2": 0.5, "g3": 2.0}


class Evil:
    """Writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo harm > {self.path}",)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"<pad>": 0, "x": evil}, lambda evil: [[evil]]])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_names_what_it_wanted(tmp_path, wrap, protocol):
    file = tmp_path / "tokens.pkl"
    file.write_bytes(pickle.dumps(wrap(Evil(tmp_path / "harm")), protocol))
    with pytest.raises(ValueError, match=r"tokens.pkl is refused: it refers to (posix|nt|os)\.system"):
        load_pickle(file)
    with pytest.raises(ValueError, match="refused"):
        GeneTokenizer.from_token_dictionary(file, MEDIANS)
    assert not (tmp_path / "harm").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "harm").exists(), "the pickle does no harm: this test shows nothing"


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open", "type"])
def test_functions_of_python_are_refused(tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"refers to builtins.{name}"):
        load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_and_numpy_numbers_are_loaded(tmp_path, protocol):
    data = {
        "int": np.int64(3),
        "float": np.float32(0.5),
        "array": np.arange(5),
        "strings": np.array(["a", "bc"]),
        "bytes": b"\x00\xff",
        "nested": [(1, 2.0, None, True), {3, 4}, frozenset([5]), OrderedDict(a=1), 1 + 2j, 10**30],
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data, protocol))
    loaded = load_pickle(tmp_path / "x.pkl")
    assert loaded.keys() == data.keys()
    np.testing.assert_array_equal(loaded.pop("array"), data.pop("array"))
    np.testing.assert_array_equal(loaded.pop("strings"), data.pop("strings"))
    assert loaded == data
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(defaultdict(list, a=[1]), protocol))
    assert load_pickle(tmp_path / "y.pkl") == {"a": [1]}


class Reduced:
    """Is pickled as a call of a function, and then as a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


FLAGLESS = Reduced(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))


@pytest.mark.parametrize(
    "harm",
    [
        np.array([object], dtype=object),
        Reduced(np.dtype, ("O8", False, True)),
        FLAGLESS,
        Reduced(np.dtype, ([("x", "O")], False, True)),
        Reduced(np.dtype, ("V8", False, True)),
        Reduced(np._core.multiarray.scalar, (FLAGLESS, b"\x01" * 8)),
        Reduced(np._core.multiarray.scalar, (np.dtype("f8"), b"\x01" * 3)),
        Reduced(np.ndarray, ((1,), "O", b"\x01" * 8)),
        Reduced(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), FLAGLESS, False, b"\x01" * 8)),
        Reduced(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (9,), np.dtype("f8"), False, b"")),
    ],
)
def test_pickles_cannot_make_numpy_read_what_is_not_there(tmp_path, harm):
    """Types of objects, and flags that hide them, would let a file name addresses."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": harm}))
    with pytest.raises(ValueError, match="x.pkl is refused"):
        load_pickle(tmp_path / "x.pkl")


def test_pickles_cannot_change_what_serves_them(tmp_path):
    """A state given to a function or class would stay for all that comes after."""
    for name in (b"numpy._core.numeric\n_frombuffer", b"_codecs\nencode", b"numpy\ndtype", b"numpy\nndarray"):
        # the global, then BUILD with (None, {"__defaults__": ()}): attributes to set
        (tmp_path / "x.pkl").write_bytes(b"c" + name + b"\n(N}X\x0c\x00\x00\x00__defaults__)stb.")
        with pytest.raises(ValueError, match="x.pkl is refused"):
            load_pickle(tmp_path / "x.pkl")
    test_plain_data_and_numpy_numbers_are_loaded(tmp_path, 2)


def test_damaged_and_other_files_raise(tmp_path):
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(DICTIONARY)[:-9])
    with pytest.raises(ValueError, match="cut.pkl is refused"):
        load_pickle(tmp_path / "cut.pkl")
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "none.pkl")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list, but a mapping is needed"):
        load_mapping(tmp_path / "list.json")
    (tmp_path / "x.csv").write_text("a,1")
    with pytest.raises(ValueError, match="must be a .json, .pkl or .txt"):
        load_mapping(tmp_path / "x.csv")
    for name, content in (("x.json", b"\xff{"), ("x.txt", b"\xff"), ("x.txt.gz", gzip.compress(b"a" * 99)[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not text, or is damaged"):
            load_mapping(tmp_path / name)


def test_text_may_be_compressed_whatever_its_name(tmp_path):
    for name in ("a.json", "a.json.gz"):
        for content in (json.dumps(DICTIONARY).encode(), gzip.compress(json.dumps(DICTIONARY).encode())):
            (tmp_path / name).write_bytes(content)
            assert load_mapping(tmp_path / name) == DICTIONARY
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress("\ufeffa\nb\n".encode()))
    assert load_mapping(tmp_path / "v.txt.gz") == {"a": 0, "b": 1}


def written(folder, kind):
    """Write the dictionary in a form; returns its path."""
    path = folder / f"tokens.{kind}"
    if kind == "pkl":
        path.write_bytes(pickle.dumps({token: np.int64(i) for token, i in DICTIONARY.items()}))
    elif kind == "json":
        path.write_text(json.dumps(DICTIONARY))
    else:
        path.write_text("\n".join(DICTIONARY) + "\n")
    return path


@pytest.mark.parametrize("kind", ["pkl", "json", "txt"])
def test_a_token_dictionary_gives_its_ids(tmp_path, kind):
    tokenizer = GeneTokenizer.from_token_dictionary(written(tmp_path, kind), MEDIANS)
    assert tokenizer.get_vocab() == DICTIONARY
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.add_cls, tokenizer.add_eos) == (
        0,
        1,
        False,
        False,
    )
    assert tokenizer(np.array([[2, 1, 0], [1, 1, 8]]))["input_ids"] == [[2, 3], [4, 3, 2]]
    assert tokenizer(np.array([[2, 1, 0], [1, 1, 8]]), padding=True)["input_ids"] == [[2, 3, 0], [4, 3, 2]]


def test_cls_and_eos_of_a_dictionary_are_used_and_phenotypes_come_after(tmp_path):
    dictionary = {"g2": 5, "<eos>": 3, "<pad>": 0, "g1": 7, "<mask>": 1, "<cls>": 2, "g3": 4}
    tokenizer = GeneTokenizer.from_token_dictionary(dictionary, MEDIANS, phenotypes={"tissue": ["lung"]})
    assert tokenizer.get_vocab() == {**dictionary, "[unused_6]": 6, "[lung]": 8}
    assert tokenizer.genes == ["g3", "g2", "g1"]
    obs = pd.DataFrame({"tissue": ["lung"]})
    assert tokenizer(np.array([[1, 1, 4]]), genes=["g1", "g2", "g3"], obs=obs)["input_ids"] == [[2, 8, 4, 5, 7, 3]]
    GeneBertConfig.from_tokenizer(tokenizer, size="tiny").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back.get_vocab() == tokenizer.get_vocab()
    assert (back.cls_token, back.eos_token, back.pad_token, back.genes) == ("<cls>", "<eos>", "<pad>", tokenizer.genes)
    counts = np.array([[1, 1, 4]])
    assert back(counts, genes=["g1", "g2", "g3"], obs=obs) == tokenizer(counts, genes=["g1", "g2", "g3"], obs=obs)


@pytest.mark.parametrize(
    ("dictionary", "words"),
    [
        ({"<pad>": 0, "g1": 1}, "lacks <pad> or <mask>"),
        ({**DICTIONARY, "g4": 2}, "id 2 of 'g4'"),
        ({**DICTIONARY, "g4": 5.5}, "id of 'g4' must be an integer, got 5.5"),
        ({**DICTIONARY, "g4": -1}, "negative"),
        ({**DICTIONARY, "g4": "5"}, "must be an integer"),
    ],
)
def test_bad_dictionaries_raise(dictionary, words):
    with pytest.raises(ValueError, match=words):
        GeneTokenizer.from_token_dictionary(dictionary, MEDIANS)


def test_perturbgenes_vocabulary(tmp_path):
    """Ids by hand, as references/systems.md section 1 has them: specials, sorted categories in their order, bins."""
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps({"tissue": ["[lung]", "[bone_marrow]"], "cell_type": ["[T_cell]", "[B_cell]"]}))
    tokenizer = GeneTokenizer.from_perturbgene(file, [0.1, 2], ["a", "b", "c"], truncation="head", max_length=6)
    assert list(tokenizer.get_vocab()) == [
        *("[CLS]", "[EOS]", "[MASK]", "[PAD]"),
        *("[T_cell]", "[B_cell]", "[lung]", "[bone_marrow]"),
        *("bin_0", "bin_1", "bin_2"),
    ]
    assert (tokenizer.gene_token_type_offset, tokenizer.type_vocab_size) == (3, 6)
    obs = pd.DataFrame({"tissue": ["bone marrow"], "cell_type": ["B cell"]})  # as the data spell them
    tokens = tokenizer(np.array([[1, 0, 5]]), obs=obs)
    assert tokens["input_ids"] == [[0, 7, 5, 9, 10, 1]]
    assert tokens["token_type_ids"] == [[0, 2, 1, 3, 5, 0]]
    # A head slice keeps the first genes, and [EOS], which PerturbGene lost.
    assert tokenizer(np.array([[1, 1, 5]]), obs=obs)["input_ids"] == [[0, 7, 5, 9, 9, 1]]
    with pytest.raises(ValueError, match="'tissue' lists 'lung'"):
        GeneTokenizer.from_perturbgene({"tissue": ["lung"]}, [0.1], ["a"])


@pytest.fixture(scope="module")
def geneformer(shared_data):
    folder = shared_data / "geneformer"
    return GeneTokenizer.from_token_dictionary(
        folder / "token_dictionary.pkl",
        folder / "gene_median_dictionary.pkl",
        symbols=folder / "gene_name_id_dict.pkl",
    )


def test_geneformers_dictionaries(geneformer, shared_data):
    assert geneformer.vocab_size == 25_426
    assert geneformer.convert_tokens_to_ids(["<pad>", "<mask>", "ENSG00000000003"]) == [0, 1, 2]
    lines = (shared_data / "geneformer" / "bionemo_vocab.txt").read_text().split()
    assert geneformer.convert_tokens_to_ids(lines) == list(range(25_426))
    assert not np.isnan(geneformer.medians).any()
    assert geneformer.convert_tokens_to_ids("TSPAN6") == 2  # by its symbol


def test_geneformers_cells_decode_and_encode_to_the_same_ids(geneformer, shared_data):
    cells = pd.read_parquet(shared_data / "geneformer" / "genecorpus_500_samples.parquet")["input_ids"]
    assert len(cells) == 500
    for number, ids in enumerate(cells):
        names = geneformer.convert_ids_to_tokens(ids.tolist())
        assert all(name.startswith("ENSG") for name in names)
        assert geneformer.convert_tokens_to_ids(names) == ids.tolist()
        if number % 25 == 0:  # through text too, which is slow
            assert geneformer.decode(ids) == " ".join(names)
            assert geneformer.convert_tokens_to_ids(geneformer.tokenize(" ".join(names))) == ids.tolist()


def test_a_row_of_geneformers_medians_puts_its_ids_in_order(geneformer, shared_data):
    """Counts are made up such that the scores fall along the ids of a real cell: the tokenizer finds the order."""
    cells = pd.read_parquet(shared_data / "geneformer" / "genecorpus_500_samples.parquet")["input_ids"]
    index = {gene: i for i, gene in enumerate(geneformer.genes)}
    medians = geneformer.medians
    for ids in cells[:20]:
        at = [index[name] for name in geneformer.convert_ids_to_tokens(ids.tolist())]
        counts = np.zeros((1, len(medians)))
        counts[0, at] = np.ceil(1e6 * np.arange(len(at), 0, -1) * medians[at])
        assert geneformer(counts)["input_ids"] == [ids.tolist()]


def test_medians_come_as_statistics_as_their_file_and_as_a_dictionary(tmp_path, store):
    statistics = estimate_gene_medians(store, target_sum=500)
    statistics.save(tmp_path / "gene_medians.json")
    wanted = GeneTokenizer.from_store(store, "rank", medians=statistics)
    assert wanted.target_sum == 500
    assert dict(zip(wanted.genes, wanted.medians, strict=True)) == statistics.medians
    for medians in (statistics.medians, tmp_path / "gene_medians.json"):
        tokenizer = GeneTokenizer.from_store(store, "rank", medians=medians, target_sum=500)
        assert tokenizer.fingerprint == wanted.fingerprint
    dictionary = {"<pad>": 0, "<mask>": 1, **{gene: 2 + i for i, gene in enumerate(wanted.genes)}}
    tokenizer = GeneTokenizer.from_token_dictionary(dictionary, tmp_path / "gene_medians.json")
    assert (tokenizer.medians == wanted.medians).all()
