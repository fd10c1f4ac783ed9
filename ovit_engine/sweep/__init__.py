"""One training run, many sparsities."""
