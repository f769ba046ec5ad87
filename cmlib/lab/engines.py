"""The practical road: a network as an ONNX file, quantized to int8 and run by ONNX Runtime.

``to_onnx`` writes it, ``to_int8`` writes a second file with int8 weights and uint8 activations, ``Engine`` runs either and answers like a model.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from ..core.apply import with_plain_weights
from ..core.inputs import sample
from .calibrate import SAMPLES
from .ranges import PER
from .train import batches
from .zoo import write

INPUT, OUTPUT = "images", "logits"


class EngineError(ValueError):
    """A network cannot be written as ONNX, or a file of it cannot be read or quantized; the message says which and why."""


def to_onnx(model: nn.Module, path: str | Path, example: Tensor) -> int:
    """Write ``model`` with plain weights as ONNX, its file's bytes returned. ``example`` is an input (N, ...); files take any N.

    Written aside and renamed. EngineError names the layer that ONNX cannot express.
    """
    plain = with_plain_weights(model).cpu()
    two = example[:1].cpu().repeat(2, *[1] * (example.dim() - 1))  # of one, the exporter would take its 1 for a constant
    try:
        with torch.no_grad():
            plain(two)
    except Exception as error:
        raise EngineError(f"the network refuses an example of shape {tuple(example.shape)}: {_short(error)}") from error
    try:
        made = _exported(plain, (two,))
    except Exception as error:
        raise EngineError(f"{_culprit(plain, two)} cannot be written as ONNX: {_short(error)}") from error
    return _write(Path(path), made)


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model, inputs, dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},) * len(inputs), input_names=[INPUT], output_names=[OUTPUT],
        )  # fmt: skip
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantizer's own remarks."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _culprit(model: nn.Module, example: Tensor) -> str:
    """The first layer that cannot be exported alone, else the forward pass that joins them."""
    seen: list[tuple[str, nn.Module, Any]] = []
    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    handles = [m.register_forward_hook(lambda m, x, y, name=name: seen.append((name, m, x))) for name, m in leaves]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    for name, layer, inputs in seen:
        try:
            _exported(layer, inputs)
        except Exception:
            return f"layer {name or 'of its own'} ({type(layer).__name__})"
    return f"the forward pass of {type(model).__name__}"


def _short(error: BaseException) -> str:
    """The first line of what lies behind an error, without the exporter's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


def _write(path: Path, model: onnx.ModelProto) -> int:
    """The file without the remarks that say where on this machine each step was written."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer, model.graph, model):
        value.ClearField("metadata_props")
    raw = model.SerializeToString()
    try:
        write(path, raw)
    except OSError as error:
        raise EngineError(f"{path} cannot be written: {error}") from error
    return len(raw)


class _Images(CalibrationDataReader):
    def __init__(self, images: Tensor) -> None:
        self.parts = iter([{INPUT: x.contiguous().numpy()} for x in batches(images, 64, nn.Identity())])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.parts, None)


def to_int8(path: str | Path, out: str | Path, data: Any, *, per: str = "tensor", samples: int = SAMPLES) -> int:
    """Write the ONNX file ``path`` again with int8 weights and uint8 activations to ``out``, the new file's bytes returned.

    ONNX Runtime's static quantization, QDQ: prepared as it advises (shapes inferred, batch norms folded), ranges by min-max from ``samples`` training
    images; ``per="filter"`` gives each filter a scale. On a processor without VNNI instructions whoever runs the file by other means than
    ``Engine`` should set ``session.x64quantprecision`` too. EngineError for what cannot be read, quantized or written; ValueError for no images.
    """
    if per not in PER:
        raise ValueError(f"per={per!r} is not allowed: one of {', '.join(PER)}")
    if samples < 1:
        raise ValueError(f"samples={samples!r}: ranges are read from one training image at least")
    reader = _Images(sample(data, samples)[0])
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        try:
            with _quiet():
                quant_pre_process(str(path), str(prepared))
                quantize_static(
                    prepared, quantized, reader, quant_format=QuantFormat.QDQ, per_channel=per == "filter",
                    weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
                )  # fmt: skip
            made = onnx.load(quantized)
        except Exception as error:
            raise EngineError(f"{path} cannot be quantized: {_short(error)}") from error
    return _write(Path(out), made)


class Engine(nn.Module):
    """An ONNX file run by ONNX Runtime on the CPU: floats (N, ...) in, logits (N, classes) out; ``predict`` and ``evaluate`` take it as a model.

    ``threads`` work on one call and sleep between calls. EngineError where the file cannot be run.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would take the other engine's turn
        options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI, sums of two products would saturate at 16 bits
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"{path} cannot be run by ONNX Runtime: {_short(error)}") from error
        self.bytes = Path(path).stat().st_size
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.session.get_inputs()[0].name: x.contiguous().numpy()})[0])

    def __deepcopy__(self, memo: dict) -> Engine:
        return self  # a session is never changed, and cannot be copied
