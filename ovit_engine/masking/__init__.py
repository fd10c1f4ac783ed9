"""Which weights a recipe acts on, and which of them are zero."""
