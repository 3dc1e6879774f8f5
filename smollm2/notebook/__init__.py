"""What only the notebooks use: checks and predictions, live panels, pictures of the inside of a model, the
reader's own run."""
