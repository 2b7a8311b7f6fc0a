"""PerturbGene's command lines are read, checked, and train here."""

import json
import subprocess

import pytest
import torch
from conftest import make_adata
from hypothesis import given
from hypothesis import strategies as st

from stformer_hf import (
    CellStore,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    parse_args,
)
from stformer_hf.cli.parse_args import expand_braces, main, make_initial_model, to_verb
from stformer_hf.cli.pretrain import PretrainArguments

# ---------------------------------------------------------------------- braces

_names = st.text(alphabet="ab1", min_size=1, max_size=3)
_ranges = st.one_of(
    st.tuples(st.integers(-3, 12), st.integers(-3, 12)).map(lambda ends: f"{{{ends[0]}..{ends[1]}}}"),
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 4)).map(
        lambda ends: f"{{{ends[0]:02d}..{ends[1]}..{ends[2]}}}"
    ),
    st.tuples(st.sampled_from("adf"), st.sampled_from("adf")).map(lambda ends: f"{{{ends[0]}..{ends[1]}}}"),
)
_patterns = st.recursive(
    st.one_of(_names, _ranges),
    lambda parts: st.one_of(
        st.lists(parts, min_size=1, max_size=3).map("".join),
        st.lists(parts, min_size=1, max_size=3).map(lambda found: "{" + ",".join(found) + "}"),
    ),
    max_leaves=6,
)


@given(_patterns)
def test_braces_are_written_out_as_the_shell_does(pattern):
    shell = subprocess.run(["bash", "-c", f'printf "%s\\n" x{pattern}y'], capture_output=True, text=True, check=True)
    assert expand_braces(f"x{pattern}y") == shell.stdout.split()


def test_braces_without_their_half_are_refused():
    for text in ("a{0..2", "a}b", "a{b{c}"):
        with pytest.raises(ValueError, match="unmatched brace"):
            expand_braces(text)


# ---------------------------------------------------------------------- command lines


@pytest.fixture
def folder(tmp_path):
    """Three files of cells, a vocabulary, an architecture."""
    for i in range(3):
        adata = make_adata(n_cells=30, seed=i)
        adata.write_h5ad(tmp_path / f"cells_{i}.h5ad")
    (tmp_path / "vocabulary.json").write_text('{"cell_type": ["[T_cell]", "[B_cell]"], "sex": ["[f]", "[m]"]}')
    shape = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "vocab_size": 30522, "hidden_dropout_prob": 0.3}
    (tmp_path / "architecture.json").write_text(json.dumps(shape))
    return tmp_path


def words(folder, command: str, own: str, **changes) -> list[str]:
    """Write a command line as PerturbGene's scripts do; `changes` replace or, if None, leave out arguments."""
    general = {
        "bin_edges": "0.1",
        "pretrained_model_path": folder / "architecture.json",
        "shard_size": 10000,
        "eval_data_paths": folder / "cells_2.h5ad",
        "max_length": 30,
        "num_top_genes": 35,
        "vocab_path": folder / "vocabulary.json",
        "per_device_eval_batch_size": 16,
        "dataloader_num_workers": 0,
        "output_dir": folder / "out",
    }
    train = {
        "train_data_paths": str(folder / "cells_{0..1}.h5ad"),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-4,
        "weight_decay": 5e-2,
        "warmup_ratio": 0.1,
        "num_train_epochs": 1,
        "eval_steps": 1,
        "save_steps": 2,
    }
    others = {name: changes[name] for name in changes if name not in train}
    general, train = {**others, **general, **others}, {**train, **changes}

    def written(options: dict, names) -> list[str]:
        return [
            word for name in names if options[name] is not None for word in (f"--{name}", *str(options[name]).split())
        ]

    return [*written(general, general), command, *own.split(), *written(train, train.keys() - general.keys())]


MLM = "--gene_mask_prob 0.2 --phenotype_mask_prob 0.4"
CLS = "--phenotype_category cell_type"


def test_mlm_trains_from_its_command_line(folder, capsys):
    assert main(words(folder, "mlm", MLM, included_phenotypes="cell_type")) == 0
    assert "eval loss" in capsys.readouterr().out
    out = folder / "out"
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    config, tokenizer = GeneBertConfig.from_pretrained(out), GeneTokenizer.from_pretrained(out)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (16, 32, 1)
    assert (config.label_smoothing, config.hidden_dropout_prob) == (0.5, 0.3)
    # PerturbGene's vocabulary: the order of the file, categories sorted; the first genes.
    assert tokenizer.get_vocab()["[T_cell]"] == 4 and tokenizer.get_vocab()["[B_cell]"] == 5
    assert tokenizer.included_phenotypes == ["cell_type"]
    assert tokenizer.genes == make_adata().var_names[:35].tolist()
    card = (out / "README.md").read_text()
    assert "masked genes | 0.2" in card and "masked phenotypes | 0.4" in card
    assert "cells in training | 58" in card and "cells held out | 29" in card  # of files of their own
    assert GeneBertForPhenotypicMLM.from_pretrained(out).num_parameters() > 0


@pytest.mark.parametrize("label", [None, "[B_cell]"])
def test_cls_trains_from_its_command_line(folder, label):
    own = CLS if label is None else f"{CLS} --binary_label {label}"
    assert main(words(folder, "cls", own, num_top_genes=40)) == 0
    out = folder / "out"
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    config = GeneBertConfig.from_pretrained(out)
    assert list(config.id2label.values()) == (["B cell", "T cell"] if label is None else ["other", "B_cell"])
    assert config.classifier_label_smoothing == 0.1
    assert len(config.class_weights) == 2 and config.class_weights[0] != config.class_weights[1]
    assert GeneBertForClassification.from_pretrained(out).config.num_labels == 2
    if label is not None:
        found, cells = CellStore(out / "train_cells").obs["cell_type"], CellStore(out / "train_cells")
        types = [kind for i in (0, 1) for kind in make_adata(n_cells=30, seed=i).obs["cell_type"]]
        assert found.tolist() == ["B_cell" if kind == "B cell" else "other" for kind in types]
        assert len(cells) == 60


def trained(folder):
    """A first checkpoint, whose weights are not those that a new model begins with."""
    path = make_initial_model(parse_args(words(folder, "mlm", MLM)))
    model = GeneBertForPhenotypicMLM.from_pretrained(path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
    model.save_pretrained(path)
    return path


def test_weights_are_loaded_and_not_their_configuration_alone(folder):
    first = trained(folder)
    changes = {"pretrained_model_path": first, "output_dir": folder / "second"}
    second = make_initial_model(parse_args(words(folder, "cls", CLS, **changes)))
    was, now = (GeneBertForClassification.from_pretrained(path).gene_bert.state_dict() for path in (first, second))
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    with pytest.raises(ValueError, match="--num_hidden_layers 3: the weights at .* have 1"):
        make_initial_model(parse_args(words(folder, "cls", CLS, **changes, num_hidden_layers=3)))


def test_weights_of_perturbgene_are_loaded(folder):
    """A checkpoint with its names: DistilBERT's blocks."""
    first = trained(folder)
    model, names = GeneBertForPhenotypicMLM.from_pretrained(first), {}
    for name, value in model.state_dict().items():
        for new, old in (
            ("gene_bert.layers.", "distilbert.transformer.layer."),
            ("gene_bert.", "distilbert."),
            ("mlm_head.transform.", "vocab_transform."),
            ("mlm_head.layer_norm.", "vocab_layer_norm."),
            ("mlm_head.decoder.", "vocab_projector."),
        ):
            if name.startswith(new):
                names[old + name.removeprefix(new)] = value.clone()
                break
    theirs = folder / "theirs"
    theirs.mkdir()
    torch.save(names, theirs / "pytorch_model.bin")
    (theirs / "config.json").write_text((folder / "architecture.json").read_text())
    changes = {"pretrained_model_path": theirs, "output_dir": folder / "second"}
    second = make_initial_model(parse_args(words(folder, "mlm", MLM, **changes)))
    loaded = GeneBertForPhenotypicMLM.from_pretrained(second).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_what_is_read_keeps_perturbgenes_names_and_becomes_flags_here(folder):
    config = parse_args(words(folder, "mlm", MLM))
    assert (config.subcommand, config.bin_edges, config.gene_mask_prob) == ("mlm", [0.1], 0.2)
    assert config.train_data_paths == [str(folder / f"cells_{i}.h5ad") for i in (0, 1)]
    assert config.included_phenotypes == []
    args, training = to_verb(config)
    assert isinstance(args, PretrainArguments) and args.eval_data == [str(folder / "cells_2.h5ad")]
    assert (training["warmup_steps"], training["learning_rate"], training["eval_steps"]) == (0.1, 1e-4, 1)
    general = words(folder, "mlm", MLM)
    config = parse_args(general[: general.index("mlm")])
    assert config.subcommand is None
    with pytest.raises(ValueError, match="mlm or cls"):
        to_verb(config)


def test_edges_may_differ_by_gene(folder):
    genes = make_adata().var_names
    edges = {gene: [0.5, 1.5 + i] for i, gene in enumerate(genes[:35])}
    (folder / "edges.json").write_text(json.dumps(edges))
    config = parse_args(words(folder, "mlm", MLM, bin_edges=None, bin_edges_path=folder / "edges.json"))
    tokenizer = GeneTokenizer.from_pretrained(make_initial_model(config))
    assert tokenizer.bin_edges == edges


@pytest.mark.parametrize(
    ("own", "changes", "error"),
    [
        (MLM, {"bin_edges": None}, "one of --bin_edges and --bin_edges_path"),
        (MLM, {"bin_edges": "-1 2"}, "edges must not be below 0"),
        (MLM, {"model_arch": "distilbert"}, "one of --pretrained_model_path and --model_arch"),
        (MLM, {"max_length": 38}, "at most 37 tokens"),
        (MLM, {"vocab_path": "none.json"}, "--vocab_path: no such file"),
        (MLM, {"eval_data_paths": "none_{0..2}.h5ad"}, "3 of 3 files do not exist, such as none_0.h5ad"),
        (MLM, {"included_phenotypes": "celltype"}, "the closest known one is cell_type"),
        (MLM, {"warmup_ratio": 1.5}, "--warmup_ratio 1.5"),
        ("--gene_mask_prob 2 --phenotype_mask_prob 0", {}, "--gene_mask_prob 2.0: must be a probability"),
        (CLS, {"included_phenotypes": "cell_type"}, "the model would read the answer"),
        ("--phenotype_category tissue", {}, "--phenotype_category tissue: .* has cell_type, sex"),
        (f"{CLS} --binary_label [T-cell]", {}, r"the closest known one is \[T_cell\]"),
    ],
)
def test_what_contradicts_itself_is_told(folder, own, changes, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        parse_args(words(folder, "mlm" if "mask" in own else "cls", own, **changes))


def test_files_are_not_in_training_and_evaluation_at_once(folder):
    with pytest.raises(ValueError, match="cells_1.h5ad is in both --train_data_paths and --eval_data_paths"):
        parse_args(words(folder, "mlm", MLM, eval_data_paths=folder / "cells_1.h5ad"))


def test_a_model_that_is_there_is_not_replaced(folder, capsys):
    (folder / "out" / "initial").mkdir(parents=True)
    assert main(words(folder, "mlm", MLM)) == 1
    assert "Choose another --output_dir" in capsys.readouterr().err
