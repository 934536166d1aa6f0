"""Features as files: the encoder's own, with names and labels, in each format."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import whole  # noqa: F401, a fixture

from solo_ext.cli.main import main
from solo_ext.zoo.model import load_backbone


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        place = tmp_path / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"é {i}.png")
    return tmp_path / "images"


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file}
    if path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path) as file:
            columns = {name: file[name][:] for name in file}
        return columns | {"name": np.array([name.decode() for name in columns["name"]])}
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path).to_pydict()
    return {name: np.array(x, None if name != "features" else np.float32) for name, x in table.items()}


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".h5"])
@pytest.mark.parametrize("options", [[], ["--teacher", "--half"]])
def test_features(whole, folder, tmp_path, suffix, options, capsys):  # noqa: F811
    out = tmp_path / "new" / f"features{suffix}"
    assert main(["features", str(whole.dir), str(folder), "--out", str(out), "--workers", "0", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 5 images x 128 features"
    columns = read(out)
    assert columns["name"].tolist() == ["a/é 0.png", "a/é 2.png", "a/é 4.png", "b/é 1.png", "b/é 3.png"]
    assert columns["label"].tolist() == [0, 0, 0, 1, 1]
    backbone = load_backbone(whole.dir, teacher="--teacher" in options)
    with torch.no_grad():
        ours = torch.stack([backbone(backbone.transform(Image.open(folder / n))[None])[0] for n in columns["name"]])
    assert columns["features"] == pytest.approx(ours.numpy(), abs=1e-2 if options else 1e-5)
    if suffix != ".parquet":
        assert columns["features"].dtype == (np.float16 if options else np.float32)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("out", "images", "said"),
    [
        ("features.csv", "images", "must end in one of .npz, .parquet, .h5"),
        ("images/a/é 0.png/x.npz", "images", "cannot be written: File exists"),
        ("features.npz", "nowhere", "error: IMAGES: there is no folder"),
    ],
)
def test_mistakes(whole, folder, out, images, said, capsys):  # noqa: F811
    place = folder.parent
    assert main(["features", str(whole.dir), str(place / images), "--out", str(place / out), "--workers", "0"]) == 2
    assert said in capsys.readouterr().err
    assert {file.name for file in place.iterdir()} == {"images"}
