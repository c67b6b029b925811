"""Long series in few bytes: (time, value) points packed losslessly, at 1 ms of time."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.errors import SwitchyardError

Point = tuple[float, float | None]

# format, how values are encoded, number of points; little-endian
_HEAD = struct.Struct("<BBI")
_FORMAT = 1
_WHOLE, _FLOAT = 0, 1
# beyond 2**53 a float64 no longer holds every whole number
_EXACT = 2.0**53


@dataclass(frozen=True)
class Series:
    """One measured series: `t` in epoch seconds (UTC) and `values`, in order of arrival; NaN is 'not measured'."""

    t: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.t)

    def points(self) -> list[Point]:
        """The points as plain numbers; None where nothing was measured."""
        return [
            (t, None if value != value else value)
            for t, value in zip(self.t.tolist(), self.values.tolist(), strict=True)
        ]


def pack(points: Sequence[Point]) -> bytes:
    """`points` as bytes: times as second differences of whole ms, whole values as differences, others as float64.

    Bytes are grouped by significance before zlib, as Blosc's and HDF5's shuffle filters do: slow series differ in few
    of them. Raises SwitchyardError for an infinite value or a time that is not finite.
    """
    t = np.array([point[0] for point in points], dtype=np.float64)
    values = np.array([np.nan if point[1] is None else point[1] for point in points], dtype=np.float64)
    if not np.isfinite(t).all() or np.isinf(values).any():
        raise SwitchyardError("a sample needs a finite time and a finite value; use None for 'not measured'")
    whole = bool(np.all(np.abs(values) < _EXACT)) and bool(np.all(values == np.rint(values)))
    # -0.0 would come back as 0.0
    whole = whole and not bool(np.any(np.signbit(values) & (values == 0)))
    ms = np.rint(t * 1000).astype(np.int64)
    body = _shuffled(np.diff(np.diff(ms, prepend=0), prepend=0).tobytes())
    body += _shuffled((np.diff(values.astype(np.int64), prepend=0) if whole else values).tobytes())
    return _HEAD.pack(_FORMAT, _WHOLE if whole else _FLOAT, len(points)) + zlib.compress(body, 6)


def unpack(packed: bytes) -> Series:
    """The series that `pack` stored."""
    form, encoding, count = _HEAD.unpack_from(packed)
    if form != _FORMAT:
        raise SwitchyardError(f"samples in an unknown form ({form}): written by a newer Switchyard?")
    body = zlib.decompress(packed[_HEAD.size :])
    half = count * 8
    ms = np.cumsum(np.cumsum(np.frombuffer(_unshuffled(body[:half]), dtype="<i8")))
    raw = _unshuffled(body[half:])
    if encoding == _WHOLE:
        values = np.cumsum(np.frombuffer(raw, dtype="<i8")).astype(np.float64)
    else:
        values = np.frombuffer(raw, dtype="<f8").astype(np.float64)
    return Series(t=ms / 1000.0, values=values)


def joined(parts: Sequence[Series]) -> Series:
    """The parts one after the other; empty for none."""
    if not parts:
        return Series(t=np.empty(0), values=np.empty(0))
    return Series(t=np.concatenate([part.t for part in parts]), values=np.concatenate([part.values for part in parts]))


def _shuffled(raw: bytes) -> bytes:
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 8).T.tobytes()


def _unshuffled(raw: bytes) -> bytes:
    return np.frombuffer(raw, dtype=np.uint8).reshape(8, -1).T.tobytes()
