"""Lines to start from, at the end of the help of each verb."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "demo": ("prunella demo -o demo", "prunella demo --model digits --target 0.3"),
    "doctor": ("prunella doctor --seconds 2",),
    "methods": ("prunella methods", "prunella methods criterion"),
    "explain": ("prunella explain wanda", "prunella explain 2:4"),
    "inspect": (
        "prunella inspect torchvision:resnet18",
        "prunella inspect net.py:resnet --inputs 1x3x32x32 --html coupling.html",
    ),
    "scan": (
        "prunella scan net.py:resnet --data net.py:loader --metric net.py:accuracy --plot scan.svg",
        "prunella scan torchvision:resnet18 --ratios 0.25,0.5 --csv scan.csv",
    ),
    "plan": (
        "prunella plan torchvision:resnet18 --target macs=0.5 -o half.plan",
        "prunella plan torchvision:resnet18 --remove layer1.0.conv1=2,5,7",
        "prunella plan net.py:resnet --recipe taylor --data net.py:loader --loss net.py:loss --target macs=0.5",
    ),
    "import": ("prunella import torchvision:resnet18 pruned.safetensors -o theirs.plan",),
    "show": ("prunella show half.plan",),
    "run": (
        "prunella run net.py:resnet --data net.py:loader --target macs=0.5 -o smaller",
        "prunella run torchvision:resnet18 --ratio 'layer2.*=0.3' -o smaller",
        "prunella run net.py:resnet --data net.py:loader --metric net.py:accuracy --max-drop 0.5 --target macs=0.7",
    ),
    "llm": (
        "prunella llm smollm2 --pattern 2:4 --data text.txt -o pruned",
        "prunella llm smollm2 --granularity depth --target params=0.8 --recover match,lora:200 --data text.txt",
        "prunella llm path/to/model --sparsity 0.5 --bits 8 --dry-run",
    ),
    "eval": (
        "prunella eval pruned --data other.txt",
        "prunella eval pruned --data other.txt --dense smollm2",
    ),
    "chat": ("prunella chat pruned", "printf 'Once upon a time' | prunella chat pruned --temperature 0.8"),
    "pareto": ("prunella pareto net.py:train --metric net.py:accuracy --inputs net.py:batch --csv all.csv",),
    "compare": ("prunella compare smollm2 --recipe wanda --data text.txt --text other.txt --latex table.tex",),
    "bench": (
        "prunella bench torchvision:resnet18 --batch 1,8 --threads 1,all",
        "prunella bench torchvision:resnet18 smaller --backends eager,onnxruntime",
    ),
    "export": ("prunella export smaller -o smaller.onnx", "prunella export torchvision:resnet18 -o net.pt2"),
    "verify": ("prunella verify smaller", "prunella verify smaller torchvision:resnet18"),
    "report": ("prunella report smaller --open",),
}
"""Verb -> examples. `net.py` stands for a file of the user's."""


def epilog(verb: str) -> str:
    r"""The examples of a verb, each in a line of its own; `\b` keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[verb])])
