"""NIXL's interface over Linux' process_vm_readv: one process reads another one's memory.

NIXL's wheels are for CUDA and none of our dependencies. vLLM's connector runs as it is, handshake
and notifications included; only the transport is another. ``install`` puts it in NIXL's place.
"""

import ctypes
import json
import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import zmq

_LIBC = ctypes.CDLL(None, use_errno=True)
LOCAL = "NIXL_INIT_AGENT"


class _Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class ProcessMemoryAgent:
    """``nixl.nixl_agent`` as far as vLLM's NixlConnector calls it on CPUs.

    ``bytes_read`` is the sum of what the agents of this process have read.
    """

    bytes_read = 0

    def __init__(self, name: str, config: Any = None) -> None:
        self.name = name
        self._inbox = zmq.Context.instance().socket(zmq.PULL)
        self._port = self._inbox.bind_to_random_port("tcp://127.0.0.1")
        self._peers: dict[str, Any] = {}
        self._lists: list[tuple[int, np.ndarray]] = []
        self._transfers: list[dict[str, Any]] = []

    def get_agent_metadata(self) -> bytes:
        return json.dumps([self.name, os.getpid(), self._port]).encode()

    def add_remote_agent(self, metadata: bytes) -> str:
        name, pid, port = json.loads(metadata)
        outbox = zmq.Context.instance().socket(zmq.PUSH)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.connect(f"tcp://127.0.0.1:{port}")
        self._peers[name] = SimpleNamespace(pid=pid, outbox=outbox)
        return str(name)

    def check_remote_metadata(self, name: str) -> bool:
        return name in self._peers

    def remove_remote_agent(self, name: str) -> None:
        self._peers.pop(name).outbox.close()

    def get_reg_descs(self, ranges: Any, memory: str) -> Any:
        return ranges

    def register_memory(self, ranges: Any, backends: Any) -> None: ...

    def deregister_memory(self, ranges: Any) -> None: ...

    def get_xfer_descs(self, pieces: Any, memory: str) -> np.ndarray:
        assert memory == "DRAM"
        return np.asarray(pieces)  # [num_pieces, 3]: address, length, device

    def prep_xfer_dlist(self, name: str, pieces: np.ndarray) -> int:
        self._lists.append((os.getpid() if name == LOCAL else self._peers[name].pid, pieces))
        return len(self._lists) - 1

    def release_dlist_handle(self, handle: int) -> None: ...

    def make_prepped_xfer(
        self, kind: str, local: int, to: Any, remote: int, source: Any, notif_msg: bytes
    ) -> int:
        assert kind == "READ"
        (_, targets), (pid, sources) = self._lists[local], self._lists[remote]
        move = {"pid": pid, "to": targets[to], "from": sources[source], "message": notif_msg}
        self._transfers.append(move)
        return len(self._transfers) - 1

    def transfer(self, handle: int) -> None:
        move = self._transfers[handle]
        is_whole = all(
            _read(move["pid"], int(source[0]), int(target[0]), int(target[1]))
            for target, source in zip(move["to"], move["from"], strict=True)
        )
        move["state"] = "DONE" if is_whole else "ERR"
        if is_whole:
            ProcessMemoryAgent.bytes_read += int(move["to"][:, 1].sum())
            (peer,) = (p for p in self._peers.values() if p.pid == move["pid"])
            peer.outbox.send_json([self.name, move["message"].decode()])

    def check_xfer_state(self, handle: int) -> str:
        return str(self._transfers[handle]["state"])

    def get_xfer_telemetry(self, handle: int) -> None: ...

    def release_xfer_handle(self, handle: int) -> None: ...

    def send_notif(self, name: str, notif_msg: bytes) -> None:
        self._peers[name].outbox.send_json([self.name, notif_msg.decode()])

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        found = defaultdict(list)
        while self._inbox.poll(0):
            name, message = self._inbox.recv_json()
            found[name].append(message.encode())
        return found


def _read(pid: int, source: int, target: int, length: int) -> bool:
    here, there = _Piece(target, length), _Piece(source, length)
    done = _LIBC.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return bool(done == length)


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Take NIXL's place in this process, and leave its cores alone: vLLM's worker would pin itself
    to the last one. ``put`` is ``setattr``, or a test's, which is undone.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    put(base_worker, "NixlWrapper", ProcessMemoryAgent)
    put(base_worker, "nixl_agent_config", None)
    put(os, "sched_setaffinity", lambda pid, cores: None)
