"""What only the notebooks use: checks and predictions, live panels, a look inside, the reader's own run."""
