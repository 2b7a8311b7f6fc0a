"""Find the gene of each column of a matrix: the one place that reads the names in `AnnData.var`."""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

GeneNames = Sequence[str] | np.ndarray

# Ensembl, FlyBase, WormBase, TAIR and SGD. The prefix of an Ensembl id shows the species.
_ID = (
    r"(?:ENS(?P<species>[A-Z]*)G\d{11}(?P<version>\.\d+)?(?P<par>_PAR_Y)?|(?P<fly>FBgn\d{7})|(?P<worm>WBGene\d{8})"
    r"|(?P<cress>AT[1-5CM]G\d{5})|(?P<yeast>Y[A-P][LR]\d{3}[WC](?:-[A-Z])?))$"
)
_GENE_ID = re.compile(_ID)
_SPECIES = {
    "": "human",
    "MUS": "mouse",
    "RNO": "rat",
    "DAR": "zebrafish",
    "MMU": "macaque",
    "PTR": "chimpanzee",
    "SSC": "pig",
    "BTA": "cow",
    "GAL": "chicken",
    "CJA": "marmoset",
}
_OTHER_ID = re.compile(r"^[A-Za-z]\w*(?:\.\w+)?\d{5}(?:\.\d+)?$")  # other ids, if the column's name says id
# Prefixes of the names of a reference: whatever comes before ids, or one of these. Seurat replaces _ by -.
_BEFORE_ID = re.compile(rf"(?P<reference>[A-Za-z][\w.]*?)[_-]+{_ID}")
_REFERENCE = re.compile(
    r"(GRC[a-z]{1,2}\d+|hg\d{2}|mm\d{1,2}|rn\d|danRer\d+|dm\d|BDGP\d+|ce\d{1,2}|WBcel\d+|sacCer\d|TAIR\d+|Rnor_[\d.]+)"
    r"[_-]+(?=[^_-])"
)
_LEAST_SHARE = 0.05  # smallest share of the ids of a column that a reference prefixes
_OLD_COPY = re.compile(r"ENSGR(\d{10}(?:\.\d+)?)$")  # a gene on Y, in GENCODE up to release 24
_PLACEHOLDERS = frozenset(("", "nan", "na", "n/a", "none", "null", "<na>", "nat", "-", "--", ".", "unknown"))
# Names of columns, without case and punctuation. The values decide what a column holds.
_ID_COLUMNS = (
    *("ensemblid", "ensemblids", "ensembl", "ensemblgeneid", "ensemblgeneids", "ensembleid", "ensembleids"),
    *("geneid", "geneids", "featureid", "featureids", "genestableid", "stableid", "accession", "ensg", "id", "ids"),
)
_SYMBOL_COLUMNS = (
    *("genesymbol", "genesymbols", "genename", "genenames", "featurename", "featurenames", "symbol", "symbols"),
    *("geneshortname", "externalgenename"),
)
# They may hold anything, or symbols of orthologs.
_LOOSE_COLUMNS = ("hgncsymbol", "mgisymbol", "features", "feature", "genes", "gene", "names", "name")
_USUAL_COLUMNS = {"id": _ID_COLUMNS, "symbol": _SYMBOL_COLUMNS, "name": _LOOSE_COLUMNS}
_PHRASE = re.compile(r".*\S\s+\S")  # a description
_COUNTED = re.compile(r"(?:\.0|-\d+)$")  # 0.0 from a table read as numbers, 0-1 from joined files
_LARGEST_ROW_NUMBER = 200_000  # no reference has so many genes; ascending Entrez ids soon exceed it


class GeneColumns(NamedTuple):
    """Genes of n columns, object arrays of str (n,)."""

    gene_ids: np.ndarray  # without version; the symbol for a gene without an id, "" for a column without any name
    symbols: np.ndarray  # the id for a gene without a symbol
    genomes: np.ndarray | None  # reference in the prefix of each name, "" for names without one; None if all are


def resolve_genes(
    index: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None = None, copies: bool = False
) -> GeneColumns:
    """Find the gene of each column of a matrix from the names in `var`.

    The rules, in this order:

    1. Names are text, stripped of spaces. Placeholders ("nan", "NA", "None", "<NA>", "-", "unknown", a missing value,
       …) are not names. The prefix of a reference (`GRCh38_`, `mm10___`, `hg19-`, or any prefix of 5 % of the ids) is
       cut, and kept as `genomes`; genes of two genomes that share a name and have no id keep it. From a probe's name
       (`ENSG00000121410|A1BG|a1b2c3d`) the id is taken.
    2. Row numbers are not names: an index of numbers below 200,000 (`0`, `0-1`, `0.0`) is ignored if a column has
       names. If none has, it is refused if it counts 0, 1, 2, … or 1, 2, 3, … in any order, or ascends.
    3. Ids are preferred to symbols, separately for each gene. They are taken from the index if over half of its names
       are ids, else from columns with a usual name (`gene_ids`, `feature_id`, `ensembl`, `Accession`, …, `gene_ids-0`;
       case and punctuation are ignored), the one with most ids first; from one species only, if nine in ten agree. If
       there are none, they are taken from a column whose names end in five digits (such as Zm00001d027230): one with a
       usual name, or the index if a column holds symbols. Versions and `_PAR_Y` are cut: the copies of a gene on X and
       Y are one gene.
    4. Symbols are taken from columns with a usual name (`gene_symbols`, `feature_name`, …) that hold text, but not
       descriptions: an index may have made them safe (`MT.ND1`), or unique among others (`MALAT1--1`). Else, and if
       several genes share a symbol, they are the names of an index that holds no ids, else those of columns such as
       `features` or `name`.
    5. A gene without an id gets its name in the index as id, else its symbol; a gene without a symbol gets its id as
       symbol.

    Parameters
    ----------
    index : sequence (n,)
        `var_names`.
    columns : mapping of str to sequence (n,), optional
        Columns of `var`, such as a DataFrame. Those without a usual name are not read.
    copies : bool, default: False
        Keep `_PAR_Y`, for a vocabulary that may have both copies.

    Raises
    ------
    ValueError
        The names are row numbers, and no column has names.
    """
    columns = {} if columns is None else columns
    usual = _usual_columns(columns)
    texts = [_texts(index), *(_texts(columns[name]) for name, _ in usual)]
    references: set[str] = set().union(*map(_references, texts))
    genomes = np.full(len(index), "", object)
    own, *others = (_Names.of(_cut(text, references, genomes)) for text in texts)
    with_ids, with_other_ids = [], []
    with_symbols: list[np.ndarray] = []
    with_names: list[np.ndarray] = []
    for (name, kinds), values in zip(usual, others, strict=True):
        if "id" in kinds and values.mostly_ids:
            with_ids.append(values)
        elif "id" in kinds and _mostly(_OTHER_ID, values.names):
            with_other_ids.append(values.names)
        elif (
            kinds & {"symbol", "name"} and values.names.any() and not values.mostly_ids and _holds_text(columns[name])
        ):
            is_loose = "name" in kinds or _mostly(_PHRASE, values.names)
            (with_names if is_loose else with_symbols).append(values.names)
    others_have_names = bool(with_ids or with_other_ids or with_symbols or with_names)
    if _are_row_numbers(own.names, others_have_names):
        if not others_have_names:
            there = ", ".join(map(str, columns)) or "none"
            raise ValueError(
                f"The genes are named {', '.join(own.names[:3])}, …: these are row numbers. Put gene names into "
                f"var_names, or into a column gene_id or gene_symbol of var (its columns: {there}). If they are "
                "ascending Entrez ids, add a prefix such as entrez:."
            )
        own = _Names.of(np.full(len(index), "", object))
    with_ids.sort(key=lambda values: -values.are_ids.sum())
    ids, own_are_ids = np.full(len(index), "", object), own.mostly_ids
    if own_are_ids or with_ids:
        ids = _ids_of_one_species([own, *with_ids] if own_are_ids else [*with_ids, own])
    elif with_other_ids:
        ids = with_other_ids[0]
    elif _all_digits(own.names) or (
        (with_symbols or with_names) and _mostly(_OTHER_ID, own.names)
    ):  # Entrez, RefSeq, maize, …
        ids, own_are_ids = own.names, True
    if own_are_ids:
        symbols = _first([*with_symbols, *with_names, own.names])
    else:
        symbols = _first([*map(_unrepeated, with_symbols), own.names, *with_symbols, *with_names])
    ids = strip_versions(_first([ids, own.names, symbols]))
    if not copies:
        ids, n_copies = _of_x(ids)
        if n_copies:
            logger.warning(
                f"{n_copies} genes of the Y chromosome's pseudoautosomal regions (_PAR_Y) are counted as those of X."
            )
    symbols = np.where((symbols == "") | (are_ids(symbols) if own_are_ids else False), ids, symbols)
    if not genomes.any():
        return GeneColumns(ids, symbols, None)
    return GeneColumns(_apart(ids, genomes), symbols, genomes)


def _first(kinds: list[np.ndarray]) -> np.ndarray:
    """Return each name from the first kind that has one."""
    found = kinds[0].copy()
    for names in kinds[1:]:
        blank = found == ""
        found[blank] = names[blank]
    return found


def _unrepeated(names: np.ndarray) -> np.ndarray:
    """Return names, "" where several columns have the same one."""
    times = Counter(names)
    return np.array([name if times[name] == 1 else "" for name in names], object)


class _Names(NamedTuple):
    """Names of all columns, object array of str (n,), and which of them are ids, bool array (n,)."""

    names: np.ndarray
    are_ids: np.ndarray

    @classmethod
    def of(cls, names: np.ndarray) -> "_Names":
        return cls(names, are_ids(names))

    @property
    def mostly_ids(self) -> bool:
        return 2 * self.are_ids.sum() > (self.names != "").sum()


def _ids_of_one_species(kinds: list[_Names]) -> np.ndarray:
    """Return each id from the first kind that has one of the first kind's species."""
    found = np.full(len(kinds[0].names), "", object)
    species = guess_species(kinds[0].names) if len(kinds) > 1 else None
    for names, ids in kinds:
        taken = (found == "") & ids
        if species is not None:
            taken[taken] = [species_of(name) == species for name in names[taken]]
        found[taken] = names[taken]
    return found


# ---------------------------------------------------------------------- names


def clean_names(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return names cleaned as `resolve_genes` cleans an index, object array of str (n,); "" for placeholders."""
    texts = _texts(values)
    names = strip_versions(_cut(texts, _references(texts), np.full(len(texts), "", object)))
    return _of_x(names)[0]


def _of_x(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Rename the copies on Y of genes on X and Y to those on X; also return their number."""
    copied = [i for i, name in enumerate(ids) if name.endswith("_PAR_Y") and is_id(name)]
    ids[copied] = [name.removesuffix("_PAR_Y") for name in ids[copied]]
    return ids, len(copied)


def _texts(values: Sequence[Any] | np.ndarray) -> list[str]:
    """Return names as text: "" for placeholders, the id for probes, `_PAR_Y` for copies on Y."""
    values = listed(values)
    if set(map(type, values)) == {str}:  # the fast way for most files
        names = list(map(str.strip, values))
        for word in set(map(str.lower, set(names))) & _PLACEHOLDERS:
            names = ["" if name.lower() == word else name for name in names]
    else:
        names = list(map(as_text, values))
    together = "\n".join(names)
    if not any(part in together for part in ("|", "ENSGR", "-PAR-Y")):
        return names
    for i in [i for i, name in enumerate(names) if "|" in name or name.startswith("ENSGR") or name.endswith("-PAR-Y")]:
        first = names[i].partition("|")[0].replace("-PAR-Y", "_PAR_Y")
        first = _OLD_COPY.sub(r"ENSG0\1_PAR_Y", first)
        names[i] = first if is_id(first) or "|" not in names[i] else names[i]
    return names


def listed(values: Sequence[Any] | np.ndarray) -> list:
    """Return the names of a column, unchanged; raise ValueError for two columns, or arrays instead of names."""
    names = np.asarray(values, dtype=object)
    if names.ndim != 1:
        raise ValueError(f"Gene names must be one column of text, got shape {names.shape}: is a column name repeated?")
    listed = names.tolist()
    for kind in set(map(type, listed)) - {str, float, type(None)}:
        if issubclass(kind, (np.ndarray, list, tuple, dict, set)):
            raise ValueError(f"Gene names must be text, but a column of var holds {kind.__name__}s.")
    return listed


def as_text(value: Any) -> str:
    """Return a name as text, stripped of spaces; "" for a placeholder."""
    if type(value) is not str:
        value = value.decode() if isinstance(value, bytes) else str(value)  # None, NaN, NA become placeholders
    value = value.strip()
    return "" if value.lower() in _PLACEHOLDERS else value


def _references(names: list[str]) -> set[str]:
    """Return the prefixes that many of the ids have."""
    found = Counter(
        match.group("reference") for name in names if "_" in name or "-" in name if (match := _BEFORE_ID.match(name))
    )
    return {reference for reference, n in found.items() if n >= max(1, _LEAST_SHARE * len(names))}


def _cut(names: list[str], references: set[str], genomes: np.ndarray) -> np.ndarray:
    """Return names without their references, object array of str (n,), and write the references to `genomes`."""
    found = np.array(names, object)
    longest_first = sorted(references, key=len, reverse=True)
    for i in [i for i, name in enumerate(names) if "_" in name or "-" in name]:
        name, match = names[i], _REFERENCE.match(names[i])
        reference = next((known for known in longest_first if name.startswith((f"{known}_", f"{known}-"))), None)
        reference = match.group(1) if reference is None and match else reference
        if reference is not None and (rest := name[len(reference) :].lstrip("_-")):
            genomes[i], found[i] = reference, rest
    return found


def _usual_columns(columns: Mapping[str, Any]) -> list[tuple[str, set[str]]]:
    """Return the columns with a usual name, in the order of the usual names, and what they may hold."""
    found = []
    for name in columns:
        plain = plain_name(name)
        kinds = {kind for kind, usual in _USUAL_COLUMNS.items() if plain in usual}
        if kinds:
            found.append((name, kinds, [*itertools.chain(*_USUAL_COLUMNS.values())].index(plain)))
    return [(name, kinds) for name, kinds, _ in sorted(found, key=lambda one: one[2])]


def plain_name(name: Any) -> str:
    """Return a column name without case, punctuation, and the number that joining adds, as in `gene_ids-0`."""
    return re.sub(r"[^a-z]", "", re.sub(r"-\d+$", "", str(name).lower()))


def _all_digits(names: Iterable[str]) -> bool:
    named = list(filter(None, names))
    return bool(named) and all(map(str.isdecimal, named))


def _holds_text(values: Sequence[Any]) -> bool:
    """Return whether a column holds names; numbers, also as text, and booleans are not names."""
    values = [value for value in listed(values) if isinstance(value, (str, bytes))]
    return bool(values) and not _all_digits(map(as_text, values))


def _are_row_numbers(names: np.ndarray, others: bool) -> bool:
    """Return whether an index holds row numbers; `others` is whether other columns have names."""
    if not len(names) or not all(_COUNTED.sub("", name).isdecimal() for name in names):
        return False
    bare = [_COUNTED.sub("", name) for name in names]
    numbers = list(map(int, bare))
    if others or bare != names.tolist():
        return max(numbers) < _LARGEST_ROW_NUMBER
    if max(numbers) - min(numbers) == len(numbers) - 1 and min(numbers) <= 1 and len(set(numbers)) == len(numbers):
        return True
    ascending = all(one < other for one, other in itertools.pairwise(numbers))
    return max(numbers) < _LARGEST_ROW_NUMBER and len(numbers) > 1 and ascending


def _apart(ids: np.ndarray, genomes: np.ndarray) -> np.ndarray:
    """Restore the genome before names that genes of two genomes share."""
    first: dict[str, str] = {}
    shared = {name for name, genome in zip(ids, genomes, strict=True) if first.setdefault(name, genome) != genome}
    if shared:
        logger.warning(
            f"{len(shared)} names are shared by genes of two genomes, such as {min(shared)!r}: these genes keep the "
            "genome before their name."
        )
        pairs = zip(ids, genomes, strict=True)
        ids[:] = [f"{genome}_{name}" if name in shared and genome else name for name, genome in pairs]
    return ids


# ---------------------------------------------------------------------- ids


def is_id(name: str) -> bool:
    """Return whether a name looks like a gene id of Ensembl, FlyBase, WormBase, TAIR or SGD."""
    return _GENE_ID.match(name) is not None


def are_ids(names: Collection[str]) -> np.ndarray:
    """Return which names look like gene ids, bool array (n,)."""
    return np.fromiter(map(bool, map(_GENE_ID.match, names)), bool, len(names))


def mostly_ids(names: Iterable[str]) -> bool:
    """Return whether over half of the names that are not empty look like gene ids."""
    return _mostly(_GENE_ID, names)


def _mostly(pattern: re.Pattern, names: Iterable[str]) -> bool:
    named = list(filter(None, names))
    return 2 * sum(map(bool, map(pattern.match, named))) > len(named)


def strip_version(name: str) -> str:
    """Cut the version of an Ensembl id; `_PAR_Y` stays."""
    match = _GENE_ID.match(name)
    if match is None or not match.group("version"):
        return name
    return name[: match.start("version")] + (match.group("par") or "")


def strip_versions(names: Collection[str]) -> np.ndarray:
    """Cut the versions of Ensembl ids among names; return an object array of str (n,)."""
    return np.array([strip_version(name) if "." in name else name for name in names], object)


@lru_cache(maxsize=1 << 17)  # most files have the same genes, and each is read more than once
def species_of(name: str) -> str | None:
    """Return the species of an Ensembl id: a name such as `human`, or an unlisted prefix; None for other names."""
    match = _GENE_ID.match(name)
    if match is None or match.group("species") is None:
        return match and match.lastgroup
    return _SPECIES.get(match.group("species"), f"ENS{match.group('species')}")


def guess_species(names: Iterable[str]) -> str | None:
    """Return the species of gene ids; see `species_of`.

    None if there are no ids, or if fewer than nine in ten of them agree (mixed species).
    """
    found = Counter(map(species_of, names))
    del found[None]
    if not found:
        return None
    species, n = found.most_common(1)[0]
    return species if n >= 0.9 * found.total() else None


def describe(names: Iterable[str]) -> str:
    """Return a sample of gene names with a guess of their kind, for messages."""
    names = [str(name) for name in names]
    some = sample(names)
    matches = [match for name in names if (match := _GENE_ID.match(name)) and match.group("species") is not None]
    if len(matches) > len(names) / 2:
        prefix = max({match.group("species") for match in matches}, key=[m.group("species") for m in matches].count)
        versions = " with versions" if any(match.group("version") for match in matches) else ""
        return f"{some}: these look like Ensembl ids of {_SPECIES.get(prefix, 'ENS' + prefix)}{versions}"
    if names and all(name.isdigit() for name in names):
        return f"{some}: these look like row numbers or Entrez ids"
    words = [name for name in names if len(name) > 1 and name[0].isalpha()]
    if len(words) > len(names) / 2:
        for kind, write in (("human", str.upper), ("mouse", str.capitalize)):
            if sum(write(word) == word for word in words) > len(words) / 2:
                return f"{some}: these look like {kind} symbols"
        return f"{some}: these look like symbols"
    return some


def sample(names: Iterable[str], n: int = 3) -> str:
    """Return a few of the names, for messages."""
    return ", ".join(str(name) for name in list(names)[:n]) or "(none)"


class ColumnNames:
    """The `var_names` of a file, sequence (n,), and the columns of its `var`, resolved when they are needed."""

    def __init__(self, index: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None = None):
        columns = {} if columns is None else columns
        self._index, self._columns = index, columns
        read = [name for name, _ in _usual_columns(columns)]
        names = [listed(some) for some in (index, *(columns[name] for name in read))]
        self.key = hash((tuple(read), *map(tuple, names)))

    def __len__(self) -> int:
        return len(self._index)

    def are_of(self, key: Any) -> bool:
        """Return whether a key is that of equal names."""
        return isinstance(key, int) and key == self.key

    def resolve(self) -> tuple[GeneNames, GeneNames]:
        """Return gene ids and symbols, object arrays of str (n,)."""
        return resolve_genes(self._index, self._columns, copies=True)[:2]


class SharedNames:
    """Gene ids and symbols (n,) that are resolved, in arrays that all batches of a store share."""

    def __init__(self, gene_ids: GeneNames, symbols: GeneNames):
        self.key, self._symbols = gene_ids, symbols

    def __len__(self) -> int:
        return len(self.key)

    def are_of(self, key: Any) -> bool:
        """Return whether a key is that of the same array."""
        return key is self.key

    def resolve(self) -> tuple[GeneNames, GeneNames]:
        """Return gene ids and symbols."""
        return self.key, self._symbols
