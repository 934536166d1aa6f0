"""Features in two dimensions: a picture, and a page whose points say their images."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import whole  # noqa: F401, a fixture

from solo_ext.analysis.embedding import laid_out
from solo_ext.cli.main import main

pytest.importorskip("umap")
pytest.importorskip("plotly")


@pytest.mark.parametrize("method", ["umap", "tsne"])
def test_what_is_alike_lies_together_and_the_same_each_time(method):
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(3, 16)), 30, axis=0).astype(np.float32)
    features = centres + 0.05 * rng.normal(size=centres.shape).astype(np.float32)
    features *= rng.uniform(1, 9, (90, 1))  # distances are cosines
    points = laid_out(features, method)
    assert points.shape == (90, 2) and np.array_equal(points, laid_out(features, method))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(90)
    assert (distances.argmin(1) // 30 == np.arange(90) // 30).all()


def test_a_map_leaves_pytorch_its_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        laid_out(np.eye(9, 8, dtype=np.float32), "umap")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["umap", "tsne"])
def test_a_map_of_the_runs_own_images(whole, kind, capsys):  # noqa: F811
    assert main(["pictures", str(whole.dir), str(whole.dir), "--kind", kind, "--count", "40"]) == 0
    picture, page = (whole.dir / "pictures" / f"{kind}{suffix}" for suffix in (".png", ".html"))
    assert capsys.readouterr().out.split()[-2:] == [str(picture), str(page)]
    with Image.open(picture) as image:
        assert image.width > 1.5 * image.height, "a panel for each run"
    text = page.read_text()
    assert text.count('"legendgroup":') == 20, "ten classes, twice" and "</html>" in text


def test_a_map_of_a_folder_says_its_files(whole, tmp_path):  # noqa: F811
    for i in range(6):
        place = tmp_path / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)).save(place / f"x{i}.png")
    words = ["pictures", str(whole.dir), "--kind", "umap", "--out", str(tmp_path / "map.pdf")]
    assert main([*words, "--images", str(tmp_path / "images")]) == 0
    text = (tmp_path / "map.html").read_text()
    assert all(f"x{i}.png" in text for i in range(6)) and '"name":"a"' in text


def test_too_few_images_are_one_sentence(whole, tmp_path, capsys):  # noqa: F811
    for i in range(3):
        Image.new("RGB", (12, 12)).save(tmp_path / f"{i}.png")
    assert main(["pictures", str(whole.dir), "--kind", "tsne", "--images", str(tmp_path)]) == 2
    assert "3 images are too few for a map; use at least 4" in capsys.readouterr().err
