"""The only layer over torch.distributed."""
