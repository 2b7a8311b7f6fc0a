"""The rooms of the package: who may import whom, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stformer_hf

PACKAGE = Path(stformer_hf.__file__).parent
MAY_IMPORT = {
    "models": set(),
    "genes": set(),
    "data": {"genes"},
    "batches": {"models", "genes", "data"},
    "evaluation": {"models", "genes", "data", "batches"},
    "training": {"models", "genes", "data", "batches", "evaluation"},
    "inference": {"models", "genes", "data", "batches", "evaluation", "training"},
    "cli": {"models", "genes", "data", "batches", "evaluation", "training", "inference"},
}
# What a checkpoint takes along, and every door reads cells by: which gene a column is, and where the counts are.
SHARED = {("models", "gene_bert", name) for name in ("gene_columns", "cell_counts", "cell_tables")}
# huggingface_hub (`strict` configurations) and tokenizers (tokenizer.json) come with transformers.
MODEL_FILES_MAY_IMPORT = {"transformers", "torch", "numpy", "huggingface_hub", "tokenizers"} | sys.stdlib_module_names


def imports(path: Path) -> list[tuple[str, ...]]:
    """Full names of the modules that a file imports, relative ones resolved."""
    module = ("stformer_hf", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            full = base + tuple((node.module or "").split(".") if node.module else ())
            found += [full if node.module else (*full, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports(path):
            if name[0] == "stformer_hf" and len(name) > 1:
                allowed = name[1] in MAY_IMPORT[room] | {room, "__version__"} or name[1:4] in SHARED
                assert allowed, f"{path} imports {'.'.join(name)}"


def test_files_of_a_checkpoint_import_only_what_a_checkpoint_may():
    files = [path for path in (PACKAGE / "models").glob("*/*.py") if path.name != "__init__.py"]
    assert len(files) >= 3
    for path in files:
        for name in imports(path):
            sibling = name[0] == "stformer_hf" and name[1:3] == ("models", path.parent.name)
            assert sibling or name[0] in MODEL_FILES_MAY_IMPORT, f"{path} imports {'.'.join(name)}"


def test_only_the_resolver_reads_names_in_var():
    """Which gene a column is, `gene_columns` decides for all; a plot finds the gene that it is asked for."""
    allowed = {"models/gene_bert/gene_columns.py", "genes/gene_table.py", "inference/plots.py"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
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


def test_every_public_name_is_there():
    for name in stformer_hf.__all__:
        assert getattr(stformer_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = stformer_hf.Nothing


def test_importing_the_package_leaves_heavy_and_optional_modules_alone():
    code = "import stformer_hf, sys; print([m for m in {!r} if m in sys.modules])"
    heavy = ["transformers.modeling_utils", "transformers.trainer", "datasets", "matplotlib", "scanpy", "sklearn"]
    printed = subprocess.run([sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
