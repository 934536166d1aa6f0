"""Lists of image files: text with one `path [label]` a line, or a CSV."""

import codecs
import io
import os
import re
from functools import cache
from pathlib import Path

import numpy as np

from solo_ext.data.images import FileImages, ImageSet, reading
from solo_ext.errors import DataError

SUFFIXES = (".txt", ".csv")
GAP = b" \t\n\r\f\v,;"
# what precedes a gap, a label (a number or a word), and a line with the names of columns
_BEFORE, _LABEL = re.compile(rb"(.*)[\s,;]"), re.compile(rb"(-1|\d+)|(?=.*[a-zA-Z\x80-\xff])[^,;\t]+")
_HEADER = re.compile(rb"[a-z_]*(path|file|name|image|img)[a-z_]*([\s,;]+[a-z_]+)*", re.IGNORECASE)


def read_list(path: str | os.PathLike, key: str, labels: bool = True) -> ImageSet:
    """The images listed in the text file `path`, one `path [label]` or `path,label` a line.

    Paths are relative to the list's folder and may hold spaces. A label, which is a number from 0, -1 for none, or a
    word, is on every line or on none; the classes are the labels that occur, in order. Blank lines, those that begin
    with # and a first one with the names of columns are skipped. Raises `DataError` with the first line that is
    something else, or whose file is missing.
    """
    path = Path(path)
    with reading(key):
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows writes them
            text = os.fsencode(text.decode("utf-16", "replace"))
    if b"\0" in text:
        raise DataError(f"{key}: '{path}' is no list of paths in UTF-8")

    @cache
    def names(folder: bytes) -> set[bytes]:  # a million single look-ups would take minutes on a network disk
        try:
            return set(os.listdir(os.path.join(os.fsencode(path.parent), folder)))
        except OSError:
            return set()

    def refused(number: int, why: str) -> DataError:
        return DataError(f"{key}: line {number} of the list '{path}'{why}")

    paths: list[bytes] = []
    numbers: list[int] = []
    known: dict[bytes, int] = {}  # label -> its number
    bare = 0  # a line without one
    for line, row in enumerate(map(bytes.strip, io.BytesIO(text)), 1):
        if not row or row.startswith(b"#"):
            continue
        name = row
        while name and name[(base := name.rfind(b"/") + 1) :] not in names(name[:base]):
            name = before[1].rstrip(GAP) if (before := _BEFORE.match(name)) else b""
        if not name:
            if not paths and _HEADER.fullmatch(row):
                continue
            absent = os.fsdecode(re.sub(rb"\s+(-1|\d+)$", b"", row))
            raise refused(line, f": there is no file '{absent}'")
        label = row[len(name) :].lstrip(GAP)
        if label not in known:
            if label and not _LABEL.fullmatch(label):
                why = f": '{os.fsdecode(label)}' is no label, which is a number from 0, -1 for none, or a word"
                raise refused(line, why)
            known[label] = len(known)
            bare = bare if label else line
        paths.append(name)
        numbers.append(known[label])
    if not paths:
        raise DataError(f"{key}: no image in the list '{path}'")
    images = FileImages(path.parent, np.array(paths))
    if not (labels and any(known)):
        return ImageSet(images, np.full(len(images), -1))
    if bare:
        raise refused(bare, " has no label, unlike others")
    words = [*map(os.fsdecode, known)]
    if digits := all(word == "-1" or word.isdecimal() for word in words):
        words = [str(int(word)) for word in words]
    classes = sorted({*words} - {"-1"}, key=int if digits else str)
    targets = {word: i for i, word in enumerate(classes)}
    return ImageSet(images, np.array([targets.get(word, -1) for word in words])[numbers], tuple(classes))
