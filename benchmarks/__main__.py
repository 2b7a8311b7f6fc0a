"""`python -m benchmarks NAME [flags]`; without a name, all of them."""

import importlib
import sys

BENCHMARKS = ("data", "tokens", "model", "training", "space", "quality", "perturb")
# Those that read files named by flags, need a GPU, or are long: only run when asked for.
OF_FILES = ("objectives", "gpu", "annotate", "embed", "network", "scale", "streams", "commits")


def main() -> None:
    """Run a benchmark with its flags, or all of them."""
    name, *flags = sys.argv[1:] or [""]
    if name in ("-h", "--help") or (name and name not in BENCHMARKS + OF_FILES):
        print(f"python -m benchmarks [{' | '.join(BENCHMARKS + OF_FILES)}] [flags; --help tells them]")
        sys.exit(0 if name in ("-h", "--help") else 2)
    for each in [name] if name else BENCHMARKS:
        importlib.import_module(f"benchmarks.{each}").run(flags)


main()
