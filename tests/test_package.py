"""What is installed, and what importing it brings along."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
# needed by a model and its files; the programs' and the tokenizers' are not among them
NEEDED = {"ponet", "ponet_kernels", "safetensors", "einops"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what the package is built from, in a folder named like a clone."""
    folder = tmp_path_factory.mktemp("parent") / "ponet"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("ponet", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("glue", "lra", "pretrain", "benchmarks", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def build(sources: Path, kind: str) -> zipfile.ZipFile:
    target = sources.parent / kind
    target.mkdir()
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def python(code: str, *paths: Path, folder: Path) -> str:
    """Run code in a folder, whose modules come before those of `paths`, and these before others."""
    code = f"import sys; sys.path[1:1] = {list(map(str, paths))!r}\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, cwd=folder, env={"PYTHONPATH": ""}, text=True)


def test_wheel_holds_the_library_alone(sources):
    names = build(sources, "build_wheel").namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ponet", "ponet_kernels"}
    for package in (ROOT / "ponet", ROOT / "kernels" / "ponet_kernels"):
        files = [*package.rglob("*.py"), package / "py.typed"]
        assert {str(file.relative_to(package.parent)) for file in files} <= set(names)


def test_editable_install_is_not_hidden_by_the_folder_of_the_clone(sources):
    wheel = build(sources, "build_editable")
    (name,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    roots = wheel.read(name).decode().split()
    assert roots == [str(sources), str(sources / "kernels")]
    code = "import ponet, ponet_kernels; print(ponet.__file__, ponet_kernels.__file__)"
    found = python(code, *map(Path, roots), folder=sources.parent).split()
    assert found == [f"{roots[0]}/ponet/__init__.py", f"{roots[1]}/ponet_kernels/__init__.py"]


def test_import_brings_little_beside_torch():
    """Neither a compiler nor the programs' dependencies: it costs little more than torch alone."""
    code = (
        "import torch; before = set(sys.modules); import ponet; new = set(sys.modules) - before\n"
        "print('torch._dynamo' in new, *{name.partition('.')[0] for name in new})"
    )
    is_compiler, *found = python(code, ROOT, ROOT / "kernels", folder=ROOT / "tests").split()
    assert is_compiler == "False"
    assert set(found) - {"torch"} <= NEEDED
