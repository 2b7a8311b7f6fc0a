"""`stformer-hf recipes`: list the recipes that come with the package, or copy one to change it.

stformer-hf recipes
stformer-hf recipes --copy cell_tiny_cpu --output my_run.yaml
stformer-hf pretrain --config cell_tiny_cpu --data cells.h5ad --output model
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..genes.wrong_names import closest
from .arguments import check_free, flag, parse, recipe_files


@dataclass
class RecipesArguments:
    """Flags of `stformer-hf recipes`."""

    copy: str | None = flag("name of a recipe to copy", None)
    output: str | None = flag("file to copy it to (default: NAME.yaml here)", None)
    overwrite: bool = flag("replace the file", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, RecipesArguments)
    if args.copy is not None:
        print(copy_recipe(args.copy, args.output, args.overwrite))
        return
    recipes = recipe_files()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        print(f"{name:<{width}}  {first_sentence(path)}")
    print("\nstformer-hf pretrain --config NAME runs one; stformer-hf recipes --copy NAME copies one to change it.")


def first_sentence(recipe: Path) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:4] if line.startswith("#"))
    return re.split(r"[.:] |  ", comment)[0].rstrip(".:")


def copy_recipe(name: str, output: str | None = None, overwrite: bool = False) -> Path:
    """Copy a recipe to a file, and return its path."""
    recipes = recipe_files()
    if name not in recipes:
        raise ValueError(f"There is no recipe {name!r}{closest(name, recipes)}. `stformer-hf recipes` lists them.")
    path = Path(output or f"{name}.yaml")
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipes[name], path)
    return path
