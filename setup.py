"""What pyproject.toml cannot say: zoo/ and scripts/, which lie beside the package, lie inside it in a wheel, whose
description has no links to files of the checkout."""

import re
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


def described() -> str:
    """README.md, with links to files of the checkout as mere text, and without its pictures."""
    local = r"\((?!https?:)[^)]*\)"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(rf"!\[[^]]*\]{local}\s*|\[([^]]*)\]{local}", r"\1", text)


setup(
    cmdclass={"build_py": BuildWithFiles},
    long_description=described(),
    long_description_content_type="text/markdown",
)
