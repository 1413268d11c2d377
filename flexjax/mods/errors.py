"""What a mod can do wrong."""

from __future__ import annotations


class UnsupportedMod(NotImplementedError):
    """A mod does something that the mod IR cannot express, so that no kernel can inline it.

    The xla backend still runs such a mod, under `jax.vmap`.

    Attributes:
        reason: what the mod does, as the end of a sentence that begins "the mod cannot be inlined: ".
    """

    def __init__(self, reason: str):
        super().__init__(f"The mod cannot be inlined into a kernel: {reason}.")
        self.reason = reason
