"""What is installed: the library alone. Metadata is in `pyproject.toml`; programs run from here."""

from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command import editable_wheel


class EditableWheel(editable_wheel.editable_wheel):
    """`pip install -e .` by a .pth file with both source roots.

    setuptools' own way for packages in two roots is a finder that Python asks last: in the folder
    that holds a clone named `ponet`, the clone itself would be taken for the package.
    """

    def _select_strategy(self, name: str, tag: str, build_lib: Any) -> Any:
        root = Path(self.project_dir)
        return editable_wheel._StaticPth(self.distribution, name, [root, root / "kernels"])


setup(
    packages=[*find_packages(include=["ponet", "ponet.*"]), *find_packages("kernels")],
    package_dir={"ponet_kernels": "kernels/ponet_kernels"},
    package_data={"ponet": ["py.typed"], "ponet_kernels": ["py.typed"]},
    cmdclass={"editable_wheel": EditableWheel},
)
