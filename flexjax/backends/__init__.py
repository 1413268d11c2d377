"""Backends: each computes a `Problem`, or raises NotImplementedError with the reason why it cannot."""
