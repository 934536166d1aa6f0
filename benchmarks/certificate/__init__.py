"""The parity certificate of `solo-ext data certify`: all data formats give solo-learn's views."""

import argparse
import json
from pathlib import Path

from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.errors import ConfigError
from solo_ext.runs.environment import environment
from solo_ext.schema import build
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve

from .compare import DRAWS, certify


def run(args: argparse.Namespace) -> None:
    """The command: prints the certificate; exits 1 if a value is outside its bound."""
    augmentations = None
    if args.words:
        file = Path(args.words[0])
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"'{file}' is not a YAML, which comes first")
        cfg = resolve(compose(file.parent, file.name, args.words[1:]))
        augmentations = [build(AugmentationConfig, aug) for aug in cfg.augmentations]
    draws = DRAWS if args.draws is None else args.draws
    if draws < 1:
        raise ConfigError(f"--draws must be at least 1, not {draws}")
    certificate = certify(augmentations, args.images, args.formats, draws, args.seed, args.device)
    print(certificate)
    if args.json:
        record = {**certificate.record(), "environment": environment()}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not certificate.ok:
        raise SystemExit(1)
