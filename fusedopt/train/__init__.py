"""The reference training loop: ``python -m fusedopt.train``, alone or under ``torchrun``."""
