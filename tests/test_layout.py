"""The tree as a whole: names that would shadow others, and imports."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("ponet", "kernels/ponet_kernels", "pretrain", "lra", "glue", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_nothing_of_ours_answers_to_the_name_kernels():
    """It is Hugging Face's; with a package of that name `transformers` fails to import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; s = u.find_spec('kernels');"
        "assert s is None or s.origin is None or 'site-packages' in s.origin, s.origin"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_folders_shadow_no_library(path):
    taken = {"datasets", "tokenizers", "evaluate", "deepspeed", "torch", "triton", "einops"}
    assert path.stem not in taken | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "package", ["ponet", "ponet_kernels", "pretrain", "lra", "glue", "benchmarks"]
)
def test_every_module_imports(package):
    folder = ROOT / ("kernels/ponet_kernels" if package == "ponet_kernels" else package)
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts != ("__init__",):
            importlib.import_module(".".join((package, *parts)))


def test_a_public_name_means_one_thing():
    """Apart from what every program has, and from backends, which have functions in common."""
    roles = {"main", "parse", "parse_options", "report", "summary"}
    owners: dict[str, Path] = {}
    for path in SOURCES:
        if path.parent.name == "vectorised":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert node.name in roles or node.name not in owners, (node.name, path)
                owners[node.name] = path


def test_imports_run_one_way():
    """Kernels know nothing of the rest, the library nothing of the programs."""
    forbidden = {
        "kernels": ("ponet", "pretrain"),
        "ponet": ("pretrain", "lra", "glue", "benchmarks"),
    }
    for path in SOURCES:
        top = path.relative_to(ROOT).parts[0]
        for name in forbidden.get(top, ()):
            assert not re.search(rf"^(from|import) {name}\b", path.read_text(), re.M), path
