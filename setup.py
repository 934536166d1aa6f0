"""What pyproject.toml cannot say: zoo/ and scripts/, which lie beside the package, lie inside it in a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
TREES = {"zoo": "zoo/files", "scripts": "scripts"}  # folder of the checkout -> where it goes in solo_ext/


class BuildWithFiles(build_py):
    """Copies them into a wheel; an editable install finds them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in TREES.items():
                inside = Path(self.build_lib, "solo_ext", target)
                shutil.rmtree(inside, ignore_errors=True)  # what an earlier build left
                shutil.copytree(ROOT / source, inside, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(cmdclass={"build_py": BuildWithFiles})
