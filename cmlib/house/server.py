"""Jupyter servers on the loopback address: a free port, a new token, an address to open."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .process import HouseError, running, say

LOOPBACK = "127.0.0.1"


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        if os.name == "posix":  # as the server itself does, so that a port just left counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise HouseError(f"port {port} is kept for the system; choose one from 1024 up with --port") from None
        except OSError:
            return False
    return True


def choose_port(wanted: int | None, first: int) -> int:
    """The wanted port, or the first free one from ``first`` on."""
    if wanted is None:
        return next(port for port in range(first, 65536) if is_free(port))
    if not is_free(wanted):
        raise HouseError(f"port {wanted} is in use; choose another with --port, or leave --port out to get the next free one")
    return wanted


def has_screen() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a number from 1 to 65535")
    return int(text)


def server_options(command: Callable, args: list[str], *positional: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m cmlib {command.__name__}", description=command.__doc__)
    for name in positional:
        parser.add_argument(name)
    parser.add_argument("--port", type=port_number, help="the port to listen on; by default the next free one")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open no browser")
    return parser.parse_args(args)


def serve(name: str, command: list[str | Path], port: int, path: str, browser: bool) -> int:
    """Run a Jupyter server on the loopback address until it ends or Ctrl-C ends it; the token is new every time."""
    token = secrets.token_hex(24)
    quiet = [] if browser else ["--no-browser"]
    try:
        with running([*command, *quiet], JUPYTER_TOKEN=token) as server:
            wait_until_it_listens(name, server, port)
            say(f"{name} is at http://{LOOPBACK}:{port}{path}?token={token}\n       Ctrl-C ends it.")
            return server.wait()
    except KeyboardInterrupt:
        say(f"{name} has ended")
        return 0


def wait_until_it_listens(name: str, server: subprocess.Popen, port: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise HouseError(f"{name} ended while starting (exit status {server.returncode}); its words stand above")
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise HouseError(f"{name} did not answer on port {port} within {seconds:.0f} s")
