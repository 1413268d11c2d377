"""The mod IR: users' score_mod and mask_mod as graphs of scalar operations."""
