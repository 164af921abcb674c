"""Measure this machine's loopback between two processes, for ``hardware_profiles/fabrics/cpu-loopback.yaml``.

Run as ``python tools/loopback.py``: half a round trip of 64 bytes, and bytes per second of a long stream, medians over TCP.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time

TRIPS, BLOCK, BLOCKS, RUNS = 2000, 2**20, 512, 7


def receive(link: socket.socket, size: int) -> None:
    """Read `size` bytes."""
    while size:
        size -= len(link.recv(min(size, BLOCK)))


def answer(port: int) -> None:
    """Send back every short message, then swallow the streams and acknowledge each."""
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TRIPS):
            receive(link, 64)
            link.sendall(bytes(64))
        for _ in range(RUNS):
            receive(link, BLOCK * BLOCKS)
            link.sendall(bytes(1))


def main() -> None:
    """Print latency and bandwidth."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = multiprocessing.Process(target=answer, args=(server.getsockname()[1],))
        other.start()
        link, _ = server.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trips, rates, block = [], [], bytes(BLOCK)
    for _ in range(TRIPS):
        begin = time.perf_counter()
        link.sendall(bytes(64))
        receive(link, 64)
        trips.append(time.perf_counter() - begin)
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(BLOCKS):
            link.sendall(block)
        receive(link, 1)
        rates.append(BLOCK * BLOCKS / (time.perf_counter() - begin))
    other.join()
    print(f"64 bytes one way: {statistics.median(trips) / 2 * 1e6:.1f} us; stream: {statistics.median(rates) / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
