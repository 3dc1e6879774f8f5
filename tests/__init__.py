"""A package by name: IPython 7 brings a `tests` of its own on the path, which a folder without this file would lose to."""
