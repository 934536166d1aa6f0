"""Photographs with boxes, in Pascal VOC's layout or COCO's."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from solo_ext.data.images import FileImages, ImageSet, reading
from solo_ext.errors import DataError, naming
from solo_ext.files import log

SHOWN = 3  # images without an annotation that a message names


class BoxImages(FileImages):
    """Whole photographs of any size, for a detector."""

    kind = "photographs with boxes"
    formats = ("image_folder",)  # type: ignore[assignment]  # fewer


class Objects(NamedTuple):
    """The n objects that an image shows.

    boxes: left, top, right, bottom in pixels from 0. labels: from 1. difficult: not counted by an evaluation.
    crowd: neither counted nor trained on. masks: outlines, as COCO's JSON has them, or empty.
    """

    boxes: np.ndarray  # float32 [n, 4]
    labels: np.ndarray  # int64 [n]
    difficult: np.ndarray  # bool [n]
    crowd: np.ndarray  # bool [n]
    masks: Sequence[bytes] = ()


@dataclass(frozen=True)
class BoxSet(ImageSet):
    """Images without labels of their own, and `objects[i]` of each."""

    objects: tuple[Objects, ...] = ()

    def subset(self, rows: np.ndarray) -> "BoxSet":
        return replace(super().subset(rows), objects=tuple(self.objects[i] for i in rows))  # type: ignore[return-value, call-arg]

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the file names, boxes and labels."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for shown in self.objects:
            for part in (shown.boxes.astype("<f4"), shown.labels.astype("<i8"), shown.difficult, shown.crowd):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        boxes = sum(len(shown.boxes) for shown in self.objects)
        return super().record() | {"classes": len(self.classes), "boxes": boxes, "fingerprint": self.fingerprint()}

    def numbered(self, classes: Sequence[str], key: str) -> "BoxSet":
        """With the numbers that the same names have in `classes`; DataError for a name that is not there."""
        if unknown := sorted({*self.classes} - {*classes}):
            raise DataError(f"{key}: there are boxes of '{unknown[0]}', which the training images have none of")
        numbers = np.array([0, *(1 + classes.index(name) for name in self.classes)])
        objects = tuple(shown._replace(labels=numbers[shown.labels]) for shown in self.objects)
        return replace(self, classes=tuple(classes), objects=objects)


class _Found(NamedTuple):
    """An image of an annotation, and its objects as (name, box, difficult, crowd, outline or nothing)."""

    path: str
    size: tuple[int, int] | None  # width and height
    objects: list[tuple[str, Sequence[float], bool, bool, bytes]]
    where: str  # what a message calls it


def read_boxes(paths: str, key: str, skip: bool = False) -> BoxSet:
    """The images of one annotation, or of several, joined by the separator of PATH (`:`).

    Each is a list of VOC's, `VOC2007/ImageSets/Main/trainval.txt`, or a file of COCO's, `annotations/instances_*.json`,
    with the images in a folder beside `annotations` that has the name's end, in `images`, or beside the file.

    Raises DataError for an annotation that cannot be read, names an image that is not there, or has a box outside its
    image; with `skip`, such boxes are left out, with a warning.
    """
    found, names = [], []
    for path in map(Path, paths.split(os.pathsep)):
        images, classes = (_read_coco if path.suffix == ".json" else _read_voc)(path, key)
        found += images
        names += [name for name in classes if name not in names]
    if not any(image.objects for image in found):
        raise DataError(f"{key}: there is no box in '{paths}'")
    numbers = {name: number for number, name in enumerate(names, 1)}
    left_out: list[str] = []
    objects = tuple(_objects(image, numbers, left_out, key) for image in found)
    if left_out and not skip:
        raise DataError(f"{left_out[0]}; data.corrupt=skip leaves it out")
    if left_out:
        log.warning("%d boxes are left out; the first: %s", len(left_out), left_out[0])
    root = os.path.commonpath([os.path.dirname(image.path) for image in found])
    files = np.array([os.fsencode(os.path.relpath(image.path, root)) for image in found])
    return BoxSet(BoxImages(Path(root), files), np.full(len(found), -1), tuple(names), objects)


def _objects(image: _Found, numbers: dict[str, int], left_out: list[str], key: str) -> Objects:
    kept = []
    for name, box, *rest in image.objects:
        left, top, right, bottom = clipped = _clipped(box, image.size)
        if not (left < right and top < bottom):  # NaN neither
            size = f" of {image.size[0]} x {image.size[1]} px" if image.size else ""
            sides = ", ".join(f"{side:g}" for side in box)
            left_out.append(f"{key}: {image.where}: the box of '{name}' ({sides}) is empty or outside the image{size}")
        else:
            kept.append((clipped, numbers[name], *rest))
    boxes, labels, difficult, crowd, masks = zip(*kept, strict=True) if kept else ((),) * 5
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(difficult, bool),
        np.array(crowd, bool),
        masks if masks and all(masks) else (),
    )


def _clipped(box: Sequence[float], size: tuple[int, int] | None) -> list[float]:
    """The box, empty if it is outside; what reaches over the edge by a pixel, as tools that count otherwise write it,
    ends there."""
    if size is None:
        return list(box)
    sides = list(zip(box, (*size, *size), strict=True))
    inside = all(-1 <= side <= most + 1 for side, most in sides)
    return [min(max(side, 0), most) if inside else 0 for side, most in sides]


def _read_voc(path: Path, key: str) -> tuple[list[_Found], list[str]]:
    with reading(key):
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    folder = path.absolute().parents[2]
    if not (folder / "JPEGImages").is_dir():
        raise DataError(f"{key}: '{path}' is no list in VOC's layout: there is no folder '{folder / 'JPEGImages'}'")
    files = {Path(name).stem: name for name in os.listdir(folder / "JPEGImages")}
    _refuse_missing([name for name in names if name not in files], f"{key}: '{path}'", folder / "JPEGImages")
    found = []
    for name in names:
        file = folder / "Annotations" / f"{name}.xml"
        errors = OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError
        with naming(f"{key}: {file} is not an annotation of VOC's", *errors, error=DataError):
            root = ElementTree.parse(file).getroot()
            size = root.find("size")
            sides = None if size is None else (_number(size, "width"), _number(size, "height"))
            found.append(
                _Found(
                    str(folder / "JPEGImages" / files[name]),
                    sides and (int(sides[0]), int(sides[1])),
                    [_voc_object(item) for item in root.findall("object")],
                    str(file),
                )
            )
    return found, sorted({name for image in found for name, *_ in image.objects})


def _voc_object(item: ElementTree.Element) -> tuple[str, Sequence[float], bool, bool, bytes]:
    box: Any = item.find("bndbox")
    left, top, right, bottom = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = (item.findtext("difficult") or "0").strip() == "1"
    # VOC counts pixels from 1, and the last one belongs to the box
    return str(item.findtext("name")).strip(), (left - 1, top - 1, right, bottom), difficult, False, b""


def _number(parent: ElementTree.Element, name: str) -> float:
    return float(parent.findtext(name))  # type: ignore[arg-type]  # its absence is an error that is named


def _read_coco(path: Path, key: str) -> tuple[list[_Found], list[str]]:
    errors = OSError, ValueError, LookupError, TypeError, AttributeError
    with naming(f"{key}: '{path}' is not an annotation of COCO's", *errors, error=DataError):
        content = json.loads(path.read_bytes())
        names = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        images = {
            image["id"]: _Found(image["file_name"], (image["width"], image["height"]), [], f"'{path}'")
            for image in content["images"]
        }
        for a in content["annotations"]:
            for what, number, known in (("image", a["image_id"], images), ("category", a["category_id"], names)):
                if number not in known:
                    raise DataError(
                        f"{key}: an annotation of '{path}' names the {what} {number}, which it does not have"
                    )
            left, top, width, height = map(float, a["bbox"])
            box = (left, top, left + width, top + height)
            crowd, outline = bool(a.get("iscrowd", 0)), a.get("segmentation")
            text = json.dumps(outline).encode() if outline else b""  # a tenth of the memory, and one object
            images[a["image_id"]].objects.append((names[a["category_id"]], box, False, crowd, text))
    if not images:
        raise DataError(f"{key}: '{path}' has no images")
    files = [image.path for image in images.values()]
    beside = path.absolute().parent
    places = [beside.parent / path.stem.rpartition("_")[2], beside.parent / "images", beside / "images", beside]
    folder = next((place for place in places if (place / files[0]).is_file()), None)
    if folder is None:
        raise DataError(f"{key}: the images of '{path}' are in none of {', '.join(map(str, places))}")
    there = {name for parent in {Path(file).parent for file in files} for name in _listed(folder, parent)}
    _refuse_missing([file for file in files if file not in there], f"{key}: '{path}'", folder)
    return [image._replace(path=str(folder / image.path)) for image in images.values()], list(names.values())


def _listed(folder: Path, inner: Path) -> list[str]:
    inside = folder / inner
    return [str(inner / name) for name in os.listdir(inside)] if inside.is_dir() else []


def _refuse_missing(names: Sequence[str], where: str, folder: Path) -> None:
    if names:
        some = ", ".join(names[:SHOWN])
        raise DataError(f"{where} names {len(names)} images that are not in '{folder}' (first: {some})")


def outlines(objects: Objects, size: tuple[int, int]) -> np.ndarray:
    """The masks of the objects of an image of this (height, width): bool [n, height, width]."""
    from pycocotools import mask

    def code(text: bytes) -> Any:
        outline = json.loads(text)
        if isinstance(outline, list):
            return mask.merge(mask.frPyObjects(outline, *size))
        return mask.frPyObjects(outline, *size) if isinstance(outline.get("counts"), list) else outline

    decode: Callable[[Any], np.ndarray] = mask.decode
    return np.stack([decode(code(outline)).astype(bool) for outline in objects.masks])
