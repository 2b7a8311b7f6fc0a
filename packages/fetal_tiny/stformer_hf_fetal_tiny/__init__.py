"""`fetal_tiny`, a small model of human fetal cells for stformer_hf: `stformer-hf embed --model fetal_tiny`."""

from pathlib import Path

FOLDER = str(Path(__file__).with_name("model"))
