"""Format `dali`: NVIDIA DALI reads, decodes, crops and resizes, on a GPU or in threads of the CPU.

DALI receives the paths of a batch and the boxes to cut out, and keeps no state: order, sharding, resume and random
numbers are those of the other formats, and `render` makes the colours, since DALI rotates hues about the gray axis, on
photographs 4.6 of 255 levels away from Pillow's hue (0.1), which changes 5.5.

Python looks into a file once: some damaged ones end DALI's process, others become images of gray.
"""

# mypy: disable-error-code="attr-defined, arg-type"
# DALI makes its constants and operators at run time

import io
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.backend_impl import ReleaseUnusedMemory
from PIL import Image
from torch import Tensor

from solo_ext.data.decode import DecodeConfig, is_plain_jpeg
from solo_ext.data.images import FileImages
from solo_ext.data.loader import Batch, EpochSampler, Unreadable, ViewDataset, ViewLoader, read
from solo_ext.data.transforms import Transform

AHEAD = 2  # batches in the making while one is used
START, SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # markers of a JPEG file
MARKER = re.compile(b"\xff[^\x00\xff\xd0-\xd7]")  # no stuffing, fill or restart
INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
PILLOW = -1, -1
# images -> width and height of each that DALI decodes as Pillow does; `PILLOW` of others; 0 before it is looked into
_SIZES: WeakKeyDictionary[FileImages, np.ndarray] = WeakKeyDictionary()
_PIPELINES: WeakSet[Pipeline] = WeakSet()
_ORPHANS: list[Pipeline] = []  # of a forked process, which without their threads would hang when it destroys them
os.register_at_fork(after_in_child=lambda: _ORPHANS.extend(_PIPELINES))
Source = tuple[bytes, bool, int, int]  # an encoded image, or its path; which; its width and height


def size_for_dali(data: bytes, how: DecodeConfig) -> tuple[int, int]:
    """Width and height of a JPEG file that DALI decodes to what Pillow makes of it, else `PILLOW`."""
    file = io.BytesIO(data)
    if data.startswith(START):
        with Image.open(file) as image:  # reads up to the first scan
            scan = data.rfind(SCAN) if "progressive" in image.info else file.tell()
            # each decoder fills in pixels that are missing before the end marker in its own way
            marker = MARKER.search(data, scan + len(SCAN))
            if is_plain_jpeg(image, how) and marker and marker[0] == END:
                return image.size
    return PILLOW


class DaliLoader(ViewLoader):
    """Batches made `AHEAD` batches ahead, on `device` if it is a GPU, else on the CPU; `threads` read files."""

    def __init__(self, dataset: ViewDataset, device: torch.device, **options: Any):
        super().__init__(dataset, device, **options)
        assert isinstance(dataset.images.images, FileImages)
        self.images, self.targets, self.transforms = dataset.images.images, dataset.images.targets, dataset.transforms
        self.sizes = _SIZES.setdefault(self.images, np.zeros((len(self.images), 2), np.int32))
        self.device, self.stream = torch.device("cpu"), None
        if device.type == "cuda":
            self.device = torch.device("cuda", device.index or 0)
            self.stream = torch.cuda.Stream(self.device, priority=-1)  # so that a training never waits for colours
        # Each keeps torch to one thread, since they share the CPU with DALI's; threads that already run are left alone.
        self._workers = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self._renderer = ThreadPoolExecutor(1)  # DALI's pipeline belongs to its thread
        self._pipeline: Pipeline | None = None

    def _batches(self) -> Iterator[Batch]:
        ahead: deque[Future] = deque()
        try:
            for keys in self.batch_sampler:
                indexes, numbers = self.dataset.draw(keys)
                files = self._workers.map(self._read, np.array_split(indexes, self.threads))
                ahead.append(
                    self._renderer.submit(self._render, self.dataset.transforms_of(keys), indexes, numbers, files)
                )
                if len(ahead) > AHEAD:
                    yield self._take(ahead.popleft())
            while ahead:
                yield self._take(ahead.popleft())
        finally:
            for future in ahead:
                future.cancel()
            if not isinstance(self.sampler, EpochSampler):  # an evaluation, which others may not need for an epoch
                with suppress(RuntimeError):  # the interpreter is ending
                    self._renderer.submit(self._give_back)

    def _give_back(self) -> None:
        self._pipeline = None
        ReleaseUnusedMemory()

    def _take(self, future: Future) -> Batch:
        indexes, views, targets, unreadable, done = future.result()
        self.skipped.add(unreadable)
        for _, parts in views:
            list(parts)
        views = [view for view, _ in views]
        if done:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for tensor in (indexes, *views, targets):
                tensor.record_stream(current)
        return indexes, views, targets

    def _read(self, indexes: np.ndarray) -> tuple[list[tuple[int, Source]], Unreadable]:
        """Index and source of each image, or of the one that replaces it, and what could not be read."""
        unreadable: Unreadable = []
        return [read(self._source, index, len(self.images), unreadable) for index in indexes.tolist()], unreadable

    def _source(self, i: int) -> Source:
        width, height = self.sizes[i].tolist()
        if not width:
            with self.images.named(i):
                width, height = self.sizes[i] = size_for_dali(self.images.read(i), self.images.how)
        if width > 0:
            local = self.images.in_files
            return os.fsencode(self.images.path(i)) if local else self.images.read(i), local, width, height
        pixels = self.images[i]
        height, width = pixels.shape[1:]
        ppm = b"P6 %d %d 255\n" % (width, height) + pixels.permute(1, 2, 0).numpy().tobytes()
        return ppm, False, width, height

    def _render(
        self, transforms: list[Transform], indexes: np.ndarray, numbers: np.ndarray, shares: Iterable[tuple[list, list]]
    ) -> Any:
        """The batch, its views with their parts, the images that could not be read, and a GPU's event after them."""
        if [view.size for view in transforms] != [view.size for view in self.transforms]:
            self._pipeline = None  # crops that grow: the next one's are larger
        self.transforms = transforms
        files, unreadable = (list(chain(*parts)) for parts in zip(*shares, strict=True))
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            try:
                crops = self._crop(files, numbers)
            except RuntimeError:
                self._find_faulty(files, numbers)
                files, unreadable = self._read(indexes)
                crops = self._crop(files, numbers)
            views = [self._finish(*view) for view in zip(self.transforms, crops, numbers, strict=True)]
            rows = torch.tensor([index for index, _ in files])
            targets = torch.from_numpy(self.targets)[rows].to(self.device, non_blocking=True)
            rows = rows.to(self.device, non_blocking=True)
            return rows, views, targets, unreadable, self.stream and self.stream.record_event()

    def _find_faulty(self, files: list[tuple[int, Source]], numbers: np.ndarray) -> None:
        """Leaves the images that DALI cannot decode, of which it names none, to Pillow, in this pass and all others."""
        for row, (index, source) in enumerate(files):
            try:
                self._crop([(index, source)], numbers[:, row : row + 1])
            except RuntimeError:
                self.sizes[index] = PILLOW

    def _crop(self, files: list[tuple[int, Source]], numbers: np.ndarray) -> list[Tensor]:
        """The views of a batch before `Transform.finish`, uint8 [B, 3, size, size]."""
        pipeline = self._pipeline or build(self.transforms, self.batch_size, self.threads, self.device)
        self._pipeline = None  # unless it comes back: an error makes it invalid
        sources, local, widths, heights = zip(*(source for _, source in files), strict=True)
        inputs = {"source": [np.frombuffer(source, np.uint8) for source in sources], "local": np.array(local)}
        for i, (transform, u) in enumerate(zip(self.transforms, numbers, strict=True)):
            inputs[f"frame{i}"] = frame(transform, u, np.array(widths), np.array(heights))
        outputs: Any = pipeline.run(self.stream, **inputs)
        crops = [torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2).contiguous() for output in outputs]
        self._pipeline = pipeline
        return crops

    def _finish(self, transform: Transform, crops: Tensor, u: np.ndarray) -> tuple[Tensor, Iterable[Tensor]]:
        """A view, and its parts; on the CPU, workers make them while DALI prepares the next batch."""
        if self.stream:
            with torch.cuda.nvtx.range("solo_ext colours"):  # beside DALI's own ranges
                return transform.finish(crops, u), ()
        view = torch.empty((len(crops), 3, *crops.shape[2:]))
        parts = min(self.threads, len(crops))
        split = crops.tensor_split(parts), np.array_split(u, parts), view.tensor_split(parts)
        return view, self._workers.map(transform.finish, *split)


def frame(transform: Transform, u: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """What DALI needs to know about B views, int32 [B, 4]: left, top, width and height of the box to cut out; if the
    transform has `shorter`, left and top of the view in the resized image, and that image's width and height."""
    if transform.shorter is None:
        return transform.boxes(widths, heights, u).astype(np.int32)
    sizes = np.stack([widths, heights], axis=1)
    resized = (transform.shorter * sizes / sizes.min(axis=1, keepdims=True)).astype(np.int32)
    return np.concatenate([np.rint((resized - transform.size) / 2).astype(np.int32), resized], axis=1)


def build(transforms: Sequence[Transform], batch_size: int, threads: int, device: torch.device) -> Pipeline:
    """A pipeline from `Source`s and `frame`s to uint8 views, [size, size, 3] each."""
    cuda = device.type == "cuda"

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple:
        encoded = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
        if fn.external_source(name="local", dtype=types.BOOL, ndim=0):
            encoded = fn.io.file.read(encoded, dont_use_mmap=True)  # a file that became shorter would end the process
        # One whole decode for all views, as fast as one of each view's region. Orientation and chroma as in Pillow.
        images = fn.decoders.image(
            encoded, device="mixed" if cuda else "cpu", adjust_orientation=False, jpeg_fancy_upsampling=True
        )
        views = []
        for i, transform in enumerate(transforms):
            frames = fn.external_source(name=f"frame{i}", dtype=types.INT32, ndim=1)
            resize = {"interp_type": INTERPOLATION[transform.mode], "antialias": True}
            size = [transform.size, transform.size]
            if transform.shorter is None:
                box = fn.slice(images, frames[:2], frames[2:], axis_names="WH")
                views.append(fn.resize(box, size=size, **resize))
            else:
                sides = fn.cast(frames, dtype=types.FLOAT)
                resized = fn.resize(images, resize_x=sides[2], resize_y=sides[3], **resize)
                views.append(fn.slice(resized, frames[:2], size, axis_names="WH"))
        return tuple(views)

    # the loader prepares batches ahead, so the pipeline need not; its threads keep to the cores that are near the GPU
    options = {"device_id": device.index if cuda else None, "set_affinity": cuda, "prefetch_queue_depth": 1}
    pipeline = graph(batch_size=batch_size, num_threads=threads, **options)
    pipeline.build()
    _PIPELINES.add(pipeline)
    return pipeline
