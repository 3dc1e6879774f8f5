"""The byte n-gram is a proper distribution and equals the plain dictionary version, written out from the formula."""

from collections import Counter

import numpy as np
import pytest

from smollm2.ngram import NGram

TEXT = ("the cat sat on the mat. the dog sat on the log; déjà vu, 東京.\n" * 3 + "a rat ran.").encode()


def by_the_formula(text: bytes, context: bytes, symbol: int, length: int) -> float:
    """P(symbol | last `length` bytes of context), counted afresh from the text."""
    shorter = by_the_formula(text, context, symbol, length - 1) if length else 1 / 256
    wanted = context[len(context) - length :]
    after = Counter(text[i + length] for i in range(len(text) - length) if text[i : i + length] == wanted)
    return (after[symbol] + len(after) * shorter) / (after.total() + len(after)) if after else shorter


@pytest.mark.parametrize("order", [1, 2, 4])
def test_it_equals_the_formula_counted_from_the_text(order):
    model, probe = NGram(TEXT, order), b"the rat sat, \xc3\xa9!"
    bits = model.bits(probe)
    for i, symbol in enumerate(probe):
        expected = by_the_formula(TEXT, probe[:i], symbol, min(order - 1, i))
        assert 2 ** -bits[i] == pytest.approx(expected, rel=1e-12)
        assert model.probabilities(probe[:i])[symbol] == pytest.approx(expected, rel=1e-12)


def test_the_longest_context_keeps_all_its_bytes_apart_and_lower_orders_are_in_it():
    model = NGram(b"\xffbcdefgX" * 9 + b"abcdefgY" * 9, 8)
    assert model.probabilities(b"\xffbcdefg")[ord("X")] > 0.8
    assert model.probabilities(b"abcdefg")[ord("Y")] > 0.8
    np.testing.assert_array_equal(NGram(TEXT, 6).bits(b"the dog", order=2), NGram(TEXT, 2).bits(b"the dog"))
