"""A program: strangers who flood a gateway from nineteen addresses, as fast as it and their share allow.

    python attackers.py PORT KEY

Until it is told to end, it keeps 5,000 idle connections and 500 half-done handshakes open, sends 200
bodies of a gigabyte after TLS without a claim, and claims a key that nobody knows. Then it prints what it
counted as JSON.
"""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import ssl
import sys
from collections import Counter
from pathlib import Path

from fedloom.deployment import handshake
from fedloom.security.keys import read_key

SOURCES = itertools.cycle([f"127.0.0.{last}" for last in range(2, 21)])
COUNTS = Counter()
GIGABYTE = 1 << 30


def trusting():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def hello():
    """The first bytes of a handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    own = trusting().wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        own.do_handshake()
    return outgoing.read()


async def connect(port, tls=None):
    COUNTS["connections"] += 1
    return await asyncio.open_connection(
        "127.0.0.1", port, ssl=tls, local_addr=(next(SOURCES), 0),
        ssl_handshake_timeout=20 if tls else None,
    )  # fmt: skip


async def idle(port):
    _, writer = await connect(port)
    try:
        await asyncio.sleep(random.uniform(5, 60))
    finally:
        writer.close()


async def slow(port):
    reader, writer = await connect(port)
    try:
        COUNTS["handshakes"] += 1
        for byte in HELLO:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.5)
            if reader.at_eof() or writer.transport.is_closing():
                return
    finally:
        writer.close()


async def body(port):
    reader, writer = await connect(port, TLS)
    try:
        COUNTS["handshakes"] += 1
        head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % GIGABYTE)
        for _ in range(GIGABYTE >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            await asyncio.sleep(0)
            if reader.at_eof() or writer.transport.is_closing():
                return
            COUNTS["body bytes"] += 1 << 16
    finally:
        writer.transport.abort()


async def wrong(port):
    reader, writer = await connect(port, TLS)
    try:
        COUNTS["handshakes"] += 1
        greeting = await reader.readexactly(handshake.SERVER_NONCE_FRAME)
        writer.write(
            handshake.make_claim(KEY, greeting[-handshake.NONCE :], b"", "fleet", "a" * 32)
        )
        await reader.read(2000)
        COUNTS["claims"] += 1
    finally:
        writer.close()


async def again(attack, port):
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            await attack(port)
        await asyncio.sleep(random.uniform(0, 0.2))


async def main(port):
    attacks = {idle: 5000, slow: 500, body: 200, wrong: 20}
    tasks = [
        asyncio.create_task(again(attack, port)) for attack, n in attacks.items() for _ in range(n)
    ]
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("attacking", flush=True)
    await ended.wait()
    print(json.dumps(COUNTS), flush=True)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    KEY, TLS, HELLO = read_key(Path(sys.argv[2])), trusting(), hello()
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000), hard))
    asyncio.run(main(int(sys.argv[1])))
