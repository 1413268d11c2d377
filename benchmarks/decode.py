"""The suite `decode`: one step of decoding, by what it reads of the cache in a second, beside a copy of memory.

    python benchmarks/run.py decode [--groups paged,window] [--peers flexjax,torch_flex] [--minutes 4] [--quick]

A time is that of the whole step: finding the live blocks, the kernel, and adding up its parts. `tbs` counts the
keys and values that the step needs, `of_copy` is its share of what a copy, timed in the same turns, reads and
writes. The group `host` measures the host's time for one call instead: a step with a donated cache, and an empty
program.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import decode_steps, records
from benchmarks.copying import COPY, add_share, copy
from benchmarks.decode_peers import PEERS, FlexjaxDecode, Prepared
from benchmarks.decode_steps import GROUPS, DecodeStep, Group
from benchmarks.settings import QUICK, QUICK_PLAN, add_output, writes
from benchmarks.timing import Plan, add_times
from flexjax import KVCache, decode

HOST = "host"
_HOST_CALLS = 300
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(known: Any) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            parts = text.split(",")
            for part in parts:
                if part not in known:
                    raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(known)}")
            return parts

        return parse

    known = (*GROUPS, HOST)
    parser.add_argument("--groups", type=names(known), help=f"of {', '.join(known)}; all")
    parser.add_argument("--peers", type=names(PEERS), help=f"of {', '.join(PEERS)}; all")
    parser.add_argument("--minutes", type=float, help="begin no group after these")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--calls", type=int, default=20, help="queued calls a turn")
    parser.add_argument(
        "--kernel-options", type=json.loads, default={}, help="flexjax's kernel_options, as JSON"
    )
    add_output(parser, QUICK)


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax failed in any case, else 0."""
    began = time.perf_counter()
    log = records.Log("decode", arguments.out, writes(arguments))
    plan = QUICK_PLAN if arguments.quick else Plan(rounds=arguments.rounds, calls=arguments.calls)
    known = PEERS | {"flexjax": FlexjaxDecode(arguments.kernel_options)}
    peers = {name: known[name] for name in arguments.peers or known}
    for name, peer in list(peers.items()):
        reason = peer.missing()
        if reason is not None:
            print(f"without {name}: {reason}")
            del peers[name]
    failed = False
    for name in arguments.groups or (*GROUPS, HOST):
        if arguments.minutes is not None and time.perf_counter() - began > 60 * arguments.minutes:
            print(f"left out from {name} on: time is up")
            break
        measured = (
            host_rows(arguments.quick)
            if name == HOST
            else measure(_small(GROUPS[name]) if arguments.quick else GROUPS[name], peers, plan)
        )
        rows = log.add(measured)
        print(f"{name} ({time.perf_counter() - began:.0f} s)", flush=True)
        for row in rows:
            print(f"  {line(row, rows)}", flush=True)
        failed |= any("failure" in row for row in rows if row["peer"] == "flexjax")
        decode_steps.cache_arrays.cache_clear()
    log.close()
    return int(failed)


def _small(group: Group) -> Group:
    return group._replace(steps=tuple(step.shrunk() for step in group.steps))


# -- one group --------------------------------------------------------------------------------------


def measure(group: Group, peers: dict[str, Any], plan: Plan) -> list[Row]:
    """The rows of a group: the copy, and every peer's of every step."""
    rows: dict[str, Row] = {COPY: {"peer": COPY, "variant": COPY}}
    copied = copy(plan == QUICK_PLAN)
    contenders: dict[str, Any] = {COPY: copied}
    prepared: dict[str, tuple[DecodeStep, Callable[[], Prepared]]] = {}
    with ThreadPoolExecutor(8) as pool:  # programs are compiled side by side
        for step in group.steps:
            for name, peer in peers.items():
                if peer.supports(step) and (group.peers or name == "flexjax"):
                    key = f"{step.label}|{name}"
                    rows[key] = {"peer": name, **_keys(step)}
                    prepared[key] = step, peer.prepare(step, pool)
    for key, (step, finish) in prepared.items():
        try:
            contender = finish()
            result = contender.call(0)
            contender.wait(result)
            off, right = decode_steps.error(step, contender.output(result))
            rows[key] |= {"error": off, "compile_s": contender.compile_s}
            rows[key]["config"] = contender.config or None
            if right:
                contenders[key] = contender
            else:
                rows[key]["failure"] = f"wrong result: relative error {off:.2e}"
        except Exception as error:
            rows[key]["failure"] = records.failure(error)
    moved = {key: step.bytes for key, (step, _) in prepared.items()}

    def figures(key: str, ms: float) -> Row:
        return {"tbs": copied.tbs(ms) if key == COPY else round(moved[key] / ms / 1e9, 6)}

    add_times(rows, contenders, plan, figures)
    add_share(rows.values(), rows[COPY])
    for peer in peers.values():
        peer.release()
    return list(rows.values())


def _keys(step: DecodeStep) -> Row:
    even = len(set(step.lengths)) == 1
    return {
        "variant": step.variant,
        **step.shape.sizes,
        "L": step.q_len,
        "lengths": None if even and step.lengths[0] == step.capacity else list(step.lengths),
        "window": step.window if step.variant == "sliding_window" else None,
        "page": step.page,
        "placement": step.placement if step.page and step.placement != "random" else None,
        "dtype": "bfloat16",
        "layout": "BHLD",
    }


def line(row: Row, rows: list[Row]) -> str:
    """A row as text; times are compared with flexjax's first row."""
    sizes = (
        "" if "B" not in row else f"B{row['B']} {row['Hq']}/{row['Hkv']} S{row['S']} L{row['L']}"
    )
    extra = "".join(f" {k} {row[k]}" for k in ("page", "window") if k in row)
    extra += f" {row['placement']}" if "placement" in row else ""
    extra += f" {max(row['lengths'])} to {min(row['lengths'])}" if "lengths" in row else ""
    start = f"{row['variant']:<14} {sizes}{extra:<18} {row['peer']:<12}"
    if "failure" in row:
        return f"{start} {row['failure']}"
    text = f"{start} {row['ms']:9.4f} ms"
    if "tbs" in row:
        text += f" {row['tbs']:6.3f} TB/s"
    if "of_copy" in row:
        text += f" {100 * row['of_copy']:5.1f}% of copy"
    first = next((r for r in rows if r["peer"] == "flexjax" and "ms" in r), None)
    return text if first is None or "B" not in row else f"{text} x{row['ms'] / first['ms']:.3f}"


# -- the host ---------------------------------------------------------------------------------------


def host_rows(quick: bool) -> list[Row]:
    """Milliseconds that the host takes for a call, the device being idle: the least of several turns."""
    batch, heads, dim = 4, 8, 128
    query = jnp.ones((batch, heads, 1, dim), jnp.bfloat16)

    def step(cache: Any, query: Any) -> Any:
        cache = cache.append(query, query)
        return cache, decode(query, cache)

    def empty(cache: Any, query: Any) -> Any:
        return cache, query

    rows = []
    for name, function in (("decode_step", step), ("empty", empty)):
        capacity = 8192
        cache = KVCache.empty(batch, heads, capacity, dim)
        compiled = jax.jit(function, donate_argnums=0)
        cache, out = compiled(cache, query)
        jax.block_until_ready((cache, out))
        best = float("inf")
        calls = 5 if quick else _HOST_CALLS
        for _ in range(3 if quick else 5):
            start = time.perf_counter()
            for _ in range(calls):
                cache, out = compiled(cache, query)
            best = min(best, (time.perf_counter() - start) / calls)
            jax.block_until_ready((cache, out))
        rows.append({"peer": "flexjax", "variant": name, "ms": round(1e3 * best, 5)})
    return rows
