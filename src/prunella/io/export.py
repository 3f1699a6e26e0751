"""Export a model to a common format, read it back with that format's own reader, and compare.

safetensors  the state dict            pt2  torch.export, any batch size where the model allows       onnx  torch.onnx
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from prunella.errors import CheckFailed, MissingExtra, NotSupported, RequestError
from prunella.graph.program.capture import TOLERANCE, capture, larger, quiet
from prunella.graph.verify import relative_error
from prunella.io.exported import load_exported
from prunella.io.files import ErrorDeferringStream, write_atomic
from prunella.io.state import read_state, write_tensors
from prunella.measure.text import byte_size
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.state import mode
from prunella.model.torch_masks import with_plain_weights
from prunella.model.trees import tensors
from prunella.types import Inputs

Format = Literal["safetensors", "pt2", "onnx"]
FORMATS: tuple[Format, ...] = ("safetensors", "pt2", "onnx")
_LARGEST_PROTOBUF = 1_900_000_000


@dataclass(frozen=True)
class Exported:
    """The written file, and the checks that it passed.

    difference: relative difference between the model and `reader` on the example; None if the format holds only
    tensors. dynamic: any batch size is accepted; sizes: any image size too. zeros: zero weights at the same place in
    the file, of `zeros_before`.
    """

    path: Path
    format: Format
    bytes: int
    reader: str
    difference: float | None
    dynamic: bool
    zeros: int
    zeros_before: int
    sizes: bool = False

    def __str__(self) -> str:
        same = "" if self.difference is None else f", output within {self.difference:.1e}"
        batch = ", any batch and image size" if self.sizes else ", any batch size" if self.dynamic else ""
        return f"{self.path}: {self.format}, {byte_size(self.bytes)}, read by {self.reader}{same}{batch}"


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Inputs | None = None,
    format: Format | None = None,
    any_size: bool = False,
) -> Exported:
    """Write `model` in eval mode to one file. The file appears only if its reader gives the same output.

    inputs: an example, needed for pt2 and onnx. format: by the suffix of `path` unless given. any_size: accept any
    height and width of images too, as any batch size; compared at other sizes. Errors: RequestError
    for an unknown format or a missing example, MissingExtra without onnx, NotSupported if torch cannot export the
    model, CheckFailed if the reader computes something else or zeros were lost.

    Example:

        >>> import tempfile, torch, prunella as pr
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = pr.export(torch.nn.Linear(8, 4), f"{folder}/model.safetensors")  # read again and compared
        ...     exported.path.name
        'model.safetensors'
    """
    model = with_plain_weights(model)
    final, chosen = Path(path), _format(Path(path), format)
    exports: list[Exported] = []
    on_cpu = _on_cpu(model)

    def write(temporary: Path) -> None:
        exports.append(_write(on_cpu, temporary, final, chosen, inputs, any_size))

    with mode(on_cpu, training=False), torch.no_grad(), quiet():
        write_atomic(final, write)
    return exports[0]


def _write(
    model: nn.Module, file: Path, final: Path, chosen: Format, inputs: Inputs | None, any_size: bool
) -> Exported:
    if chosen == "safetensors":
        kept, total = _safetensors(model, file)
        return _checked(Exported(final, chosen, file.stat().st_size, "safetensors", None, False, kept, total))
    if inputs is None:
        raise RequestError(f"{chosen} needs inputs=", "the model is traced with an example", "pass an example batch")
    example = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, inputs)
    examples = [example, larger(example)] if any_size else [example]
    make = _pt2 if chosen == "pt2" else _onnx
    dynamic, reader, outputs, state = make(model, file, examples)
    expected = [output for one in examples for output in outputs_of(model, one)]
    kept, total = _zeros(model, state)
    error, size = relative_error(expected, outputs), file.stat().st_size
    return _checked(Exported(final, chosen, size, reader, error, dynamic, kept, total, any_size))


def _checked(exported: Exported) -> Exported:
    what = f"the {exported.format} export is not written"
    if exported.difference is not None and not exported.difference <= TOLERANCE:
        raise CheckFailed(
            what, f"{exported.reader} differs from the model by {exported.difference:.1e} ({TOLERANCE:g} allowed)"
        )
    if exported.zeros != exported.zeros_before:
        raise CheckFailed(
            what, f"only {exported.zeros} of {exported.zeros_before} zero weights were found again in place"
        )
    return exported


def _safetensors(model: nn.Module, file: Path) -> tuple[int, int]:
    state = read_state(model)
    write_tensors({name: value for name, value in state.tensors.items() if name not in state.transient}, file)
    return _zeros(model, load_file(file))


_Made = tuple[bool, str, list[Tensor], Mapping[str, Tensor]]
"""Whether any batch size is accepted, the reader, its outputs for every example, and the tensors in the file."""


def _pt2(model: nn.Module, file: Path, examples: Sequence[Inputs]) -> _Made:
    program, dynamic = capture(model, examples[0], sizes=len(examples) > 1)
    program._example_inputs = None  # it would be stored as a pickle
    _remove_traces(program)
    with file.open("wb") as stream:
        deferring: Any = ErrorDeferringStream(stream)
        torch.export.save(program, deferring)
        deferring.check()
    again = load_exported(file)[0]
    outputs = [output for example in examples for output in outputs_of(again, example)]
    return dynamic, "torch.export.load", outputs, dict(again.state_dict())


def _remove_traces(program: torch.export.ExportedProgram) -> None:
    """Remove the stack traces of all nodes, also of branches and loops: they name the folders of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _onnx(model: nn.Module, file: Path, examples: Sequence[Inputs]) -> _Made:
    for extra in ("onnx", "onnxscript"):
        if importlib.util.find_spec(extra) is None:
            raise MissingExtra("the onnx export needs onnx and onnxscript", "", "pip install 'prunella[onnx]'")
    program, dynamic = capture(model, examples[0], sizes=len(examples) > 1)
    needed = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if needed > _LARGEST_PROTOBUF:
        raise NotSupported(
            "the onnx export is one file", f"{byte_size(needed)} are more than such a file holds", "use pt2"
        )
    _remove_traces(program)
    try:
        translated: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:  # the exporter has no one error type
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise NotSupported("torch.onnx cannot translate this model", why, "pt2 and safetensors may work") from error
    translated.save(str(file), external_data=False)
    reader, outputs = _read_onnx(file, examples)
    return dynamic, reader, outputs, _initializers(file)


def _read_onnx(file: Path, examples: Sequence[Inputs]) -> tuple[str, list[Tensor]]:
    import onnx

    onnx.checker.check_model(str(file))
    feeds = [[t.numpy() for t in tensors(example)] for example in examples]
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        return "onnxruntime", _outputs(lambda feed: session.run(None, dict(zip(names, feed, strict=True))), feeds)
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(str(file))
    return "onnx", _outputs(
        lambda feed: reference.run(None, dict(zip(reference.input_names, feed, strict=True))), feeds
    )


def _outputs(run: Callable[[list[Any]], Any], feeds: Sequence[list[Any]]) -> list[Tensor]:
    """The outputs for every example. Errors: NotSupported if the reader takes the first one, but no other size."""
    outputs: list[Any] = list(run(feeds[0]))
    for feed in feeds[1:]:
        try:
            outputs = [*outputs, *run(feed)]
        except Exception as error:  # each reader has errors of its own
            why = str(error).strip().splitlines()[0]
            what = "the onnx export does not take any image size"
            raise NotSupported(what, why, "leave the free size out; a pt2 file may take any") from error
    return [_tensor(value) for value in outputs]


def _tensor(value: Any) -> Tensor:
    return (
        torch.from_numpy(value.copy()) if hasattr(value, "dtype") and value.shape else torch.tensor(value, device="cpu")
    )


def _initializers(file: Path) -> dict[str, Tensor]:
    import onnx

    graph = onnx.load(str(file)).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _zeros(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of zero weights that are zero in `state` at the same place, and number of zero weights compared.

    A weight that the format folded into another or renamed is not compared; the check of the output covers it.
    """
    kept = total = 0
    for name, weight in model.named_parameters():
        other = state.get(name)
        if other is None or other.shape != weight.shape:
            continue
        zero = weight.detach() == 0
        total += int(zero.sum())
        kept += int((zero & (other == 0)).sum())
    return kept, total


def check_format(path: Path) -> None:
    """Errors: RequestError unless the suffix is that of a format."""
    _format(path, None)


def _format(path: Path, chosen: Format | None) -> Format:
    wanted = chosen or path.suffix.removeprefix(".")
    for known in FORMATS:
        if wanted == known:
            return known
    raise RequestError(f"unknown export format {wanted!r}", f"known are {', '.join(FORMATS)}", "for example small.onnx")


def _on_cpu(model: nn.Module) -> nn.Module:
    where = {t.device.type for t in [*model.parameters(), *model.buffers()]}
    return model if where <= {"cpu"} else copied(model).cpu()
