"""What fusedopt does among many processes, on torch.distributed alone: no engine of its own."""
