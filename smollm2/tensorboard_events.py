"""TensorBoard's event format: bytes to append to a file, so that its curves are written as safely as the text logs.

TensorBoard's own writer keeps up to half a minute of values in memory, where a kill loses them, and writes on a thread
of its own, whose errors on a full disk nobody can catch.
"""

from __future__ import annotations

import os
import socket
import struct
import time

import tensorboard.compat.proto.event_pb2 as event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c


def new_file_name() -> str:
    """A name that TensorBoard recognises; later files sort behind earlier ones."""
    return f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"


def opening() -> bytes:
    """The beginning of a file: TensorBoard then hides what earlier files say."""
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return _record(time.time(), file_version="brain.Event:2") + _record(time.time(), session_log=start)


def scalars(when: float, step: int, values: dict[str, float]) -> bytes:
    """One point of every curve; `when` in seconds of Unix time."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return _record(when, summary=summary, step=step)


def _record(when: float, **fields) -> bytes:
    """Length, its checksum, the event, its checksum: the framing of a TFRecord."""
    data = event_pb2.Event(wall_time=when, **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
