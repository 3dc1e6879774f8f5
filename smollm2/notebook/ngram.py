"""A byte n-gram model with Witten-Bell smoothing: what counting alone can do, the neighbour a network must beat.

After a context c of k bytes,  P(s | c) = (count(c s) + kinds(c) * P(s | c without its first byte)) / (count(c) + kinds(c)),
where kinds(c) is how many different bytes followed c: the more of them, the likelier one more (Witten & Bell 1991). A
context never seen hands over to the shorter one; below the empty context lies the uniform 1/256. So every byte has a
probability above 0 and they always sum to 1.
"""

from __future__ import annotations

import numpy as np

MAX_ORDER = 8  # a context of 7 bytes and the byte after it fill one uint64


def _packed(data: np.ndarray, length: int) -> np.ndarray:
    """Every window of `length` bytes as one uint64: entry i is data[i : i + length]."""
    count = max(len(data) - length + 1, 0)
    packed = np.zeros(count, np.uint64)
    for offset in range(length):
        packed = (packed << np.uint64(8)) | data[offset : offset + count].astype(np.uint64)
    return packed


class NGram:
    """Counts of a text for all contexts of up to `order` - 1 bytes.

    `text` is bytes; raises ValueError for an order outside 1..8 or an empty text.
    """

    def __init__(self, text: bytes, order: int = 5):
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order is {order}; expected 1 to {MAX_ORDER}")
        if not text:
            raise ValueError("the text is empty; expected at least one byte")
        self.order = order
        data = np.frombuffer(text, np.uint8)
        self._tables = []  # for each context length: (windows, their counts, contexts, their counts, their kinds)
        for length in range(order):
            windows, counts = np.unique(_packed(data, length + 1), return_counts=True)
            contexts, first, kinds = np.unique(windows >> np.uint64(8), return_index=True, return_counts=True)
            totals = np.add.reduceat(counts, first) if len(first) else counts
            self._tables.append((windows, counts, contexts, totals, kinds))

    @property
    def contexts(self) -> int:
        """How many different contexts are stored: the size of the model."""
        return sum(len(table[2]) for table in self._tables)

    def _step(self, length: int, windows: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """P(last byte of each window | the `length` bytes before it), given the probabilities after the shorter context."""
        known, counts, contexts, totals, kinds = self._tables[length]
        count = _look_up(known, counts, windows)
        total = _look_up(contexts, totals, windows >> np.uint64(8))
        kind = _look_up(contexts, kinds, windows >> np.uint64(8))
        return np.where(total > 0, (count + kind * shorter) / np.maximum(total + kind, 1), shorter)

    def probabilities(self, context: bytes = b"", order: int | None = None) -> np.ndarray:
        """(256,) float64: the probability of each next byte after `context` (its last bytes count). Sums to 1."""
        result = np.full(256, 1 / 256)
        nexts = np.arange(256, dtype=np.uint64)
        for length in range(min(self._checked(order), len(context) + 1)):
            start = int.from_bytes(context[len(context) - length :], "big")
            result = self._step(length, (np.uint64(start) << np.uint64(8)) | nexts, result)
        return result

    def bits(self, text: bytes, order: int | None = None) -> np.ndarray:
        """(len(text),) float64: the bits that each byte costs, having read those before it in `text`."""
        data = np.frombuffer(text, np.uint8)
        result = np.full(len(data), 1 / 256)
        for length in range(
            min(self._checked(order), len(data))
        ):  # the first bytes have shorter contexts only
            result[length:] = self._step(length, _packed(data, length + 1), result[length:])
        return -np.log2(result)

    def _checked(self, order: int | None) -> int:
        if order is not None and not 1 <= order <= self.order:
            raise ValueError(f"order is {order}; this model counted orders 1 to {self.order}")
        return order or self.order


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values of the keys that are there, 0 for the others. `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
