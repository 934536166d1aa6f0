import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithZoo(build_py):
    """Puts the zoo, which lies beside the package in a checkout, into the package of a wheel."""

    def run(self):
        super().run()
        if not self.editable_mode:
            zoo = Path(self.build_lib) / "solo_ext" / "zoo" / "files"
            shutil.copytree(Path(__file__).with_name("zoo"), zoo, dirs_exist_ok=True)


EXTRAS = {
    # 2.2 decodes with nvImageCodec, which can leave EXIF's orientation alone
    "dali": ["nvidia-dali-cuda120>=2.2"],
    "dali-cuda13": ["nvidia-dali-cuda130>=2.2"],
    "h5": ["h5py>=3.10"],
    "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
    "slurm": ["hydra-submitit-launcher>=1.2"],
    "viz": ["matplotlib>=3.8", "tensorboard>=2.16"],
}
EXTRAS["dev"] = [
    *(package for extra in ("dali", "h5", "onnx", "slurm", "viz") for package in EXTRAS[extra]),
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff==0.17.6",
]

setup(
    name="solo-ext",
    version="0.1.0",
    description="Projector-only and residual momentum for self-supervised learning, on solo-learn's contract",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["solo_ext", "solo_ext.*"]),
    package_data={"solo_ext": ["data/assets/*", "analysis/assets/*"]},
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",
        "numpy>=1.26",
        "pillow>=10",
        "filelock",
        "lightning>=2.6.6",
        "timm>=1.0.17",
        "omegaconf>=2.3",
        "hydra-core>=1.3",
        "wandb>=0.18",
        "scikit-learn>=1.4",
        "rich>=13",
        "requests>=2.31",
        "pyyaml>=6",
        "safetensors>=0.4",
        "huggingface-hub>=0.23",
    ],
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithZoo},
    entry_points={"console_scripts": ["solo-ext=solo_ext.cli.main:main"]},
)
