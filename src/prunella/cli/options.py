"""The arguments and options shared by several verbs, each declared once, and their groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_MODEL = (
    "package.module:factory, FILE.py:factory, a Hugging Face folder, a FILE.gguf, smollm2, timm:NAME, "
    "torchvision:NAME or a FILE.pt2"
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
LLMModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a FILE.gguf or smollm2.", show_default=False)
]
OptionalModel = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--inputs", metavar="SHAPE", help="Example input: 1x3x224x224, 1x128:int64 or name=1x16:int64."),
]
OtherInputs = Annotated[
    list[str] | None,
    typer.Option(
        "--other-inputs",
        metavar="SHAPE",
        help="One more example, as --inputs (tensors comma-separated); the cut is proven on it too.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FILE", help="State dict in safetensors; `pretrained` fetches timm/torchvision's."
    ),
]
WeightsKey = Annotated[
    str, typer.Option("--weights-key", metavar="K", help="The entry of FILE with the weights, such as model_ema.")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled weights (tensors only).")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="auto, or one of `methods`. Default: auto with --data, else magnitude.",
    ),
]
RecipeNames = Annotated[
    list[str] | None, typer.Option("--recipe", metavar="NAME", help="A recipe or a criterion; several are allowed.")
]
LLMRecipeName = Annotated[
    str, typer.Option("--recipe", metavar="NAME", help="one_shot, admm, alps, sparsegpt, wanda, ria or magnitude.")
]
LLMRecipeNames = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="NAME", help="one_shot, sparsegpt, wanda ...; several are allowed."),
]
TargetText = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="T",
        help="Budget to keep: macs=0.5, params=2M, bytes=40MB, latency=0.6; or sparsity=0.9, sparsity=0.5,of=model.",
    ),
]
GranularityText = Annotated[
    str | None,
    typer.Option(
        "--granularity",
        metavar="G",
        help="Units to prune: channel, head, width, expert, depth, element; comma-separated.",
    ),
]
AllocationName = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        metavar="A",
        help="Sparsity allocation over layers: uniform, global, lamp, erk, ... Default: that of the recipe.",
    ),
]
MinDensity = Annotated[float | None, typer.Option("--min-density", help="Smallest fraction kept of every group.")]
RoundTo = Annotated[int | None, typer.Option("--round-to", help="Round channel widths to multiples of this number.")]
EqualWidths = Annotated[
    bool | None,
    typer.Option(
        "--equal-widths/--no-equal-widths", help="Keep equal groups equal, so that plain `from_pretrained` reads them."
    ),
]
Remove = Annotated[
    list[str] | None,
    typer.Option("--remove", metavar="LAYER=N,N", help="Channels of a layer to remove: layer1.0.conv1=2,5,7."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="LAYER=N,N", help="Channels of a layer to keep; all others are removed."),
]
Ratio = Annotated[
    list[str] | None,
    typer.Option("--ratio", metavar="LAYER=R", help="Fraction of a layer or pattern to remove: 'layer2.*=0.3'."),
]
Count = Annotated[
    list[str] | None, typer.Option("--count", metavar="LAYER=N", help="Number of units of a layer to remove.")
]
ThresholdValue = Annotated[
    float | None,
    typer.Option("--threshold", metavar="T", help="Keep scores above T: weights with |w| > T by magnitude."),
]
Pattern = Annotated[str | None, typer.Option("--pattern", metavar="P", help="A mask of 2:4 (N:M) or 4x4 (blocks).")]
LayerSparsity = Annotated[float | None, typer.Option("--sparsity", help="Fraction removed from every layer (0.5).")]
Skip = Annotated[list[str] | None, typer.Option("--skip", metavar="PATTERN", help="Leave these layers alone (glob).")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="PATTERN", help="Prune only these layers (glob).")]
Data = Annotated[str | None, typer.Option("--data", metavar="M:F", help="module:function that returns batches.")]
LossName = Annotated[str | None, typer.Option("--loss", metavar="M:F", help="module:function of (model, batch).")]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric", metavar="M:F", help="module:function of (model): a number, or numbers by name; higher is better."
    ),
]
ScanMetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="M:F",
        help="module:function of (model): a number. Default: agreement with the dense model on --data.",
    ),
]
FactoryName = Annotated[
    str | None,
    typer.Option("--factory", metavar="M:F", help="module:function that makes the dense model of a folder of `run`."),
]
Program = Annotated[
    bool,
    typer.Option("--program", help="Capture MODEL as a program, so that literal sizes in its source follow a cut too."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older result.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed; the same seed gives the same result.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Path of the result.")]
OptionalOutput = Annotated[Path | None, typer.Option("-o", "--output", metavar="PATH", help="Path of the result.")]


# -- groups: a verb that takes one has all of its options -------------------------------------------------------------


@dataclass(frozen=True)
class SourceOptions:
    """The model, its weights, and its example inputs."""

    model: Model
    inputs: Inputs = None
    weights: Weights = None
    weights_key: WeightsKey = ""
    allow_pickle: AllowPickle = False


@dataclass(frozen=True)
class MethodOptions:
    """How units are scored, and which of them may be pruned."""

    recipe: RecipeName = None
    granularity: GranularityText = None
    min_density: MinDensity = None
    round_to: RoundTo = None
    skip: Skip = None
    only: Only = None
    data: Data = None
    loss: LossName = None
    seed: Seed = 0


@dataclass(frozen=True)
class Budget:
    """The target, and its constraints by layer."""

    target: TargetText = None
    allocation: AllocationName = None
    pattern: Pattern = None
    equal_widths: EqualWidths = None
    remove: Remove = None
    keep: Keep = None
    ratio: Ratio = None
    count: Count = None
    threshold: ThresholdValue = None


@dataclass(frozen=True)
class RecoveryOptions:
    """The recovery of the pruned model."""

    recover: Annotated[
        str, typer.Option(metavar="R", help="bn, reconstruct, distill:STEPS, finetune:STEPS; comma-separated.")
    ] = ""
    recover_data: Annotated[
        str | None, typer.Option(metavar="M:F", help="Batches for distill and finetune, if not those of --data.")
    ] = None
    lr: Annotated[float, typer.Option(help="Learning rate of distill and finetune.")] = 1e-4
    ridge: Annotated[
        float, typer.Option(help="Ridge penalty of reconstruct; a larger one changes the weights less.")
    ] = 1e-2


@dataclass(frozen=True)
class Quality:
    """The metric of a model, and the largest drop allowed."""

    metric: MetricName = None
    max_drop: Annotated[
        float | None,
        typer.Option(help="Largest drop of --metric (of its first number); after a larger drop nothing is written."),
    ] = None


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options of its groups as its own parameters, as typer reads them."""
    kinds = _kinds(verb).items()
    groups = {name: kind for name, kind in kinds if isinstance(kind, type) and is_dataclass(kind)}
    signature = inspect.signature(verb, eval_str=True)
    options = [option for given in signature.parameters.values() for option in _options(given, groups.get(given.name))]

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        verb(**values)

    run.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return run


def _kinds(verb: Callable[..., None] | type) -> dict[str, Any]:
    return get_type_hints(verb, include_extras=True)


def _options(given: inspect.Parameter, group: Any) -> list[inspect.Parameter]:
    """The parameter itself, or one per field of its group. All are keyword-only; their order is that of the help."""
    if group is None:
        return [given.replace(kind=given.KEYWORD_ONLY)]
    kinds = _kinds(group)
    return [
        inspect.Parameter(
            field.name,
            given.KEYWORD_ONLY,
            default=given.empty if field.default is MISSING else field.default,
            annotation=kinds[field.name],
        )
        for field in fields(group)
    ]
