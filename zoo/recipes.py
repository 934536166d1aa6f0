"""Writes the papers' recipes into index.yaml, as entries without files: neither paper published weights.

    python zoo/recipes.py

A recipe's first line names the printed result that it reproduces, as in `residual momentum, Table 2 (71.65)`; recipes
without one are left out. Other entries stay as they are.
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
TABLES = r"(?P<tables>Tables? [A-Z0-9. and]*\d)"
PRINTED = re.compile(rf"(?P<paper>ProjectorEMA|residual momentum)\b[^(]*?{TABLES}(?:: | \()(?P<value>\d+\.\d+)")


def printed(file: Path) -> re.Match | None:
    """The paper, table and value that the first sentence of a recipe names."""
    comment = " ".join(line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    return PRINTED.search(comment.partition(")")[0].replace("(Table", "Table"))


def recipes() -> list[Entry]:
    """An entry for each recipe that has a printed result."""
    entries = []
    for file in [file for folder in FOLDERS for file in sorted((ROOT / "scripts/pretrain" / folder).glob("*.yaml"))]:
        if not (match := printed(file)):
            continue
        cfg = resolve(compose(file.parent, file.name))
        entries.append(
            Entry(
                name=f"{cfg.method}-{cfg.data.dataset}-{short(cfg.backbone.name)}",
                method=cfg.method,
                backbone=cfg.backbone.name,
                dataset=cfg.data.dataset,
                epochs=cfg.max_epochs,
                recipe=Recipe(file.relative_to(ROOT).as_posix(), recipe_sum(file)),
                figures=[Score("linear top-1", float(match["value"]), f"printed: {match['paper']}, {match['tables']}")],
            )
        )
    return entries


if __name__ == "__main__":
    with editing(ZOO) as entries:
        trained = {name: entry for name, entry in entries.items() if entry.files}
        entries.clear()
        entries.update({entry.name: entry for entry in recipes()} | trained)
    write_tables(ZOO)
