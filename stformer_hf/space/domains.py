"""Spatial domains: groups of cells whose embeddings are alike, into `obs`."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from .. import __version__

logger = logging.getLogger(__name__)

METHODS = ("kmeans", "leiden")
_N_DOMAINS = 10
_MOST_CELLS = 100_000  # that k-means looks at all at once
_BATCH_SIZE = 4096  # of k-means on more cells


def spatial_domains(
    adata: AnnData,
    n_domains: int | None = None,
    *,
    use_rep: str = "X_neighborhood",
    method: str = "kmeans",
    resolution: float = 1.0,
    key_added: str = "domain",
    seed: int = 0,
) -> None:
    """Group the cells by their neighbourhoods, and write the groups into `adata.obs[key_added]`.

    Parameters
    ----------
    adata : AnnData
        With `obsm[use_rep]`.
    n_domains : int, optional
        Of k-means; 10 by default. Leiden finds the number itself.
    use_rep : str, default: "X_neighborhood"
        Which embedding; `embed_neighborhoods` makes it.
    method : {"kmeans", "leiden"}, default: "kmeans"
        scikit-learn's k-means, of 10 starts the best (by mini-batches above 100,000 cells); or leiden, by scanpy and
        igraph, on scanpy's graph of the 15 nearest cells, which stays in the AnnData under `{key_added}_neighbors` and
        leaves another graph as it is.
    resolution : float, default: 1.0
        Of leiden: more gives more domains. K-means does not read it.
    key_added : str, default: "domain"
        Column of obs: a categorical of "0", "1", …, the largest domain first. The settings go to `uns[key_added]`.
    seed : int, default: 0
        Of the random numbers.

    Raises
    ------
    ValueError
        No such embedding; one that is not finite, or the same for all cells; more domains than cells; `n_domains` of
        leiden; an unknown method.
    ImportError
        Leiden without scanpy and igraph.

    Notes
    -----
    Where the embedding takes fewer values than there are to be domains, each value is a domain, and this is told.
    """
    check_domains(method, n_domains)
    if use_rep not in adata.obsm:
        raise ValueError(
            f"There is no obsm[{use_rep!r}]; obsm has {', '.join(map(repr, adata.obsm)) or 'nothing'}. "
            "embed_neighborhoods makes an embedding of neighbourhoods."
        )
    embedding = np.asarray(adata.obsm[use_rep])
    if embedding.ndim != 2:
        raise ValueError(f"obsm[{use_rep!r}] has the shape {embedding.shape}; an embedding has a row a cell.")
    finite = np.isfinite(embedding).all(axis=1)
    if not finite.all():
        raise ValueError(f"{(~finite).sum()} of {len(finite)} cells have NaN or infinite values in obsm[{use_rep!r}].")
    if not (embedding != embedding[:1]).any():
        raise ValueError(
            f"obsm[{use_rep!r}] is the same for all {len(embedding)} cells: there are no domains. Neighbourhoods that "
            "are all empty give that: look at patch_size and the unit of the coordinates."
        )
    if method == "kmeans":
        labels = _kmeans(embedding, _N_DOMAINS if n_domains is None else int(n_domains), seed)
        settings = {}
    else:
        labels = _leiden(adata, use_rep, resolution, f"{key_added}_neighbors", seed)
        settings = {"resolution": resolution, "neighbors_key": f"{key_added}_neighbors"}
    _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    places = np.argsort(np.argsort(-sizes, kind="stable"))
    adata.obs[key_added] = pd.Categorical.from_codes(places[numbers], [str(i) for i in range(len(sizes))])
    adata.uns[key_added] = {
        "method": method,
        "use_rep": use_rep,
        "n_domains": len(sizes),
        "seed": seed,
        "version": __version__,
        **settings,
    }


def check_domains(method: str, n_domains: int | None) -> None:
    """Check what `spatial_domains` is asked for, and that what it needs is installed, before long work.

    Raises
    ------
    ValueError
        An unknown method; a number of domains that is none, or is given for leiden.
    ImportError
        Leiden without scanpy and igraph.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: there are {' and '.join(METHODS)}.")
    if n_domains is not None and (n_domains != int(n_domains) or n_domains < 1):
        raise ValueError(f"n_domains={n_domains}: a whole number of at least 1 is needed.")
    if method == "leiden":
        if n_domains is not None:
            raise ValueError("Leiden finds the number of domains itself: leave n_domains out; resolution= steers it.")
        try:
            import igraph  # noqa: F401
            import scanpy  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'{error}. method="leiden" needs scanpy and igraph: pip install "scanpy[leiden]".'
            ) from error


def _kmeans(embedding: np.ndarray, n_domains: int, seed: int) -> np.ndarray:
    """Give the cluster of each cell: int array (n_cells,)."""
    if n_domains > len(embedding):
        raise ValueError(f"{n_domains} domains of {len(embedding)} cells: make n_domains smaller.")
    if len(embedding) > _MOST_CELLS:
        means = MiniBatchKMeans(n_domains, batch_size=_BATCH_SIZE, n_init=10, random_state=seed)
    else:
        means = KMeans(n_domains, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told below
        labels = means.fit_predict(embedding)
    n_found = len(np.unique(labels))
    if n_found < n_domains:
        logger.warning(f"There are {n_found} domains in place of {n_domains}: cells take no more distinct values.")
    return labels


def _leiden(adata: AnnData, use_rep: str, resolution: float, neighbors_key: str, seed: int) -> np.ndarray:
    """Give the community of each cell: array (n_cells,) of str."""
    import scanpy as sc

    sc.pp.neighbors(adata, use_rep=use_rep, key_added=neighbors_key, random_state=seed)
    # Under its own names, in an AnnData of its own: leiden writes into obs and uns.
    graph = AnnData(obs=pd.DataFrame(index=adata.obs_names))
    graph.obsp["connectivities"] = adata.obsp[f"{neighbors_key}_connectivities"]
    sc.tl.leiden(
        graph,
        resolution=resolution,
        obsp="connectivities",
        flavor="igraph",
        n_iterations=2,
        directed=False,
        random_state=seed,
    )
    return graph.obs["leiden"].to_numpy()


__all__ = ["check_domains", "spatial_domains"]
