"""Load models and tokenizers by name, and unwrap models from PEFT and torch wrappers."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .cell_heads import check_predicts_cells

MODEL_CONFIG = "model_config.json"  # beside an adapter: the configuration of the model that it was trained in
MODEL_PACKAGES = "stformer_hf.models"  # group of entry points
_CONFIG, _ADAPTER, _TOKENIZER = "config.json", "adapter_config.json", "tokenizer_config.json"
_WRAPPED = ("_orig_mod", "module")  # by torch.compile; by DataParallel, DistributedDataParallel, AveragedModel
_OF_TASK = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


# ---------------------------------------------------------------------- objects


def unwrap(model: Any, merge: bool = False) -> PreTrainedModel:
    """Return the model inside wrappers of PEFT, `torch.compile`, and data parallelism or averaging, in any order.

    The adapters of a PEFT model stay active in it; with `merge`, they are merged into the weights of a copy. Otherwise
    the weights are shared. Raise a TypeError if there is no PreTrainedModel inside, and a ValueError for PEFT's
    prompts, which are not part of the model.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            if inner.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"{type(inner).__name__} puts learnt prompts before the tokens, which cells do not support: "
                    "use an adapter with weights, such as LoRA."
                )
            inner = _merged(copy.deepcopy(inner)) if merge else inner.get_base_model()
            continue
        name = next((name for name in _WRAPPED if isinstance(getattr(inner, name, None), nn.Module)), None)
        if name is None:
            raise TypeError(
                f"A model must be the folder of a checkpoint, or a PreTrainedModel (possibly wrapped by PEFT or "
                f"torch); got {type(model).__name__}."
            )
        inner = getattr(inner, name)
    if merge and any(hasattr(module, "base_layer") for module in inner.modules()):
        raise ValueError(
            f"The {type(inner).__name__} has adapters in its layers (add_adapter), which cannot be merged: save them, "
            "and load them with peft.PeftModel.from_pretrained(base, folder)."
        )
    return inner


def _merged(model: Any) -> PreTrainedModel:
    """Merge the adapters of a PEFT model into its weights.

    An embedding of tokens and an output layer that share their weight no longer do if one of them has an adapter,
    which would be merged into both.
    """
    inner = model.get_base_model()
    layers = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    adapted = [layer.base_layer for layer in layers if hasattr(layer, "base_layer")]
    if None not in layers and adapted:
        for layer in adapted:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        inner.config.tie_word_embeddings = False
    return model.merge_and_unload()


def is_model(model: Any) -> bool:
    """Return whether something is a model object rather than the name of one."""
    return not isinstance(model, (str, os.PathLike))


def name_of(model: Any) -> str:
    """Return the folder or repository of a model if it has one, else the name of its class."""
    if not is_model(model):
        return str(model)
    model = unwrap(model)
    return model.config._name_or_path or type(model).__name__


# ---------------------------------------------------------------------- checkpoints


def is_hub_id(name: str | None) -> bool:
    """Return whether a name is valid for a repository on the Hub, and no local file or folder has it."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_adapter(model: str | os.PathLike) -> bool:
    """Return whether a folder, or that of a model of an installed package, holds a PEFT adapter, and not a model."""
    return _read_adapter(find_installed(os.fspath(model)) or os.fspath(model)) is not None


def holds_model(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds a model or a PEFT adapter."""
    return any((Path(folder) / name).exists() for name in (_CONFIG, _ADAPTER))


def find_installed(name: str) -> str | None:
    """Return the folder of a model that an installed package provides, by the name of the model.

    Return None if no package provides it, or if a local file or folder has the same name, as local paths come first. A
    package provides a model with an entry point in the group `stformer_hf.models`, whose name is that of the model and
    whose object is the path of the folder.
    """
    points = () if os.path.exists(name) else entry_points(group=MODEL_PACKAGES, name=name)
    return next((os.fspath(point.load()) for point in points), None)


def load_config(model: str | os.PathLike) -> PreTrainedConfig:
    """Load the configuration of a checkpoint; for an adapter, that of the model that it was trained in.

    Raise a FileNotFoundError if the folder does not exist (naming the closest one), or holds no checkpoint.
    """
    name = _checked(model)
    adapter = _read_adapter(name)
    if adapter is None:
        return _of_hub(name, AutoConfig.from_pretrained)
    if (Path(name) / MODEL_CONFIG).exists():
        fields = json.loads((Path(name) / MODEL_CONFIG).read_text(encoding="utf-8"))
        return AutoConfig.for_model(**fields)
    return load_config(_base_of(name, adapter))


def tokenizer_of(model: Any, tokenizer: Any | None) -> Any:
    """Return the tokenizer given, else that of a checkpoint or of a model object; a ValueError if that has none."""
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None) if is_model(model) else load_tokenizer(model)
    if tokenizer is None:
        raise ValueError("A model object needs its tokenizer: pass tokenizer=…, or the checkpoint's path as model.")
    return tokenizer


def load_tokenizer(model: str | os.PathLike) -> Any:
    """Load the tokenizer of a checkpoint; for an adapter without its own, that of its base.

    Raise a FileNotFoundError as `load_config` does, and if the folder has no tokenizer.
    """
    name = _checked(model, tokenizer=True)
    if os.path.isdir(name) and not (Path(name) / _TOKENIZER).exists():
        adapter = _read_adapter(name)
        if adapter is not None:
            return load_tokenizer(_base_of(name, adapter))
        raise FileNotFoundError(
            f"{name} holds no tokenizer ({_TOKENIZER}): save it beside the model, "
            f"tokenizer.save_pretrained({name!r}), or pass tokenizer=…"
        )
    return _of_hub(name, AutoTokenizer.from_pretrained)


def load_model(
    model: str | os.PathLike, auto_class: Any = AutoModel, *, new_head: bool = False, **settings: Any
) -> PreTrainedModel:
    """Load a checkpoint, and refuse it if weights are missing, which would be random.

    Parameters
    ----------
    model : str or Path
        Folder of a checkpoint, or of a PEFT adapter, whose base is loaded and whose weights are merged into it; or the
        name of one that an installed package brings, or of one on the Hub.
    auto_class : class, default: AutoModel
        Auto class to load it with. An adapter is loaded in the class of the model that it was trained in.
    new_head : bool, default: False
        Allow a new head, possibly of another size than the checkpoint's, for a model that will be trained.
    **settings
        As for `from_pretrained`.

    Raises
    ------
    ValueError
        The checkpoint lacks weights, such as those of a head that it was not trained with.
    FileNotFoundError, ImportError
        As for `load_config`; it is an adapter, and PEFT is not installed.
    """
    name = _checked(model)
    adapter = _read_adapter(name)
    if adapter is not None:
        found = _load_adapter(name, adapter)
        if auto_class is not AutoModel and not isinstance(found, auto_class._model_mapping[type(found.config)]):
            raise ValueError(f"The adapter {name} belongs to a {type(found).__name__}, which has no such outputs.")
        return found
    if auto_class is AutoModelForSequenceClassification and not new_head:
        check_predicts_cells(load_config(name).architectures or [], name)
    with _without_report():
        found, loaded = _of_hub(
            name, auto_class.from_pretrained, output_loading_info=True, ignore_mismatched_sizes=new_head, **settings
        )
    found.config._name_or_path = os.fspath(model)  # for adapters and cards: the path of a package is of one machine
    missing = loaded["missing_keys"]
    if new_head:
        of_encoder = f"{found.base_model_prefix}."
        missing = [key for key in missing if key.startswith(of_encoder) and not key.endswith(".cls_gate")]
    _check_whole(name, missing)
    return found


def let_cls_learn(config: PreTrainedConfig, gated: bool = True) -> dict[str, str]:
    """Return the fields of a configuration with which a loss trains `[CLS]`, where a checkpoint keeps it fixed.

    `gated=False` is for adapters, which train no gates.
    """
    fixed = getattr(config, "cls_state", None) == "fixed"
    return {"cls_state": "gated" if gated else "layers"} if fixed else {}


def _check_whole(name: str, missing: Any) -> None:
    # The pooler is not used here, and masked models are saved without it.
    missing = sorted(key for key in missing if "pooler" not in key.split("."))
    if missing:
        raise ValueError(
            f"{name} does not hold the weights {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}, which "
            "would be random. Train the model with this head first (stformer-hf finetune)."
        )


def _load_adapter(name: str, adapter: dict[str, Any]) -> PreTrainedModel:
    try:
        from peft import PeftModel
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ImportError(f"{name} is an adapter, which needs PEFT: pip install peft") from error
    base = _base_of(name, adapter)
    task, mapping = adapter.get("task_type"), adapter.get("auto_mapping")
    if task in (*_OF_TASK, "FEATURE_EXTRACTION"):
        auto_class = _OF_TASK.get(task, AutoModel)
    elif mapping:
        auto_class = getattr(import_module(mapping["parent_library"]), mapping["base_model_class"])
    else:
        raise ValueError(
            f"The adapter {name} does not say for which kind of model it was trained (task_type): load it with "
            "peft.PeftModel.from_pretrained(base, folder), and pass the object."
        )
    config = load_config(name)
    genes, genes_of_base = (getattr(of, "vocabulary_fingerprint", None) for of in (config, load_config(base)))
    if None not in (genes, genes_of_base) and genes != genes_of_base:
        raise ValueError(
            f"The adapter {name} was trained on a model with other genes, bins or phenotypes (fingerprint {genes}) "
            f"than its base {base} ({genes_of_base}): write the base that it was trained on into {_ADAPTER}."
        )
    names_outputs = (Path(name) / MODEL_CONFIG).exists() or "Classification" in "".join(config.architectures or [])
    if task in _OF_TASK and not names_outputs:
        raise ValueError(
            f"The adapter {name} has a head, but neither it ({MODEL_CONFIG}, which CellTrainer writes) nor its base "
            f"{base} names its outputs. Load it with peft.PeftModel.from_pretrained(base with id2label, "
            "folder), and pass the object."
        )
    with _without_report():  # of the head as new: the adapter holds it
        found, loaded = _of_hub(
            base, auto_class.from_pretrained, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    held = load_peft_weights(name, device="cpu")
    try:
        merged = _merged(PeftModel.from_pretrained(found, name))
    except (RuntimeError, KeyError) as error:  # other shapes, or other weights
        raise ValueError(f"The adapter {name} does not fit its base {base}: {error}") from error
    missing = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}  # of a head of other classes
    _check_whole(name, [key for key in missing if f"base_model.model.{key}" not in held])
    merged.config._name_or_path = name
    return merged


def _base_of(name: str, adapter: dict[str, Any]) -> str:
    """Find the base of an adapter at its recorded path, or beside the adapter."""
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"The adapter {name} does not name its base (base_model_name_or_path in {_ADAPTER}): load it with "
            "peft.PeftModel.from_pretrained(base, folder), and pass the object."
        )
    beside = Path(name).resolve().parent / Path(base).name
    if not os.path.exists(base) and (beside / _CONFIG).exists():
        return str(beside)
    base = find_installed(base) or base
    if not os.path.exists(base) and not is_hub_id(base):
        raise FileNotFoundError(f"The base of the adapter {name} does not exist: {base}. Correct it in {_ADAPTER}.")
    return base


def _read_adapter(name: str) -> dict[str, Any] | None:
    path = Path(name) / _ADAPTER
    if not path.exists() or (Path(name) / _CONFIG).exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _checked(model: str | os.PathLike, tokenizer: bool = False) -> str:
    """Return the folder of a checkpoint, or its name on the Hub, after checking that it may exist."""
    name = find_installed(os.fspath(model)) or os.fspath(model)
    if os.path.isdir(name):
        wanted = [_CONFIG, _ADAPTER, *([_TOKENIZER] if tokenizer else [])]
        if any((Path(name) / file).exists() for file in wanted):
            return name
        inner = sorted(path.parent.as_posix() for path in Path(name).glob("*/*onfig.json") if path.name in wanted)
        hint = f" It contains: {', '.join(dict.fromkeys(inner))}." if inner else ""
        raise FileNotFoundError(f"The folder {name} holds no checkpoint (no {_CONFIG}).{hint}")
    if os.path.exists(name):
        raise FileNotFoundError(f"{name} is a file; pass the folder of a checkpoint.")
    is_local = len(Path(name).parts) > 1 and os.path.isdir(Path(name).parts[0])
    if is_local or "/" not in name or not is_hub_id(name):  # those of the Hub are owner/name
        raise FileNotFoundError(f"There is no folder {name!r}{_closest(name)}.")
    return name


def _closest(name: str) -> str:
    """Name the existing folder closest to a missing one, in its parent or the closest existing ancestor."""
    path = Path(name)
    while not path.parent.is_dir():
        path = path.parent
    try:
        there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f"; the closest is {path.parent / found[0]}" if found else ""


@contextmanager
def _without_report() -> Iterator[None]:
    """Load a model without the report and the bar of transformers: what is missing is checked here."""
    verbosity, with_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if with_bar:
            logging.enable_progress_bar()


def _of_hub(name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Load by name; if nothing is found, the error mentions the missing folder as well."""
    try:
        return load(name, *args, **kwargs)
    except OSError as error:
        if os.path.exists(name):
            raise
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"There is no folder {name!r}{_closest(name)}. It was not found on the Hub either: {first}"
        ) from error
