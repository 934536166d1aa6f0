"""An ONNX graph with its weights, for onnxruntime and other readers of ONNX."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solo_ext.errors import reason, require
from solo_ext.zoo.export import Product, Source

BOUND, DTYPES = 1e-4, ("float32",)
OPSET = 18
LIMIT = 2**31  # bytes; a protobuf message cannot be larger
INPUT, OUTPUT = "images", "features"
NAMED: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": OPSET}


def export(source: Source, folder: Path) -> Product:
    """One file: `images` [batch, C, size, size] -> `features` [batch, D], any batch.

    A network that the exporters, ONNX's checker or onnxruntime reject is a CheckpointError.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "--to onnx", "onnx")
    file, shape = f"{source.name}.onnx", [source.channels, *[source.transform.size] * 2]
    if sum(x.nbytes for x in source.tensors.values()) >= LIMIT:
        raise source.failure("an ONNX file holds less than 2 GiB")
    graph = _graph(source)
    (folder / file).write_bytes(graph.SerializeToString())
    names = [tensor.name for tensor in graph.graph.initializer]
    opset = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    return Product(
        _session((folder / file).read_bytes()),
        f"an ONNX graph of opset {opset}",
        have=names,
        want=names,
        load=(
            f'session = onnxruntime.InferenceSession("{file}")',
            f'features = session.run(["{OUTPUT}"], {{"{INPUT}": images}})[0]  # float32 [batch, {str(shape)[1:]}',
        ),
        record={"opset": opset, "input": INPUT, "output": OUTPUT},
    )


def _graph(source: Source) -> Any:
    """The onnx.ModelProto, by the first exporter whose graph is valid and runs on any number of images."""
    shape = source.channels, source.transform.size, source.transform.size
    images = torch.zeros(2, *shape)  # a batch of 1 would become a constant
    for trace in (_trace, _trace_as_before):
        try:
            with _silence():
                graph = trace(source.backbone, images)
            import_module("onnx").checker.check_model(graph, full_check=True)
            run = _session(graph.SerializeToString())
            for count in (1, 3):
                run(torch.zeros(count, *shape))
            return graph
        except Exception as error:  # of many types, from torch.export to onnxruntime
            failure = error
    raise source.failure(f"ONNX does not take this network: {reason(failure)[:300]}") from failure


def _trace(backbone: nn.Module, images: Tensor) -> Any:
    """By PyTorch's current exporter, built on torch.export; that of 2.5 fails at BatchNorm and fixes some batches."""
    batch = torch.export.Dim("batch")
    program: Any = torch.onnx.export(backbone, (images,), dynamic_shapes=({0: batch},), dynamo=True, **NAMED)
    return program.model_proto


def _trace_as_before(backbone: nn.Module, images: Tensor) -> Any:
    """By the older exporter, built on TorchScript."""
    file: Any = io.BytesIO()
    axes = {name: {0: "batch"} for name in (INPUT, OUTPUT)}
    torch.onnx.export(backbone, (images,), file, dynamic_axes=axes, dynamo=False, **NAMED)
    return import_module("onnx").load_from_string(file.getvalue())


def _session(graph: bytes) -> Callable[[Tensor], Tensor]:
    """images -> features, by onnxruntime on the CPU."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@contextmanager
def _silence() -> Iterator[None]:
    """Suppresses the exporter's progress, hints and warnings."""
    level, nothing = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(nothing), redirect_stderr(nothing):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
