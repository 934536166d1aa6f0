"""Every table, figure and appendix item of both papers, and how it is computed here.

`python benchmarks/reproduction.py` writes docs/reproduction.md from the studies and from what is said below.
"""

import sys
from pathlib import Path

from solo_ext.studies.study import load_study
from solo_ext.text import markdown_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
PAPERS = {"A": "ProjectorEMA", "B": "Residual momentum"}
FOLDERS = {"A": "projector_ema", "B": "residual"}
DRAWING, SETTINGS = "a drawing of the method, without numbers", "hyper-parameters: the recipes of scripts/pretrain"
MAPS = "`solo-ext pictures RUNS --images PATH --kind {} --out FILE`"
OTHERS = {  # item -> what stands for it, where no study is named after it
    "A-Fig1": DRAWING,
    "A-App. E": "`solo-ext trajectories RUNS --filters ... [--flat]`, of the runs of projector_ema/figure2",
    "B-Fig1": "bars of Tables 1 to 4: the studies residual/table1 to table4",
    "B-Fig3": DRAWING,
    "B-Fig5": "bars of Table 5: the study residual/table5",
    "B-Fig9": MAPS.format("features"),
    "B-Fig10": MAPS.format("gradcam"),
    "B-Fig13": MAPS.format("features"),
    "B-Fig14": MAPS.format("features"),
    "B-Fig15": MAPS.format("gradcam"),
    "B-Fig16": MAPS.format("gradcam"),
    **{f"B-{number}": SETTINGS for number in range(8, 13)},
}
PICTURES = {  # item -> the picture in docs/figures
    "A-App. E": "projector_ema_appendixE",
    **dict.fromkeys(("B-Fig9", "B-Fig13", "B-Fig14"), "residual_figure9"),
    **dict.fromkeys(("B-Fig10", "B-Fig15", "B-Fig16"), "residual_figure10"),
}
RUN = {  # study -> where its results here are, and at what scale
    "projector_ema/table3": "[three seeds on the bundled images](results/projector_ema_table3.md)",
    "residual/table2": "[three seeds on the bundled images](results/residual_table2.md)",
}
HEADER = """\
# Reproducing both papers

Written by `python benchmarks/reproduction.py`. A study is one command, `solo-ext study NAME`: it trains what is
missing, evaluates it, and writes our results beside the printed ones; `--dry-run` shows its runs. Each works with
`data.dataset=fashion_mnist_mini`, too, on two CPU cores. What a study had to choose is said in its YAML. None has been
run at a paper's own scale here. A miniature (`python benchmarks/miniatures.py`) is three epochs of one seed on the
bundled images: it shows what a command computes and draws, and says nothing about a method.
"""


def order(item: str) -> tuple:
    """Tables, then figures, then the rest, each by its number."""
    name = item.partition("-")[2]
    kind = 1 if name.startswith("Fig") else 2 if name[0] in "AS" else 0
    digits = "".join(c for c in name.partition("_")[0] if c.isdigit() or c == ".")
    return item[0], kind, name[:1].isalpha() and kind == 0, [int(n) for n in digits.split(".") if n], name


def ran(picture: str, results: str | None = None) -> str:
    """Where an item's results and its miniature are."""
    miniature = (
        f"[in miniature](figures/{picture}.png)" if (PAGE.parent / "figures" / f"{picture}.png").exists() else ""
    )
    return ", ".join(filter(None, (results, miniature))) or "no"


def page() -> str:
    """The whole text."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for paper, folder in FOLDERS.items():
        for file in sorted((ROOT / "scripts" / "studies" / folder).glob("*.yaml")):
            study = load_study(file)
            name = f"{folder}/{file.stem}"
            computes = list(
                dict.fromkeys([*study.metrics, *study.curves, *(["paths of filters"] * (study.plot == "filters"))])
            )
            cells = f"{len(study.runs)} runs x {len(study.seeds)} seed{'s' * (len(study.seeds) > 1)}"
            item = study.spec.table or study.spec.figure or ""
            rows.setdefault(item, []).append(
                (f"`solo-ext study {name}`: {cells}", ", ".join(computes), ran(f"{folder}_{file.stem}", RUN.get(name)))
            )
        for item, what in OTHERS.items():
            if item[0] == paper:
                drawn = ran(PICTURES[item]) if item in PICTURES else "-"
                rows.setdefault(item, []).append((what, "", drawn))
    text = HEADER
    for paper, title in PAPERS.items():
        items = sorted((item for item in rows if item[0] == paper), key=order)
        lines = []
        for item in items:
            name = item.partition("-")[2]
            kind = "" if name.startswith(("Fig", "Sec", "App")) else "Table "
            label = name.replace("Fig", "Fig. ").replace("Sec", "Sec. ")
            lines += [[f"{kind}{label}", *row] for row in rows[item]]
        text += f"\n## {title}\n\n" + markdown_table(("item", "how", "columns and curves", "run here"), lines)
    return text


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
