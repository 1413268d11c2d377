"""Compiles the kernels to H100 machine code on a machine without a GPU, and tells what came out.

Run as `python -m tests.mosaic_gpu.aot NAME...`, in an environment with JAX's CUDA plugin and NVIDIA's
assembler (see `REQUIREMENTS`); prints one JSON object a variant. It must be its own process: the plugin, what
it dumps and where it looks for its tools are settled when JAX starts.
"""

import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

# Beside jax itself, in its version; installed without their dependencies.
REQUIREMENTS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")

TARGET = Path(__file__).with_name("h100.textproto")

BATCH, HEADS, LENGTH = 2, 4, 1024

# Programs that make block masks.
MASKS = ("mask_causal", "mask_document")


def _mods(name: str, q_len: int, heads: int) -> tuple[Any, Any]:
    from flexjax import masks, scores

    causal = masks.causal()
    ids = np.arange(q_len, dtype=np.int32) // 300

    def document(b, h, q_idx, kv_idx):
        import jax.numpy as jnp

        return (jnp.asarray(ids)[q_idx] == jnp.asarray(ids)[kv_idx]) & (q_idx >= kv_idx)

    def checkered(b, h, q_idx, kv_idx):
        return ((q_idx // 100 + kv_idx // 95) % 2 == 0) | (q_idx == kv_idx)

    def relative(score, b, h, q_idx, kv_idx):
        return score + (q_idx - kv_idx)

    def bias(score, b, h, q_idx, kv_idx):
        import jax.numpy as jnp

        return score + jnp.asarray(np.zeros((heads, q_len, q_len), np.float32))[h, q_idx, kv_idx]

    def vectors(score, b, h, q_idx, kv_idx):
        """A scalar a head, a number a query and a number a key."""
        import jax.numpy as jnp

        gates, by_query, by_key = (
            jnp.asarray(np.ones(shape, np.float32))
            for shape in ((heads,), (heads, q_len), (q_len,))
        )
        return score * gates[h] + by_query[h, q_idx] * by_key[kv_idx]

    return {
        "noop": lambda: (None, None),
        "causal": lambda: (None, causal),
        "document": lambda: (None, document),
        "soft_cap": lambda: (scores.soft_cap(20.0), causal),
        "alibi": lambda: (scores.alibi(heads), causal),
        "relative": lambda: (relative, None),
        "table": lambda: (
            scores.relative_table(np.ones((heads, 2 * q_len - 1), np.float32)),
            causal,
        ),
        "bias": lambda: (bias, None),
        "vectors": lambda: (vectors, causal),
        "window": lambda: (None, masks.sliding_window(1024)),
        "checkered": lambda: (None, checkered),
    }[name]()


# name -> (variant, dimensions and options)
VARIANTS: dict[str, tuple[str, dict]] = {
    "noop_d128": ("noop", {"dim": 128}),
    "causal_d128": ("causal", {"dim": 128}),
    "document_d128": ("document", {"dim": 128}),
    "soft_cap_d128": ("soft_cap", {"dim": 128}),
    "relative_d128": ("relative", {"dim": 128}),
    "noop_d64": ("noop", {"dim": 64}),
    "relative_d64": ("relative", {"dim": 64}),
    "alibi_d128": ("alibi", {"dim": 128}),
    "alibi_d64_float16": ("alibi", {"dim": 64, "dtype": "float16"}),
    "odd_causal_d96_blhd": ("causal", {"dim": 96, "q_len": 1001, "layout": "BLHD"}),
    "causal_d256": ("causal", {"dim": 256}),
    "causal_d192_128": ("causal", {"dim": 192, "v_dim": 128}),
    "blocks_of_64_d128": ("causal", {"dim": 128, "block": 64}),
    "blocks_of_64_d64": ("document", {"dim": 64, "block": 64}),
    "checkered_d64": ("checkered", {"dim": 64}),
}

# The same for the backward pass.
BACKWARD_VARIANTS: dict[str, tuple[str, dict]] = {
    f"backward_{name}": (variant, options | {"backward": True})
    for name, (variant, options) in {
        "noop_d128": ("noop", {"dim": 128}),
        "causal_d128": ("causal", {"dim": 128}),
        "document_d128": ("document", {"dim": 128}),
        "soft_cap_d128": ("soft_cap", {"dim": 128}),
        "alibi_d128": ("alibi", {"dim": 128}),
        "table_d128": ("table", {"dim": 128}),
        "bias_d128": ("bias", {"dim": 128}),
        "vectors_d128": ("vectors", {"dim": 128}),
        "noop_d64": ("noop", {"dim": 64}),
        "causal_d64": ("causal", {"dim": 64}),
        "alibi_d64": ("alibi", {"dim": 64}),
        "soft_cap_d64": ("soft_cap", {"dim": 64}),
        "table_d64": ("table", {"dim": 64}),
        "odd_causal_d96_blhd": ("causal", {"dim": 96, "q_len": 1001, "layout": "BLHD"}),
        "blocks_of_64_d128": ("causal", {"dim": 128, "block": 64}),
        "float16_d16_v128": ("soft_cap", {"dim": 16, "v_dim": 128, "dtype": "float16"}),
        "causal_d256": ("causal", {"dim": 256}),
        "soft_cap_d256": ("soft_cap", {"dim": 256}),
        "causal_d192_128": ("causal", {"dim": 192, "v_dim": 128}),
        "noop_d256": ("noop", {"dim": 256}),
        "deterministic_causal_d256": ("causal", {"dim": 256, "kernel_options": {"deterministic": True}}),
        "deterministic_causal_d128": ("causal", {"dim": 128, "kernel_options": {"deterministic": True}}),
        "deterministic_noop_d128": ("noop", {"dim": 128, "kernel_options": {"deterministic": True}}),
        "deterministic_noop_d64": ("noop", {"dim": 64, "kernel_options": {"deterministic": True}}),
        "deterministic_vectors_d64": ("vectors", {"dim": 64, "kernel_options": {"deterministic": True}}),
        "causal_d128_dk_first": ("causal", {"dim": 128, "kernel_options": {"backward_order": "dk_first"}}),
    }.items()
}  # fmt: skip


# And for decoding steps, of positions in a sequence: (variant, sizes of query and cache).
DECODE_VARIANTS: dict[str, tuple[str, dict]] = {
    f"decode_{name}": (variant, options)
    for name, (variant, options) in {
        "noop_d128": ("noop", {"dim": 128}),
        "alibi_d128_4_queries": ("alibi", {"dim": 128, "q_len": 4}),
        "soft_cap_d64_float16_page_16": ("soft_cap", {"dim": 64, "dtype": "float16", "page": 16}),
        "window_d256": ("window", {"dim": 256}),
    }.items()
}


def _decode(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A decoding step and the types of its arguments."""
    import jax
    import jax.numpy as jnp

    from flexjax import KVCache, decode
    from tests.mosaic_gpu.paged import Paged

    variant, options = DECODE_VARIANTS[name]
    batch, heads, kv_heads, capacity = 4, 8, 2, 4096
    dim, page = options["dim"], options.get("page")
    score_mod, mask_mod = _mods(variant, capacity, heads)

    def array(*shape: int, dtype: str = options.get("dtype", "bfloat16")) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    query, lengths = array(batch, heads, options.get("q_len", 1), dim), array(batch, dtype="int32")
    key = array(batch, kv_heads, capacity, dim)
    cache: Any = KVCache(key, key, lengths)
    if page is not None:
        rows = capacity // page
        pool = array(kv_heads, batch * rows, page, dim)
        cache = Paged(pool, pool, array(batch, rows, dtype="int32"), lengths)
    return lambda q, c: decode(q, c, score_mod, mask_mod, backend="mosaic_gpu"), (query, cache)


def compile_variant(name: str, dump: Path) -> dict[str, Any]:
    """Compiles one variant; registers, spilled bytes and matrix instructions of the machine code."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    made = _decode if name in DECODE_VARIANTS else _block_mask if name in MASKS else _attention
    function, args = made(name)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
    )
    device = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), args)
    for old in dump.iterdir():
        old.unlink()
    compiled = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    report = "\n".join(p.read_text() for p in dump.glob("*.ptxas"))
    code = "\n".join(p.read_text() for p in dump.glob("*.ptx"))
    memory = compiled.memory_analysis()
    return {
        "name": name,
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", report)],
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", report))),
        "serialized": re.findall(r"[^\n]*C75\d\d[^\n]*", report),
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "matrix_instructions": len(re.findall(r"wgmma\.mma_async", code)),
        "added_halves": _added_halves(code),
    }


def _added_halves(code: str) -> int:
    """How many upper halves of products are added to several values; see `lanes.quotient`."""
    halves = set(re.findall(r"mul\.hi\.[us]32\s+(%r\d+),", code))
    sums = re.findall(r"\b(?:add|sub)\.[us]32\s+%r\d+, (%r\d+), (%r\d+);", code)
    terms = Counter(term for pair in sums for term in pair)
    return sum(terms[half] > 1 for half in halves)


def _block_mask(name: str) -> tuple[Any, tuple[Any, ...]]:
    """Making a block mask of 131072 tokens, and the types of its arguments."""
    import jax
    import jax.numpy as jnp

    from flexjax import create_block_mask

    length = 131072

    def make(ids: Any, first: Any) -> Any:
        def causal(b, h, q_idx, kv_idx):
            return q_idx + first >= kv_idx

        def document(b, h, q_idx, kv_idx):
            # A read at a range of indices: its extremes come from a sparse table.
            return (ids[q_idx + first] == ids[kv_idx]) & causal(b, h, q_idx, kv_idx)

        mask_mod = document if name == "mask_document" else causal
        return create_block_mask(mask_mod, None, None, length, length)

    return make, (
        jax.ShapeDtypeStruct((length,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def _attention(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A kernel of flex_attention and the types of its arguments."""
    import jax
    import jax.numpy as jnp

    from flexjax import create_block_mask
    from flexjax.backends import mosaic_gpu
    from flexjax.problem import Result
    from tests.mosaic_gpu.problems import problem_of

    variant, options = (VARIANTS | BACKWARD_VARIANTS)[name]
    backward = options.get("backward", False)
    batch, heads, q_len, dim = BATCH, HEADS, options.get("q_len", LENGTH), options["dim"]
    layout, dtype = options.get("layout", "BHLD"), options.get("dtype", "bfloat16")
    shape = (batch, heads, q_len) if layout == "BHLD" else (batch, q_len, heads)
    query, value = (
        jax.ShapeDtypeStruct((*shape, d), jnp.dtype(dtype))
        for d in (dim, options.get("v_dim", dim))
    )
    score_mod, mask_mod = _mods(variant, q_len, heads)
    mask = None
    if mask_mod is not None:
        mask = create_block_mask(mask_mod, None, None, q_len, q_len, options.get("block", 128))
    problem, operands = problem_of(
        query,
        query,
        value,
        score_mod=score_mod,
        block_mask=mask,
        layout=layout,
        options=options.get("kernel_options"),
    )
    mosaic_gpu.check(problem)
    args: tuple[Any, ...] = (operands,)
    if backward:
        out = jax.ShapeDtypeStruct(problem.output_shape(), query.dtype)
        lse = jax.ShapeDtypeStruct(problem.stats_shape(), jnp.float32)
        args = operands, Result(out, lse), out, lse
    function = mosaic_gpu.backward if backward else mosaic_gpu.forward
    return lambda *args: function(problem, *args), args


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Before JAX starts: no GPU and no cuDNN are needed, and the assembler lies among the packages.
        packages = next(p for p in map(Path, sys.path) if p.name == "site-packages")
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
            "PATH": f"{packages / 'nvidia/cu13/bin'}:{os.environ['PATH']}",
        }
        for name in names:
            print(json.dumps(compile_variant(name, Path(folder))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*VARIANTS, *BACKWARD_VARIANTS, *DECODE_VARIANTS])
