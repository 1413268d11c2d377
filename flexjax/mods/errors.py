"""What a mod can do wrong."""

from __future__ import annotations


class UnsupportedMod(NotImplementedError):
    """A mod does something that the mod IR cannot express, so that no kernel can inline it.

    The xla backend still runs such a mod, under `jax.vmap`.

    Args:
        what: what the mod does, as the end of a sentence that begins "the mod cannot be inlined: ".
        where: the line of the user's source that does it, if known.

    Attributes:
        reason: both together, again as the end of that sentence.
    """

    def __init__(self, what: str, where: str = ""):
        self.what, self.where = what, where
        self.reason = f"{what}, at {where}" if where else what
        super().__init__(f"The mod cannot be inlined into a kernel: {self.reason}.")
