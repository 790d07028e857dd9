"""A network of two places and a cable, made of network namespaces, for faults of the network. Needs root.

A thread stands in one place: sockets that it opens, threads and processes that it starts belong there. Unix sockets
know no places, so a DSN of one always leads to the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

CLONE_NEWNET = 0x40000000
CLIENT_ADDRESS, SERVER_ADDRESS = "10.77.0.1", "10.77.0.2"
CABLE = "cable"

_numbers = itertools.count(1)


class Network:
    """Two places, `client` and `server`, and a cable. port: the one that faults strike, at the server's end."""

    def __init__(self, port: int) -> None:
        self._port = port
        suffix = f"{os.getpid()}-{next(_numbers)}"
        self.client, self.server = f"pgchan-client-{suffix}", f"pgchan-server-{suffix}"

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("no root: a network cannot be made")
        told = subprocess.run(["ip", "netns", "add", self.client], stderr=subprocess.PIPE, text=True, check=False)
        if told.returncode != 0:
            pytest.skip(f"no root that may make a network: {told.stderr.strip()}")
        _run("ip", "netns", "add", self.server)
        far_end = ("peer", "name", CABLE, "netns", self.server)
        _run("ip", "link", "add", CABLE, "netns", self.client, "type", "veth", *far_end)
        for place, address in ((self.client, CLIENT_ADDRESS), (self.server, SERVER_ADDRESS)):
            _run("ip", "-n", place, "addr", "add", f"{address}/24", "dev", CABLE)
            _run("ip", "-n", place, "link", "set", "lo", "up")
            _run("ip", "-n", place, "link", "set", CABLE, "up")
        self.heal()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for place in (self.client, self.server):
            _run("ip", "netns", "delete", place)

    @contextlib.contextmanager
    def inside(self, place: str) -> Iterator[None]:
        """Let this thread stand in one of the places."""
        with Path("/proc/thread-self/ns/net").open() as home, Path("/run/netns", place).open() as there:
            _stand_in(there.fileno())
            try:
                yield
            finally:
                _stand_in(home.fileno())

    # -- faults, each until heal()

    def heal(self) -> None:
        """Let everything through again."""
        subprocess.run(
            ["ip", "netns", "exec", self.client, "tc", "qdisc", "delete", "dev", CABLE, "root"],
            stderr=subprocess.DEVNULL, check=False,  # there may be none
        )  # fmt: skip
        self.link(up=True)
        self._rules("flush ruleset", "add table inet faults", *(
            f"add chain inet faults {hook} {{ type filter hook {hook} priority 0; }}" for hook in ("input", "output")
        ))  # fmt: skip

    def swallow(self) -> None:
        """Drop every packet, both ways: a black hole."""
        self._both_ways("drop")

    def lose(self, percent: int) -> None:
        """Drop some packets, both ways."""
        self._both_ways(f"numgen random mod 100 < {percent} drop")

    def reset(self) -> None:
        """Answer every packet of a client with a reset."""
        self._rules(f"add rule inet faults input tcp dport {self._port} reject with tcp reset")

    def link(self, *, up: bool) -> None:
        """Plug the cable in or out."""
        _run("ip", "-n", self.client, "link", "set", CABLE, "up" if up else "down")

    def throttle(self, kilobits: int) -> None:
        """Let the client send so many kilobits a second."""
        limit = ["tbf", "rate", f"{kilobits}kbit", "burst", "4kb", "latency", "2s"]
        shape = ["ip", "netns", "exec", self.client, "tc", "qdisc", "add", "dev", CABLE, "root", *limit]
        if subprocess.run(shape, check=False).returncode != 0:  # this kernel cannot; then what is too much is dropped
            self._rules(
                f"add rule inet faults input tcp dport {self._port} limit rate over {kilobits // 8} kbytes/second drop"
            )

    def _both_ways(self, verdict: str) -> None:
        self._rules(
            f"add rule inet faults input tcp dport {self._port} {verdict}",
            f"add rule inet faults output tcp sport {self._port} {verdict}",
        )

    def _rules(self, *rules: str) -> None:
        command = ["ip", "netns", "exec", self.server, "nft", "-f", "-"]
        subprocess.run(command, input="\n".join(rules) + "\n", text=True, check=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _stand_in(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
