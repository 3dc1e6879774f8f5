"""A byte n-gram model with Witten-Bell smoothing: counting alone, the rival that a network must beat.

After a context c of k bytes,  P(s | c) = (count(c s) + kinds(c) * P(s | c without its first byte)) /
(count(c) + kinds(c)), where kinds(c) is how many different bytes followed c: the more of them, the likelier
one more (Witten & Bell 1991). A context never seen hands over to the shorter one; below the empty context
lies the uniform 1/256. So every byte has a probability above 0 and they always sum to 1.
"""

from __future__ import annotations

import numpy as np

MAX_ORDER = 8  # a context of 7 bytes and the byte after it fill one uint64
LAST_BYTE = np.uint64(255)


def _packed(data: np.ndarray, length: int) -> np.ndarray:
    """Every window of `length` bytes as one uint64: entry i is data[i : i + length]."""
    count = max(len(data) - length + 1, 0)
    packed = np.zeros(count, np.uint64)
    for offset in range(length):
        packed = (packed << np.uint64(8)) | data[offset : offset + count].astype(np.uint64)
    return packed


class NGram:
    """Counts of a text (bytes) for all contexts of up to `order` - 1 bytes; raises ValueError for no text or
    no such order."""

    def __init__(self, text: bytes, order: int = 5):
        if not text or not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order {order}, {len(text)} bytes; expected order 1 to {MAX_ORDER}, and a text")
        self.order = order
        data = np.frombuffer(text, np.uint8)
        # of each context length: the sorted windows, and how often those before each occurred
        self._tables = []
        for length in range(1, order + 1):
            windows, counts = np.unique(_packed(data, length), return_counts=True)
            self._tables.append((windows, np.concatenate(([0], counts.cumsum()))))

    def _step(self, length: int, windows: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """P(last byte of each window | the `length` bytes before it), given the probabilities after the
        shorter context."""
        known, before = self._tables[length]
        here, behind = np.searchsorted(known, windows), np.searchsorted(known, windows, side="right")
        first = np.searchsorted(known, windows & ~LAST_BYTE)  # all that begin with this context lie together
        last = np.searchsorted(known, windows | LAST_BYTE, side="right")
        count, total, kinds = before[behind] - before[here], before[last] - before[first], last - first
        return np.where(kinds > 0, (count + kinds * shorter) / np.maximum(total + kinds, 1), shorter)

    def probabilities(self, context: bytes = b"", order: int | None = None) -> np.ndarray:
        """(256,) float64: the probability of each next byte after `context` (its last bytes count). Sums to
        1."""
        result = np.full(256, 1 / 256)
        for length in range(min(order or self.order, len(context) + 1)):
            start = np.uint64(int.from_bytes(context[len(context) - length :], "big"))
            result = self._step(length, (start << np.uint64(8)) | np.arange(256, dtype=np.uint64), result)
        return result

    def bits(self, text: bytes, order: int | None = None) -> np.ndarray:
        """(len(text),) float64: the bits that each byte costs, having read those before it in `text`."""
        data = np.frombuffer(text, np.uint8)
        result = np.full(len(data), 1 / 256)
        for length in range(min(order or self.order, len(data))):  # the first bytes have short contexts only
            result[length:] = self._step(length, _packed(data, length + 1), result[length:])
        return -np.log2(result)
