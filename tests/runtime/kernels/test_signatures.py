"""The ctypes signatures are those of the C headers: read again here, and asked of a C++ compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prunella.runtime.kernels import library, signatures
from prunella.runtime.kernels.config import (
    ACTIVATION_CODES,
    DOT_ROWS,
    FEW_CODES,
    MANY_CODES,
    PRECISION_CODES,
    Activation,
    Kind,
    Precision,
)

ROOT = Path(__file__).parents[3]
STRUCTS: dict[str, type[ctypes.Structure]] = {"prunella_image": signatures.Image, "prunella_step": signatures.Step}
PROBE = """
#include <cstddef>
#include <cstdio>
#include <type_traits>
#include "prunella_dot.h"
#include "prunella_few.h"
template <class T> void kind() {
  if (std::is_void<T>::value) std::printf(" none");
  else if (std::is_pointer<T>::value) std::printf(" pointer");
  else if (std::is_floating_point<T>::value) std::printf(" float");
  else std::printf(" int%d", int(8 * sizeof(std::conditional_t<std::is_void<T>::value, int, T>)));
}
template <class F> struct Signature;
template <class R, class... A> struct Signature<R(A...)> {
  static void print(const char* name) {
    std::printf("function %s", name); kind<R>(); (kind<A>(), ...); std::printf("\\n");
  }
};
int main() {
"""


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator of the signatures."""
    file = ROOT / "kernels" / "generate.py"
    if not file.exists():
        pytest.skip("the sources of the kernels are not here")
    spec = importlib.util.spec_from_file_location("generate_signatures", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_headers_say(generate: ModuleType) -> None:
    interface = generate.parse(generate.headers())
    assert interface.abi == signatures.ABI
    assert dict(interface.constants) == {
        name: value for name, value in vars(signatures).items() if isinstance(value, int) and name != "ABI"
    }
    names = {"ctypes": ctypes, "Image": signatures.Image, "Step": signatures.Step}
    found = {
        f.name: (eval(f.result, names), tuple(eval(argument, names) for argument in f.arguments))
        for f in interface.functions
    }
    assert found == signatures.FUNCTIONS
    assert {s.name: tuple((name, eval(kind, names)) for name, kind in s.fields) for s in interface.structs} == {
        name: struct._fields_ for name, struct in STRUCTS.items()
    }
    assert generate.render(interface) == Path(signatures.__file__).read_text(encoding="utf-8")


def kind(expression: Any) -> str:
    """A ctypes type as the probe names it."""
    if expression is None:
        return "none"
    if expression is ctypes.c_float:
        return "float"
    integers = (ctypes.c_int, ctypes.c_int32, ctypes.c_int64)
    return f"int{8 * ctypes.sizeof(expression)}" if expression in integers else "pointer"


def test_a_compiler_lays_out_the_same(generate: ModuleType, tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or sys.platform == "win32":
        pytest.skip("no C++ compiler for the kernels here")
    constants = [name for name, _ in generate.parse(generate.headers()).constants]
    lines = [f'  std::printf("constant {name} %d\\n", int(PRUNELLA_{name}));' for name in ["ABI", *constants]]
    lines += [f'  Signature<decltype({name})>::print("{name}");' for name in signatures.FUNCTIONS]
    for name, struct in STRUCTS.items():
        lines += [f'  std::printf("size {name} %d\\n", int(sizeof({name})));']
        for field, _ in struct._fields_:
            lines += [f'  std::printf("offset {name}.{field} %d\\n", int(offsetof({name}, {field})));']
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text(PROBE + "\n".join([*lines, "}"]), encoding="utf-8")
    subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'kernels'}", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [f"constant {name} {getattr(signatures, name)}" for name in ["ABI", *constants]]
    expected += [
        " ".join(["function", name, kind(result), *map(kind, arguments)])
        for name, (result, arguments) in signatures.FUNCTIONS.items()
    ]
    for name, struct in STRUCTS.items():
        expected += [f"size {name} {ctypes.sizeof(struct)}"]
        expected += [f"offset {name}.{field} {getattr(struct, field).offset}" for field, _ in struct._fields_]
    assert found == expected


@pytest.mark.parametrize(
    "text",
    [
        "enum { PRUNELLA_OK };",  # a constant without a number
        "PRUNELLA_API unsigned prunella_new(void);",
        "struct other { int x; };",
        "PRUNELLA_API int prunella_new(void)",  # without an end
    ],
)
def test_a_declaration_that_cannot_be_read_is_an_error(generate: ModuleType, text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        generate.parse(f"#define PRUNELLA_ABI 1\n{text}\n")


def test_every_choice_has_the_number_of_the_headers() -> None:
    assert {a: getattr(signatures, a.name) for a in Activation} == ACTIVATION_CODES
    assert {k: getattr(signatures, k.name) for k in MANY_CODES} == MANY_CODES
    assert {Kind.DECODE: signatures.BITMAP, Kind.CSR: signatures.CSR} == FEW_CODES
    assert set(MANY_CODES) | set(FEW_CODES) | set(DOT_ROWS) == set(Kind)
    assert {p: getattr(signatures, p.name) for p in Precision} == PRECISION_CODES


@pytest.mark.skipif(not library.available(), reason="the kernels were not built here")
def test_the_library_has_every_function() -> None:
    loaded = library.load().library
    assert loaded is not None
    for name, (result, arguments) in signatures.FUNCTIONS.items():
        function = getattr(loaded, name)
        assert function.restype is result and tuple(function.argtypes) == arguments
