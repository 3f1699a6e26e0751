"""The arguments and options that verbs share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = (
    "package.module:factory, a Hugging Face folder, a FILE.gguf, smollm2, timm:NAME, torchvision:NAME or a FILE.pt2"
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
OptionalModel = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--inputs", metavar="SHAPE", help="Example input: 1x3x224x224, 1x128:int64 or name=1x16:int64."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FILE", help="State dict in safetensors; `pretrained` fetches timm/torchvision's."
    ),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights too (tensors only).")]
RecipeName = Annotated[str, typer.Option("--recipe", metavar="NAME", help="A recipe or a criterion of `methods`.")]
TargetText = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="T", help="What remains: macs=0.5, params=2M, bytes=40MB, latency=0.6; or sparsity=0.9."
    ),
]
GranularityText = Annotated[
    str | None,
    typer.Option(
        "--granularity",
        metavar="G",
        help="What goes: channel, head, width, expert, depth, element; several by comma.",
    ),
]
AllocationName = Annotated[str | None, typer.Option("--allocation", metavar="A", help="How layers share the budget.")]
MinDensity = Annotated[
    float | None, typer.Option("--min-density", help="Fraction of every group that is kept at least.")
]
RoundTo = Annotated[int | None, typer.Option("--round-to", help="Channel widths are multiples of it.")]
EqualWidths = Annotated[
    bool, typer.Option("--equal-widths", help="Equal groups stay equal: plain `from_pretrained` reads them.")
]
Pattern = Annotated[str | None, typer.Option("--pattern", metavar="P", help="A mask of 2:4 (N:M) or 4x4 (blocks).")]
Skip = Annotated[list[str] | None, typer.Option("--skip", metavar="PATTERN", help="Leave these layers alone (glob).")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="PATTERN", help="Cut only these layers (glob).")]
Data = Annotated[str | None, typer.Option("--data", metavar="M:F", help="module:function that returns batches.")]
LossName = Annotated[str | None, typer.Option("--loss", metavar="M:F", help="module:function of (model, batch).")]
FactoryName = Annotated[
    str | None, typer.Option("--factory", metavar="M:F", help="What made the dense model of a folder of `run`.")
]
Program = Annotated[
    bool, typer.Option("--program", help="Capture MODEL as a program: sizes typed into its source follow a cut too.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older result.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Where to write.")]
OptionalOutput = Annotated[Path | None, typer.Option("-o", "--output", metavar="PATH", help="Where to write.")]
