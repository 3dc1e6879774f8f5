def unassign():
    """Give the machine back. No test may do that by running all cells."""
    raise RuntimeError("unassign was called: it must stay behind an opt-in")
