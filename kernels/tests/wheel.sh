#!/bin/sh
# Build the wheel from a clean clone, install it alone, and run the tests of the kernels against it, not the sources.
#   wheel.sh PYTHON [FOLDER]    PYTHON has the dependencies and pytest; wheels are left in FOLDER (dist)
set -eu
python=$1
dist=$(mkdir -p "${2:-dist}" && cd "${2:-dist}" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git clone --quiet "$root" "$work/clone"
echo "building the wheel"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" "$work/clone"
echo "building the source distribution as a wheel without a compiler"
CC=/nonexistent CXX=/nonexistent "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/pure" "$work/clone"
ls "$work"/pure/*-py3-none-any.whl >/dev/null
if "$python" -m zipfile -l "$work"/pure/*.whl | grep -q '\.so'; then
  echo "the wheel without a compiler has a library in it" >&2
  exit 1
fi

# Dependencies come from PYTHON's packages by a path; a .pth in there is not followed, so a prunella edited in place stays out.
test_wheel() {
  "$python" -m venv --without-pip "$work/$1-env"
  packages=$("$work/$1-env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/dependencies.pth"
  "$python" -m pip --quiet --python "$work/$1-env/bin/python" install --no-deps --no-index --force-reinstall "$work/$1"/*.whl
  mkdir "$work/$1-run"
  cp -r "$work/clone/tests" "$work/clone/pyproject.toml" "$work/$1-run/"
  cd "$work/$1-run"
  "$work/$1-env/bin/python" -c "
import prunella, sys
from prunella.runtime import native
assert prunella.__file__.startswith(sys.prefix), prunella.__file__
assert native.available() is $2, native.isa()
print('$1:', native.isa())"
  "$work/$1-env/bin/python" -m pytest tests/runtime -p no:cacheprovider
  cd "$root"
}
echo "testing the wheel"
test_wheel wheels True
echo "testing the wheel without kernels"
test_wheel pure False
cp "$work"/wheels/*.whl "$dist/"
ls "$dist"/*.whl
