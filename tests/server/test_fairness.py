"""Clients that send as fast as they can do not keep others waiting."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx
import pytest

HEAD = b"%s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
FLOODS = {
    "chunks": (HEAD % b"POST /v1/completions" + b"transfer-encoding: chunked\r\n\r\n", b"6\r\n      \r\n" * 6000),
    "pipeline": (b"", (HEAD % b"GET /health" + b"\r\n") * 1000),
    "bodies": (HEAD % b"POST /v1/completions" + b"content-length: 4000000\r\n\r\n", b" " * 65536),
    "heads": (HEAD % b"GET /health", b"x: " + b"y" * 997 + b"\r\n"),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_does_not_keep_others_waiting(real_server: Any, flood: str) -> None:
    head, more = FLOODS[flood]
    address = ("127.0.0.1", int(real_server.url.rpartition(":")[2]))
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            try:
                with socket.create_connection(address, 5) as sock:
                    sock.settimeout(1)
                    sock.sendall(head)
                    while not over.is_set():
                        sock.sendall(more)
            except OSError:
                time.sleep(0.01)

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    waits = []
    try:
        time.sleep(0.5)
        for _ in range(5):
            begun = time.monotonic()
            assert httpx.get(real_server.url + "/health", timeout=10).status_code == 200
            waits.append(time.monotonic() - begun)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert sorted(waits)[2] < 3.0  # a median, and generous: our own threads wait for each other too
