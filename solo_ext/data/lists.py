"""Lists of image files: text with one `path [label]` a line, or a CSV."""

import codecs
import os
import re
from functools import cache
from pathlib import Path

import numpy as np

from solo_ext.data.images import FileImages, ImageSet, reading
from solo_ext.errors import DataError

SUFFIXES = (".txt", ".csv")
# what ends a path, a label (a number or a word), and a line with the names of columns
_GAP, _LABEL = re.compile(rb"[\s,;]+"), re.compile(rb"(-1|\d+)|(?=.*[a-zA-Z\x80-\xff])[^,;\t]+")
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

    def there(name: bytes) -> bool:
        base = name.rfind(b"/") + 1
        return name[base:] in names(name[:base])

    lines = enumerate(map(bytes.strip, text.split(b"\n")), 1)
    rows = [(number, line) for number, line in lines if line and not line.startswith(b"#")]
    if rows and _HEADER.fullmatch(rows[0][1]) and not there(rows[0][1]):
        del rows[0]
    if not rows:
        raise DataError(f"{key}: no image in the list '{path}'")
    paths, words = [], []
    for number, row in rows:
        where, gaps = f"{key}: line {number} of the list '{path}'", [gap.span() for gap in _GAP.finditer(row)]
        end, start = next((cut for cut in [(len(row), len(row)), *gaps[::-1]] if there(row[: cut[0]])), (0, 0))
        if not end:
            name = os.fsdecode(re.sub(rb"\s+(-1|\d+)$", b"", row))
            raise DataError(f"{where}: there is no file '{name}'")
        if row[start:] and not _LABEL.fullmatch(row[start:]):
            what = f"'{os.fsdecode(row[start:])}' is no label, which is a number from 0, -1 for none, or a word"
            raise DataError(f"{where}: {what}")
        paths.append(row[:end])
        words.append(os.fsdecode(row[start:]))
    images = FileImages(path.parent, np.array(paths))
    if not (labels and any(words)):
        return ImageSet(images, np.full(len(images), -1))
    if "" in words:
        line, _ = rows[words.index("")]
        raise DataError(f"{key}: line {line} of the list '{path}' has no label, unlike others")
    if numbers := all(word == "-1" or word.isdecimal() for word in words):
        words = [str(int(word)) for word in words]
    classes = sorted({*words} - {"-1"}, key=int if numbers else str)
    known = {word: i for i, word in enumerate(classes)}
    return ImageSet(images, np.array([known.get(word, -1) for word in words]), tuple(classes))
