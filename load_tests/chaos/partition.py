"""A network cut between two processes of this machine: packets between them are dropped, and nobody is told.

    with cut(client_pid, server_pid, port): ...

Each end of every connection from the client to the server's `port` gets a socket filter that drops whatever arrives, so
does the server's listening socket: no new connection comes to be. Afterwards all is as before; TCP sends again what was
lost, if both still want it. Needs no network namespace and no rule of a firewall, only the right to borrow a descriptor
of the other process (pidfd_getfd), which an ancestor has unless the system forbids it (Yama). Linux only.

Connections from anybody else to `port` live on, and new ones of theirs wait until the cut is over.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

_PIDFD_GETFD = 438
"""The system call's number, on every architecture."""
_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
"""BPF: return 0, that is keep no byte of the packet."""
_LISTEN = "0A"
_libc = ctypes.CDLL(None, use_errno=True)


class _Socket(NamedTuple):
    local_port: int
    remote_port: int
    is_listening: bool
    inode: str


@contextmanager
def cut(client_pid: int, server_pid: int, port: int) -> Iterator[int]:
    """Drop all packets between the two for the scope; yield how many connections that concerns.

    Raises OSError if the system does not let us, LookupError if they are not connected.
    """
    # Twice, and each once: the kernel's table may leave one out, or have it twice, while it changes.
    sockets = list({each.inode: each for each in (*_sockets(), *_sockets())}.values())
    ours, theirs = _descriptors(client_pid), _descriptors(server_pid)
    client_ends = [each for each in sockets if each.remote_port == port and each.inode in ours]
    ports = {each.local_port for each in client_ends}
    server_ends = [
        each
        for each in sockets
        if each.local_port == port and each.inode in theirs and (each.is_listening or each.remote_port in ports)
    ]
    if not client_ends:
        raise LookupError(f"process {client_pid} has no connection to port {port}")
    with ExitStack() as borrowed:
        for pid, descriptors, ends in ((client_pid, ours, client_ends), (server_pid, theirs, server_ends)):
            for end in ends:
                borrowed.enter_context(_deaf(pid, descriptors[end.inode]))
        yield len(client_ends)


@contextmanager
def _deaf(pid: int, descriptor: int) -> Iterator[None]:
    """Have another process's socket drop what arrives, for the scope."""
    with _borrow(pid, descriptor) as end:
        program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
        end.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
        try:
            yield
        finally:
            end.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)


def _borrow(pid: int, descriptor: int) -> socket.socket:
    """Return a socket of another process, the same one."""
    process = os.pidfd_open(pid)
    try:
        copy = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
        if copy < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"descriptor {descriptor} of process {pid}: {os.strerror(number)}")
    finally:
        os.close(process)
    return socket.socket(fileno=copy)


def _descriptors(pid: int) -> dict[str, int]:
    """Return the sockets of a process, by their inodes."""
    found = {}
    for link in (Path("/proc") / str(pid) / "fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found[target[len("socket:[") : -1]] = int(link.name)
    return found


def _sockets() -> Iterator[_Socket]:
    """Yield the TCP sockets of this machine. gRPC serves IPv4 with sockets of IPv6, too."""
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/self/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            yield _Socket(local, remote, fields[3] == _LISTEN, fields[9])
