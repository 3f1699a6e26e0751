"""How docstrings become Markdown: parameters are lists, examples are highlighted, public names are links."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

_LABEL = re.compile(r"(^|(?<=[.;)] ))(Use|Avoid|Data|Errors|Caveats): ", re.MULTILINE)
_OWN = re.compile(r"(?<=[.;)])\s+(?=Errors: )")
_NAME = re.compile(r"(?<![`\[])`((?:pr\.|prunella\.)?(?:\w+\.)?([A-Za-z_]\w*))(?:\(\))?`(?!`)")


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for obj in documented(pkg):
            assert obj.docstring is not None
            names = {p.name.lstrip("*") for p in getattr(obj, "parameters", ())} | set(obj.members)
            obj.docstring.value = markdown(inspect.cleandoc(obj.docstring.value), names, obj.path)


def documented(parent: griffe.Object) -> Iterator[griffe.Object]:
    """Everything below that is no import and has a docstring."""
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            if member.docstring is not None:
                yield member
            yield from documented(member)


def markdown(text: str, names: set[str], path: str) -> str:
    """The docstring of the object at `path`, which has parameters or attributes of these names."""
    parts: list[str] = []
    for is_code, lines in groupby(_marked(text), key=lambda line: line[0]):
        block = "\n".join(line for _, line in lines).strip("\n")
        parts.append(_fenced(block) if is_code else _prose(block, names, path))
    return "\n\n".join(parts)


def _marked(text: str) -> Iterator[tuple[bool, str]]:
    """Each line, and whether it is one of code: indented after an empty line, up to the next text that is not."""
    is_code, before, fence = False, "", False
    for line in text.split("\n"):
        fence ^= line.startswith("```")
        if line.strip():
            is_code = not fence and line.startswith("    ") and (is_code or not before.strip())
        yield is_code, line
        before = line


def _fenced(block: str) -> str:
    code = inspect.cleandoc("\n" + block)
    return f"```{'pycon' if code.startswith('>>>') else 'python'}\n{code}\n```"


def _prose(block: str, names: set[str], path: str) -> str:
    """Text with a list item for each parameter, bold labels and links."""
    if "```" in block:
        return block
    known = "|".join(sorted(names, key=len, reverse=True)) or "(?!)"
    item = re.compile(rf"(?:^|(?<=[.;)]) +)((?:{known})(?:, \w+)*): ", re.MULTILINE)
    paragraphs = [
        item.sub(r"\n- `\1`: ", part).replace("\n\n- ", "\n- ") for part in _OWN.sub("\n\n", block).split("\n\n")
    ]
    text = "\n\n".join(
        re.sub(r"^(?!- )(.*?)\n- ", r"\1\n\n- ", p, count=1, flags=re.DOTALL).strip() for p in paragraphs
    )
    return _NAME.sub(lambda match: _link(match, path), _LABEL.sub(r"**\2:** ", text))


def _link(match: re.Match[str], path: str) -> str:
    target = _public().get(match[1].removeprefix("pr.").removeprefix("prunella."))
    return match[0] if target is None or path.startswith(target) else f"[{match[0]}][{target}]"


@cache
def _public() -> dict[str, str]:
    """Name at first sight, in a namespace, or alone where one namespace has it -> where it is defined."""
    import prunella

    found: dict[str, str] = {}
    for name in prunella.__all__:
        value = getattr(prunella, name)
        inner = {n: getattr(value, n) for n in dir(value)} if inspect.ismodule(value) else {}
        for text, entry in [(name, value), *((f"{name}.{n}", v) for n, v in inner.items()), *inner.items()]:
            is_object = inspect.isfunction(entry) or inspect.isclass(entry)
            if is_object and entry.__module__.startswith("prunella."):
                found[text] = f"{entry.__module__}.{entry.__qualname__}"
    return found
