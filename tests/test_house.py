"""The rooms of the package: who may import whom, and what importing it costs."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import stformer_hf
from stformer_hf import _moved

PACKAGE = Path(stformer_hf.__file__).parent
# In the order of the story: a room imports rooms that stand above it. `compat` is a leaf that nobody imports.
ROOMS = (
    *("models", "genes", "sources", "store", "batches", "evaluation", "training", "inference", "space", "search"),
    *("compat", "cli"),
)
# What a checkpoint takes along, and every door reads cells by: which gene a column is, and where the counts are.
SHARED = {("models", "gene_bert", name) for name in ("gene_columns", "feature_types", "cell_counts", "cell_tables")}
# huggingface_hub (`strict` configurations) and tokenizers (tokenizer.json) come with transformers.
MODEL_FILES_MAY_IMPORT = {"transformers", "torch", "numpy", "huggingface_hub", "tokenizers"} | sys.stdlib_module_names


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> list[tuple[str, ...]]:
    """Full names of the modules that a file imports, relative ones resolved."""
    module = ("stformer_hf", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            full = base + tuple((node.module or "").split(".") if node.module else ())
            found += [full if node.module else (*full, alias.name) for alias in node.names]
    return found


def modules() -> dict[str, Path]:
    """All modules of the rooms, by their full names."""
    found = {}
    for room in ROOMS:
        for path in (PACKAGE / room).rglob("*.py"):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(("stformer_hf", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also below `if TYPE_CHECKING` and in functions."""
    names = {".".join(name) for name in imports(path)}
    for node in nodes(path):  # `from .package import module`
        if isinstance(node, ast.ImportFrom):
            module = ("stformer_hf", *path.relative_to(PACKAGE).with_suffix("").parts)
            base = module[: -node.level] if node.level else ()
            full = ".".join((*base, *(node.module.split(".") if node.module else ())))
            names |= {f"{full}.{alias.name}" for alias in node.names}
    return names & set(known)


def test_the_rooms_are_those_of_the_plan():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room):
    above = set(ROOMS[: ROOMS.index(room)]) - ({"compat"} if room != "cli" else set())
    if room in ("genes", "sources"):
        above -= {"models"}  # but for the numpy-only files
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports(path):
            if name[0] == "stformer_hf" and len(name) > 1:
                allowed = name[1] in above | {room, "__version__"} or name[1:4] in SHARED
                assert allowed, f"{path} imports {'.'.join(name)}"


def test_no_circle():
    known = modules()
    graph = {name: imported_modules(path, known) for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                # A package that names its modules, as `from .objectives import …`, is not a circle with them.
                if not other.startswith(f"{name}.") and not name.startswith(f"{other}."):
                    visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_who_opens_sources_knows_stores():
    """Stores are a format as soon as there are formats; the room `store` is imported when one is read."""
    code = (
        "import sys; from stformer_hf.sources.registry import FORMATS; from stformer_hf.sources import formats; "
        "assert 'CellStore' in [known.name for known in FORMATS]; assert 'stformer_hf.store' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("old", _moved.MOVED)
def test_old_paths_warn_and_lead_to_the_new_modules(old):
    new = importlib.import_module(_moved.MOVED[old])
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} has moved to {_moved.MOVED[old]}"):
        moved = importlib.import_module(old)
    names = {name for name in vars(new) if not name.startswith("_")}
    assert names
    for name in names:
        assert getattr(moved, name) is getattr(new, name)


def test_files_of_a_checkpoint_import_only_what_a_checkpoint_may():
    files = [path for path in (PACKAGE / "models").glob("*/*.py") if path.name != "__init__.py"]
    assert len(files) >= 3
    for path in files:
        for name in imports(path):
            sibling = name[0] == "stformer_hf" and name[1:3] == ("models", path.parent.name)
            assert sibling or name[0] in MODEL_FILES_MAY_IMPORT, f"{path} imports {'.'.join(name)}"


# Modules whose package has another name in pyproject.toml, or comes with one that is declared there.
COMES_WITH = {
    "aiohttp": "fsspec[http]",
    "igraph": "scanpy[leiden]",
    "mpl_toolkits": "matplotlib",
    "sqlalchemy": "optuna",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "faiss": "faiss-cpu",
    "scvi": "scvi-tools",
}


def test_what_is_imported_is_declared():
    """Also in functions; imports for type checkers alone are those of objects that users bring."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in extras.keys() - {"bench", "docs", "dev"})]
    declared = {re.split("[<>=;~! ]", one)[0] for of in lists for one in of}
    declared |= {name.partition("[")[0] for name in declared}
    for path in PACKAGE.rglob("*.py"):
        for_checkers = {inner for node in nodes(path) if _is_for_checkers(node) for inner in ast.walk(node)}
        for node in set(nodes(path)) - for_checkers:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module or ""]
            for name in {name.partition(".")[0] for name in found} - sys.stdlib_module_names:
                known = {COMES_WITH.get(name, name), name.replace("_", "-")} & declared
                assert known, f"{path}:{node.lineno} imports {name}, which is not declared"


def _is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_only_the_resolver_reads_names_in_var():
    """Which gene a column is, `gene_columns` decides for all; a plot finds the gene that it is asked for."""
    allowed = {"models/gene_bert/gene_columns.py", "genes/gene_table.py", "inference/cell_plots.py"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in allowed:
            continue
        for node in nodes(path):
            of_var = isinstance(node, ast.Subscript | ast.Attribute | ast.Call) and "var" in _names_of(node)
            assert not of_var, f"{path}:{node.lineno} looks at the columns of var"


def _names_of(node: ast.AST) -> set[str]:
    """What a table is called whose column is read: the value of a subscript, of `.get(…)` or of `.columns`."""
    if isinstance(node, ast.Call):
        node = node.func
        if not (isinstance(node, ast.Attribute) and node.attr == "get"):
            return set()
    elif isinstance(node, ast.Attribute) and node.attr != "columns":
        return set()
    value = node.value
    return {getattr(value, "attr", ""), getattr(value, "id", "")}


def test_copies_of_model_classes_are_not_overlooked():
    """`isinstance` is False for classes of `trust_remote_code`: the rooms ask `is_a` instead."""
    classes = r"isinstance\((?:[^()]|\([^()]*\))*, \(?[\w., |]*\b(GeneBert\w*|GeneTokenizer|CellNeighborhood\w*)\b"
    files = [path for path in PACKAGE.rglob("*.py") if "models" not in path.relative_to(PACKAGE).parts]
    assert [path.name for path in files if re.search(classes, path.read_text())] == []


def test_every_public_name_is_there():
    for name in {*stformer_hf.__all__, *stformer_hf._MODULE_OF}:
        assert getattr(stformer_hf, name) is not None
    assert len(stformer_hf.__all__) < 30
    assert {*stformer_hf.__all__, *stformer_hf._MODULE_OF} == set(dir(stformer_hf))
    assert all(f"`{name}`" in stformer_hf.__doc__ for name in stformer_hf.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = stformer_hf.Nothing


@pytest.mark.parametrize("code", ["import stformer_hf", "from stformer_hf.cli import main; main(['--help'])"])
def test_importing_the_package_and_the_help_import_nothing_heavy(code):
    heavy = ["transformers", "torch", "datasets", "anndata", "pandas", "matplotlib", "scanpy", "sklearn"]
    code += f"; import sys; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "[]"


IN_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
import stformer_hf
names = ["small_batches", "spatial_neighbors", "EvenBatchSampler", "TokenBudgetBuffer", "gene_network", "embed"]
together = Barrier(len(names))
def get(name):
    together.wait()
    return getattr(stformer_hf, name).__name__
with ThreadPoolExecutor(len(names)) as threads:
    print(*threads.map(get, names))
"""


@pytest.mark.slow
def test_several_threads_may_import_the_public_names_for_the_first_time():
    command = [sys.executable, "-c", IN_THREADS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.split()[::5] == ["small_batches", "embed"]


MAKE_A_MODEL = """
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
small = {"hidden_size": 16, "num_attention_heads": 2}
bert = AutoModel.from_config(AutoConfig.for_model("gene_bert", num_hidden_layers=1, **small))
space = AutoModelForPreTraining.from_config(AutoConfig.for_model("cell_neighborhood", **small))
print(type(bert).__name__, type(space).__name__, TOKENIZER_MAPPING[type(bert.config)].__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import stformer_hf", marks=pytest.mark.slow),  # as in tests/models/test_without_plugin.py
        pytest.param("import transformers.trainer, stformer_hf", marks=pytest.mark.slow),
        "from stformer_hf import GeneBertForPhenotypicMLM; import transformers.pipelines",
    ],
)
def test_the_auto_classes_know_the_models_whatever_is_imported_first(imports):
    printed = subprocess.run(
        [sys.executable, "-c", imports + MAKE_A_MODEL], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == ["GeneBertModel", "CellNeighborhoodForMaskedCell", "GeneTokenizer"]
