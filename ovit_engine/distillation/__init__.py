"""A teacher and the loss terms that compare a student with it."""
