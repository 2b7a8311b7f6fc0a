"""Copy a trained classifier into a package: with its card, without its code, and with weights of 16 bits.

python packages/pack_model.py TRAINED packages/fetal_tiny

The weights are loaded as float32. The package requires stformer_hf, which has the code. In the card, the section about
the licence is replaced by the package's `card.md`.
"""

import shutil
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import stformer_hf  # noqa: F401, registers the models


def pack(trained: Path, package: Path, licence: str = "apache-2.0") -> None:
    """Write the trained model into a package, instead of the one that is there."""
    folder = package / f"stformer_hf_{package.name}" / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    model.half().save_pretrained(folder)
    model.config.dtype = "float32"  # of the weights once loaded
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    shutil.copy(trained / "out_of_fold.safetensors", folder)
    card = ModelCard.load(trained / "README.md")
    card.data.license = licence
    before, after = card.text.split("## Licence")
    card.text = before + (package / "card.md").read_text() + after[after.index("\n\nMade with ") :]
    card.save(folder / "README.md")


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
