"""Attention heads and MLP units: gates, ranking, selection, and their physical removal."""
