"""The two kinds of attention heads of video diffusion models: within frames, and across them."""

from typing import Any

import jax.numpy as jnp

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def spatial_head(frames: int, frame_tokens: int, *, prompt: int = 0, reach: int = 0) -> MaskMod:
    """A token sees its own frame, frames at most `reach` away, the first frame, and the prompt.

    The sequence is the prompt, then frame after frame. Prompt tokens see everything.

    Args:
        frames: frames of the video, >= 1.
        frame_tokens: tokens of a frame, >= 1.
        prompt: tokens of text before the video, >= 0.
        reach: how many frames before and behind the own one are seen, >= 0.

    Returns:
        A mask_mod named `spatial_head_<frames>_<frame_tokens>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if one is out of its range.

    Source: Xi et al., "Sparse VideoGen", arXiv 2502.01776, section 3.
    """
    _, size, prompt, reach = _checked("spatial_head()", frames, frame_tokens, prompt, reach)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        # Tokens of the prompt are in frames before the first: they are seen by the rule below.
        q_frame, kv_frame = (q_idx - prompt) // size, (kv_idx - prompt) // size
        return (q_idx < prompt) | (kv_frame <= 0) | (jnp.abs(q_frame - kv_frame) <= reach)

    return named(mask, f"spatial_head_{frames}_{frame_tokens}")


def temporal_head(
    frames: int, frame_tokens: int, *, prompt: int = 0, reach: int = 0, frame_major: bool = True
) -> MaskMod:
    """A token sees its own place, and places at most `reach` away, in every frame, and the prompt.

    Prompt tokens see everything. Frame by frame this is a comb, of which hardly a block is empty. So it
    pays to put the tokens place by place, `tokens.reshape(frames, frame_tokens)` transposed, and to say
    `frame_major=False`: the comb then is a band.

    Args:
        frames: frames of the video, >= 1.
        frame_tokens: tokens of a frame, >= 1.
        prompt: tokens of text before the video, >= 0.
        reach: how many places before and behind the own one are seen, >= 0.
        frame_major: whether the video's tokens stand frame by frame; otherwise place by place.

    Returns:
        A mask_mod named `temporal_head_<frames>_<frame_tokens>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if one is out of its range.

    Source: Xi et al., "Sparse VideoGen", arXiv 2502.01776, section 3 (with its layout transformation).
    """
    count, size, prompt, reach = _checked("temporal_head()", frames, frame_tokens, prompt, reach)

    def place(index: Any) -> Any:
        token = index - prompt
        return token % size if frame_major else token // count

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near = jnp.abs(place(q_idx) - place(kv_idx)) <= reach
        return (q_idx < prompt) | (kv_idx < prompt) | near

    return named(mask, f"temporal_head_{frames}_{frame_tokens}")


def _checked(
    where: str, frames: int, frame_tokens: int, prompt: int, reach: int
) -> tuple[int, int, int, int]:
    return (
        check_integer(where, "frames", frames, at_least=1),
        check_integer(where, "frame_tokens", frame_tokens, at_least=1),
        check_integer(where, "prompt", prompt, at_least=0),
        check_integer(where, "reach", reach, at_least=0),
    )


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(
        spatial_head(6, 9, prompt=10),
        temporal_head(6, 9, prompt=10),
        temporal_head(6, 9, prompt=10, frame_major=False),
    )
