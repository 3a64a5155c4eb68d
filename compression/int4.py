"""Reads the quantized weights that ONNX Runtime runs, straight from a bundle's external data file.

Knows `weights.json` and the block layout of MatMulNBits. Does not know torch, ONNX or the model.

A blockwise tensor of shape (out, in) is stored as MatMulNBits keeps it: codes of `bits` bits (low
bits first) in blocks of `block` along `in`, one scale per block, and a zero point per block or,
when none is stored, 2^(bits-1) for all. The value is (code - zero point) * scale. Rows are padded
to whole blocks; a row stored without padding (GatherBlockQuantized) is read as well.

An int8 tensor of shape (out, in) is stored as signed codes with one float32 scale per row; a layer
that multiplies integers (DynamicQuantizeMatMul) keeps its codes as (in, out), "transposed".
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.errors import WeightsError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

WEIGHTS_FILE = "weights.json"
ENCODER_FOLDER = "onnx/"
FORMAT = 1
MAX_INDEX_BYTES = 64 * 2**20
"""A weights.json above this is refused before it is parsed; a 70 B model's is under 1 MiB."""

_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclass(frozen=True, slots=True)
class Packed:
    """A blockwise quantized matrix; the arrays are views of the mapped data file.

    codes: uint8 (out, bytes per row); scales: (out, blocks) float32 or float16;
    zero_points: uint8 (out, ceil(blocks * bits / 8)) or None for 2^(bits-1).
    """

    bits: int
    block: int
    shape: tuple[int, int]
    codes: U8
    scales: npt.NDArray[Any]
    zero_points: U8 | None

    @property
    def blocks(self) -> int:
        """Number of blocks in one row."""
        return math.ceil(self.shape[1] / self.block)

    def dequantize(self) -> F32:
        """Return the matrix as float32 (out, in)."""
        rows, columns = self.shape
        codes = _unpack(self.codes, self.bits)[:, :columns].astype(np.float32)
        zero: F32 | float = float(2 ** (self.bits - 1))
        if self.zero_points is not None:
            zero = _unpack(self.zero_points, self.bits)[:, : self.blocks].astype(np.float32)
            zero = np.repeat(zero, self.block, axis=1)[:, :columns]
        scales = np.repeat(self.scales.astype(np.float32), self.block, axis=1)[:, :columns]
        result: F32 = (codes - zero) * scales
        return result.reshape(rows, columns)


class WeightFile:
    """The weights of one bundle by their Hugging Face parameter names.

    Raises:
        WeightsError: the index is missing, malformed, or points outside the data file.
    """

    def __init__(self, bundle_dir: Path | str) -> None:
        folder = Path(bundle_dir)
        index = _read_index(folder / WEIGHTS_FILE)
        self.data_path = folder / index["data"]
        self._tensors: dict[str, dict[str, Any]] = index["tensors"]
        try:
            self._data: U8 = np.memmap(self.data_path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as exc:
            raise WeightsError(f"{self.data_path}: cannot be read ({exc})") from exc
        for name in self._tensors:
            self.shape(name)

    def names(self) -> tuple[str, ...]:
        """All parameter names, aliases included."""
        return tuple(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def source(self, name: str) -> str:
        """The name under which the bytes of `name` are stored (itself, unless it is an alias)."""
        entry = self._entry(name)
        if entry["kind"] != "alias":
            return name
        target = str(entry.get("of"))
        if self._entry(target)["kind"] == "alias":
            raise WeightsError(f"{name}: an alias of an alias ({target})")
        return target

    def kind(self, name: str) -> str:
        """ "blockwise", "int8" or "dense"; an alias has the kind of its source."""
        return str(self._entry(self.source(name))["kind"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter.

        Raises:
            WeightsError: no such tensor, or its entry is malformed.
        """
        entry = self._entry(self.source(name))
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise WeightsError(f"{name}: shape {shape!r} is not a list of positive integers")
        return tuple(shape)

    def packed(self, name: str) -> Packed:
        """The blockwise tensor `name`, still quantized.

        Raises:
            WeightsError: not blockwise, or its parts do not have the sizes its shape asks for.
        """
        name = self.source(name)
        entry, shape = self._entry(name), self.shape(name)
        bits, block = entry.get("bits"), entry.get("block")
        if entry["kind"] != "blockwise" or len(shape) != 2:
            raise WeightsError(f"{name}: not a blockwise matrix ({entry['kind']}, shape {shape})")
        if bits not in (4, 8) or not isinstance(block, int) or block < 16 or block & (block - 1):
            raise WeightsError(f"{name}: bits {bits!r} and block {block!r} are not supported")
        rows, columns = shape
        blocks = math.ceil(columns / block)
        codes = self._part(name, "packed")
        widths = (blocks * block * bits // 8, math.ceil(columns * bits / 8))
        if codes.size not in (rows * widths[0], rows * widths[1]):
            raise WeightsError(f"{name}: {codes.size} bytes of codes do not fit {rows} x {columns}")
        scale_part = entry["scales"]
        dtype = _dtype(name, scale_part[2] if len(scale_part) > 2 else "float32")
        scales = _typed(name, self._part(name, "scales"), dtype, (rows, blocks))
        zero_points = None
        if entry.get("zero_points") is not None:
            width = math.ceil(blocks * bits / 8)
            zero_points = _typed(
                name, self._part(name, "zero_points"), np.dtype(np.uint8), (rows, width)
            )
        return Packed(bits, block, (rows, columns), codes.reshape(rows, -1), scales, zero_points)

    def dequantize(self, name: str) -> F32:
        """The tensor `name` as float32, whatever its kind; quantized ones have shape (out, in).

        Raises:
            WeightsError: no such tensor, or it does not fit the data file.
        """
        name = self.source(name)
        if self._entry(name)["kind"] == "blockwise":
            return self.packed(name).dequantize()
        if self._entry(name)["kind"] == "int8":
            return self._int8(name)
        dtype = _dtype(name, self._entry(name).get("dtype"))
        dense = _typed(name, self._part(name, "data"), dtype, self.shape(name))
        return dense.astype(np.float32)

    def _int8(self, name: str) -> F32:
        shape = self.shape(name)
        if len(shape) != 2:
            raise WeightsError(f"{name}: not an int8 matrix (shape {shape})")
        turned = self._entry(name).get("transposed") is True
        stored = shape[::-1] if turned else shape
        codes = _typed(name, self._part(name, "codes"), np.dtype(np.int8), stored)
        scales = _typed(name, self._part(name, "scales"), _DTYPES["float32"], (shape[0], 1))
        rows = codes.T if turned else codes
        result: F32 = np.ascontiguousarray(rows, dtype=np.float32) * scales
        return result

    def _entry(self, name: str) -> dict[str, Any]:
        entry = self._tensors.get(name)
        if not isinstance(entry, dict):
            raise WeightsError(f"{name}: no such tensor in {WEIGHTS_FILE}")
        if entry.get("kind") not in ("blockwise", "int8", "dense", "alias"):
            raise WeightsError(f"{name}: kind {entry.get('kind')!r} is not known")
        return entry

    def _part(self, name: str, part: str) -> U8:
        span = self._entry(name).get(part)
        if not isinstance(span, list) or len(span) < 2:
            raise WeightsError(f"{name}: {part} {span!r} is not [offset, bytes]")
        offset, length = span[0], span[1]
        if not isinstance(offset, int) or not isinstance(length, int) or offset < 0 or length < 0:
            raise WeightsError(f"{name}: {part} {span!r} is not [offset, bytes]")
        if offset + length > self._data.size:
            raise WeightsError(
                f"{name}: {part} ends at byte {offset + length}, but {self.data_path.name} "
                f"has {self._data.size}; the bundle is incomplete, fetch it again"
            )
        return self._data[offset : offset + length]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise WeightsError(f"{path}: larger than {MAX_INDEX_BYTES} bytes")
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise WeightsError(f"{path}: cannot be read ({exc})") from exc
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise WeightsError(f"{path}: not a weights index of format {FORMAT}")
    data, tensors = index.get("data"), index.get("tensors")
    if not isinstance(tensors, dict) or not isinstance(data, str) or not _is_near(data):
        raise WeightsError(f"{path}: 'data' must be a file name and 'tensors' a table")
    return index


def _is_near(data: str) -> bool:
    # A file of the bundle: beside the index, or of the folder that encoders keep their graph in.
    name = data.removeprefix(ENCODER_FOLDER)
    return Path(name).name == name


def _dtype(name: str, text: object) -> np.dtype[Any]:
    dtype = _DTYPES.get(text) if isinstance(text, str) else None
    if dtype is None:
        raise WeightsError(f"{name}: dtype {text!r} is not one of {sorted(_DTYPES)}")
    return dtype


def _typed(name: str, data: U8, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if data.size != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{name}: {data.size} bytes are not {shape} of {dtype}")
    aligned = data if data.ctypes.data % dtype.alignment == 0 else data.copy()
    return aligned.view(dtype).reshape(shape)


def _unpack(packed: U8, bits: int) -> U8:
    if bits == 8:
        return np.asarray(packed)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1)  # (rows, bytes, 2), low first
    return nibbles.reshape(packed.shape[0], -1)
