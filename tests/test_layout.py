"""The tree as a whole: names that would shadow others, and imports."""

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("ponet", "kernels/ponet_kernels", "pretrain", "lra", "glue", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_names_shadow_no_library():
    """`kernels` is Hugging Face's; with a package of that name `transformers` fails to import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin
    taken = {"datasets", "tokenizers", "evaluate", "deepspeed", "torch", "triton", "einops"}
    taken |= set(sys.stdlib_module_names)
    assert not [path for path in SOURCES if path.stem in taken]


def test_every_module_imports():
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            importlib.import_module(".".join(parts).removeprefix("kernels."))


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
    programs = "pretrain|lra|glue|benchmarks"
    forbidden = {"kernels": rf"ponet|{programs}", "ponet": programs}
    for path in SOURCES:
        names = forbidden.get(path.relative_to(ROOT).parts[0])
        text = path.read_text()
        assert names is None or not re.search(rf"^(from|import) ({names})\b", text, re.M), path
