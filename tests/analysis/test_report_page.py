"""The report in a browser: headless Chromium sorts its table, hovers its curves and changes its colours."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import results, write_metrics, write_run

from solo_ext.analysis.report import main_report

pytest.importorskip("playwright", reason="pip install playwright: the browser's driver")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
EPOCHS, STEPS = 1000, 10


def rows(loss: float):
    """A thousand epochs of a run with all that is usually logged."""
    noise = np.random.default_rng(0).normal(0, 0.01, EPOCHS * STEPS)
    for step in range(EPOCHS * STEPS):
        row = {"epoch": step // STEPS, "step": step, "tau": 0.99, "lr": 0.1, "gap_sim_step": 0.9 + noise[step]}
        row["train_loss_step"] = loss + noise[step]
        if step % STEPS == STEPS - 1:
            means = (
                "train_loss_epoch",
                "train_neg_cos_sim",
                "train_class_loss",
                "val_loss",
                "train_z_std",
                "gap_sim_epoch",
            )
            row |= dict.fromkeys(means, loss + noise[step])
            row |= {f"val_{name}": 50 + 40 * step / EPOCHS / STEPS + loss for name in ("acc1", "acc5", "knn1", "knn20")}
            row |= {f"weight_distance/{name}": 0.1 for name in ("conv1", "block1", "projector.fc1", "projector.fc2")}
            row["images_per_s"] = 1000.0
        yield row


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of five runs, one of them of two seeds."""
    root = tmp_path_factory.mktemp("runs")
    for n, (method, seed) in enumerate([("byol", 5), ("byol", 6), ("mocov3", 5), ("dino", 5), ("ressl", 5)]):
        linear = {"results": results(60.0 + n, seed=5, max_epochs=20)}
        changes = {"seed": seed, "max_epochs": EPOCHS}
        write_run(root / method / str(seed), list(rows(n / 2)), changes, linear=linear, result={"seconds": 9.0 + n})
    pictures = root / "dino" / "5" / "pictures"
    pictures.mkdir()
    Image.new("RGB", (2000, 100), "red").save(pictures / "umap.png")
    return main_report([root], root / "report")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page):
    """The page in a window of 1,400 pixels; at the end, nothing was complained about, nothing loaded from anywhere."""
    tab, complaints = browser.new_page(viewport={"width": 1400, "height": 900}), []
    tab.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url[:80]))
    tab.goto(page.as_uri())
    yield tab
    tab.close()
    assert not [text for text in complaints if not text.startswith(("data:", "blob:"))]


def heads(tab):
    return [re.split(r"\W", text)[0] for text in tab.locator(".results tbody tr:not(.seed) th").all_inner_texts()]


def test_size(page):
    assert page.stat().st_size < 3e6


def test_a_whole_configuration_unfolds(opened):
    opened.locator("#configuration summary").first.click()
    assert '"crop_min_scale": 0.3' in opened.locator("#configuration pre").first.inner_text()


def test_a_click_sorts_the_table(opened):
    assert heads(opened) == ["byol", "dino", "mocov3", "ressl"]
    linear = opened.locator(".results thead th", has_text="linear")
    linear.click()
    assert heads(opened) == ["ressl", "dino", "mocov3", "byol"] and linear.get_attribute("aria-sort") == "descending"
    linear.click()
    assert heads(opened) == ["byol", "mocov3", "dino", "ressl"]
    assert opened.locator(".best", has_text="64.00").count() == 1


def test_seeds_fold_out(opened):
    seeds = opened.locator(".results .seed")
    assert seeds.count() == 2 and not seeds.first.is_visible()
    opened.locator(".fold").click()
    assert seeds.first.is_visible() and "seed 5" in seeds.first.inner_text()


def hovered(tab, metric: str) -> list[str]:
    """The lines that a hover over the middle of a metric's panel reads: the epoch, and `run : value`."""
    figure = tab.locator("figure", has=tab.get_by_text(metric, exact=True))
    figure.scroll_into_view_if_needed()
    figure.locator(".nsewdrag").hover()
    figure.locator(".hoverlayer .hovertext, .hoverlayer .legend").first.wait_for()
    return figure.locator(".hoverlayer text").all_text_contents()


def test_a_hover_reads_the_values(opened):
    read = hovered(opened, "val_acc1")
    epoch, values = float(read[0]), dict(line.split(" : ") for line in read[1:])
    assert 400 < epoch < 600
    assert float(values["dino"]) == pytest.approx(50 + 40 * epoch / EPOCHS + 1.5, abs=0.1)
    mean, spread = map(float, values["byol"].split(" ± "))
    assert mean == pytest.approx(50 + 40 * epoch / EPOCHS + 0.25, abs=0.1) and spread == pytest.approx(0.35, abs=0.01)
    assert "gap" in hovered(opened, "gap_sim")[-1]


def test_a_click_on_the_legend_hides_a_run(opened):
    assert "dino" in str(hovered(opened, "val_acc1"))
    opened.locator("#accuracies .legend li", has_text="dino").click()
    read = str(hovered(opened, "val_acc1"))
    assert "dino" not in read and "ressl" in read


def test_narrow_and_dark(opened):
    hovered(opened, "val_acc1")
    ink = "() => getComputedStyle(document.querySelector('#accuracies .xtitle')).fill"
    light = opened.evaluate(ink)
    opened.emulate_media(color_scheme="dark")
    opened.wait_for_function(f"light => ({ink})() !== light", arg=light)
    opened.set_viewport_size({"width": 400, "height": 800})
    wide = "() => document.documentElement.scrollWidth"
    opened.wait_for_function(f"() => ({wide})() <= 400")


def test_pictures_are_in_the_page(opened):
    picture = opened.locator("#pictures img")
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 1000


def test_a_browser_follows_runs_that_train(browser, tmp_path):
    """`report --watch`, a browser that has its page open, and a row that the run writes after that."""
    row = {"epoch": 0, "step": 0, "val_acc1": 41.0}
    run = write_run(tmp_path / "byol" / "1", [row])
    words = ["report", str(run), "--out", str(tmp_path / "report"), "--watch", "1"]
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also from a background job
    command = [sys.executable, "-c", f"{heard}; from solo_ext.cli.main import main; raise SystemExit(main({words}))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            page = Path(watching.stdout.readline().strip())
            tab = browser.new_page()
            tab.goto(page.as_uri())
            assert "41.00" in tab.locator(".results").inner_text()
            write_metrics(run, [row, {"epoch": 1, "step": 1, "val_acc1": 52.0}])
            tab.wait_for_function("document.querySelector('.results')?.innerText.includes('52.00')", timeout=60_000)
            tab.close()
        finally:
            watching.send_signal(signal.SIGINT)
    assert watching.returncode == 130
    assert "52.00" in (text := page.read_text()) and "http-equiv" not in text
