"""Exported files that tests read and damage."""

from tests.exported_files import convnet, digits, vit, vit_copy

__all__ = ["convnet", "digits", "vit", "vit_copy"]
