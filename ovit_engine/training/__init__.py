"""The bundled trainer behind `ovit train`: data, steps, checkpoints, processes."""
