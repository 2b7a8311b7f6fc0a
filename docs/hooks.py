"""MkDocs hooks: the pages of the API, and those of the notebooks, are made from the source files."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parent / "notebooks"
# Rooms of the package in the order of the user guide, and what each of them holds.
ROOMS = {
    "store": "Cells on disk",
    "sources": "Reading files",
    "genes": "Genes",
    "models": "Tokenizer, configurations and models",
    "batches": "Collators, samplers and streams",
    "training": "Training",
    "inference": "Inference",
    "evaluation": "Evaluation",
    "space": "Space",
    "search": "Hyperparameter search",
    "compat": "Names of other systems",
    "cli": "Command lines of other systems",
}
# Documented names that are imported from their room.
FROM_ROOMS = {
    "inference.export": ["export_onnx"],
    "inference.gene_network": ["GeneNetwork", "gene_network"],
    "inference.gene_states": ["gene_embeddings", "nearest_genes"],
    "inference.cell_plots": ["mapping", "sections", "umap", "umaps"],
    "inference.plots": ["confusion", "label_curve", "loss_curves", "network", "volcano"],
    "search.search_space": ["SearchSpace", "TrialModel"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from source files."""
    files.append(File.generated(config, "api/index.md", content=api_page()))
    for path in sorted(NOTEBOOKS.glob("*.py")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Remove what tells the tests, not the reader, that a block is not run."""
    return re.sub(r' title="not run in tests: [^"]*"', "", markdown)


def api_page() -> str:
    """Return the page of the public names, by the room of the package that they live in."""
    import stformer_hf

    rooms: dict[str, list[str]] = defaultdict(list)
    names = {**stformer_hf._MODULE_OF, **{name: module for module, names in FROM_ROOMS.items() for name in names}}
    for name, module in names.items():
        rooms[module.split(".")[0]].append(f"{module}.{name}")
    lines = [
        "# API reference",
        "",
        "Import these names from `stformer_hf` directly (`import stformer_hf as sf`; `sf.CellStore`), plots from",
        "`sf.pl`, and `SearchSpace` and `TrialModel` from `stformer_hf.search.search_space`.",
    ]
    for room, title in ROOMS.items():
        if room in rooms:
            lines += ["", f"## {title}", ""]
            for name in sorted(rooms.pop(room), key=lambda name: name.rsplit(".")[-1].lower()):
                lines += [f"::: stformer_hf.{name}", "    options:", "      heading_level: 3"]
                lines += ["      inherited_members: true", ""] if name.endswith(".CellStore") else [""]
    if rooms:
        raise ValueError(f"docs/hooks.py names no title for the rooms {sorted(rooms)}.")
    return "\n".join(lines) + "\n"


def notebook_page(path: Path) -> str:
    """Return a notebook in jupytext's percent format as Markdown."""
    parts = []
    for kind, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", path.read_text(encoding="utf-8"), re.MULTILINE):
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    title, *rest = parts
    source = f"https://github.com/stformer-hf/stformer_hf/blob/main/docs/notebooks/{path.name}"
    note = (
        f"This page is a notebook: [{path.name}]({source}), which Jupyter opens by jupytext. `make notebooks` runs it."
    )
    return "\n\n".join([title, f"!!! note\n    {note}", *rest]) + "\n"
