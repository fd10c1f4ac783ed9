"""Helpers without knowledge of models or recipes: files, console, random states, plots."""
