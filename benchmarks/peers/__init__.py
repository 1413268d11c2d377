"""The implementations of attention that are compared, by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.peers.base import Case as Case
from benchmarks.peers.base import Contender as Contender
from benchmarks.peers.base import Options as Options
from benchmarks.peers.base import Peer as Peer
from benchmarks.peers.fa3 import FlashAttention3
from benchmarks.peers.flexjax_base import FlexjaxBase
from benchmarks.peers.flexjax_peer import Flexjax
from benchmarks.peers.jax_cudnn import JaxNn
from benchmarks.peers.tokamax_peer import Tokamax
from benchmarks.peers.torch_flex import TorchFlex
from benchmarks.peers.torch_sdpa import TorchSdpa

FOLDER_VARIABLE = "FLEXJAX_PEERS"

_MAKERS = {
    "flexjax+captures": lambda: Flexjax(captures=True),
    "torch_flex": TorchFlex,
    "torch_flex_autotuned": lambda: TorchFlex(autotuned=True),
    "torch_cudnn": lambda: TorchSdpa("cudnn"),
    "torch_fa2": lambda: TorchSdpa("fa2"),
    "jax_cudnn": lambda: JaxNn("cudnn"),
    "jax_xla": lambda: JaxNn("xla"),
    "tokamax": Tokamax,
    "fa3": FlashAttention3,
}
NAMES = ("flexjax", "flexjax/BACKEND", "flexjax@COMMIT", *_MAKERS)

# jax_xla holds the score matrix, torch_flex_autotuned compiles for minutes and torch_fa2 is never the best:
# they run where they are named.
DEFAULT_ON_GPU = ("flexjax", "torch_flex", "fa3", "jax_cudnn", "torch_cudnn", "tokamax")
DEFAULT_ON_CPU = ("flexjax", "jax_xla")


def make_peer(name: str) -> Peer:
    """The peer called `name`.

    Raises:
        ValueError: there is none.
    """
    package, at, version = name.partition("@")
    if package == "flexjax" and at:
        return FlexjaxBase(version)
    base, _, backend = name.partition("/")
    if base == "flexjax":
        return Flexjax(backend or None)
    if name not in _MAKERS:
        raise ValueError(f"There is no peer {name!r}. Choose from {', '.join(NAMES)}.")
    return _MAKERS[name]()


def base_name(base: str | None) -> list[str]:
    """The name, in a list, of the peer that is another version of flexjax; an empty list for None."""
    return [] if base is None else [f"flexjax@{base}"]


def add_peers_folder() -> None:
    """Makes the packages in the folder that FLEXJAX_PEERS names importable."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        places = (Path(folder), Path(folder, "stubs"), Path(folder, "site"))
        # Behind the installed packages: the folder adds peers and replaces nothing.
        sys.path.extend(str(place.resolve()) for place in places if place.is_dir())


def partition(names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """(the named peers that can run here, why each of the others cannot)."""
    add_peers_folder()
    able, reasons = [], {}
    for name in names:
        peer = make_peer(name)
        reason = peer.missing()
        if reason is None:
            able.append(peer)
        else:
            reasons[name] = reason
    return able, reasons
