"""Writes the papers' recipes into index.yaml, as entries without files: neither paper published weights.

    python zoo/recipes.py

Each recipe's first line says which printed result it is for, as `paper B, Table 2 (71.65)`; those without one are left
out. Other entries stay as they are.
"""

import re
from pathlib import Path

from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.zoo.edit import recipe_sum, write_tables
from solo_ext.zoo.index import Entry, Recipe, Score, editing, short

ZOO = Path(__file__).parent
ROOT = ZOO.parent
FOLDERS = ("cifar10", "cifar100", "imagenet-100", "imagenet")
PRINTED = re.compile(r"paper (?P<paper>[AB])\b[^(]*?(?P<tables>Tables? [A-Z0-9. and]*\d)(?:: | \()(?P<value>\d+\.\d+)")


def printed(file: Path) -> re.Match | None:
    """The paper, table and value that the first sentence of a recipe names."""
    comment = " ".join(line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    return PRINTED.search(comment.partition(")")[0].replace("(Table", "Table"))


def recipes() -> list[Entry]:
    """An entry for each recipe that has a printed result."""
    found = []
    for file in [file for folder in FOLDERS for file in sorted((ROOT / "scripts/pretrain" / folder).glob("*.yaml"))]:
        if not (match := printed(file)):
            continue
        cfg = resolve(compose(file.parent, file.name))
        found.append(
            Entry(
                name=f"{cfg.method}-{cfg.data.dataset}-{short(cfg.backbone.name)}",
                method=cfg.method,
                backbone=cfg.backbone.name,
                dataset=cfg.data.dataset,
                epochs=cfg.max_epochs,
                recipe=Recipe(file.relative_to(ROOT).as_posix(), recipe_sum(file)),
                figures=[
                    Score("linear top-1", float(match["value"]), f"printed: paper {match['paper']}, {match['tables']}")
                ],
            )
        )
    return found


if __name__ == "__main__":
    with editing(ZOO) as known:
        trained = {name: entry for name, entry in known.items() if entry.files}
        known.clear()
        known.update({entry.name: entry for entry in recipes()} | trained)
    write_tables(ZOO)
