"""Settings of the process that are put back."""

from __future__ import annotations

import pytest
import torch

from smollm2.device import repeatable_sums


def test_repeatable_sums_leave_the_process_as_it_was_and_fill_no_memory():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = settings()
    with repeatable_sums(True):
        assert settings() == (True, False)
    with repeatable_sums(False):
        assert settings() == before
    with pytest.raises(ZeroDivisionError), repeatable_sums(True):
        raise ZeroDivisionError
    assert settings() == before == (False, True)
