"""Sealed chunks: the two frames of one, and the keys that peers say they have, as the bulk plane hears them."""

import random
import struct

from fuzz.local_surfaces import RENEW_INPUTS, timed
from fuzz.mutation import Mutator
from fuzz.surface import Surface
from holdfast.daemon.shell.sealing import Sealing
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.frames import BulkOffer, FrameRefusedError

NODES = tuple(NodeConfig(name=name, host="127.0.0.1", port=7400 + i, domain=name) for i, name in enumerate("abc"))
CONFIG = ClusterConfig(cluster_name="lab", nodes=NODES, parity=1, keys_dir="/keys", bulk_mode="sealed")
LENGTH = struct.Struct("<H")  # of the first frame, before both in one input


class Sealed(Surface):
    """Node 1 hears; node 0 has sealed, or nobody has."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("sealed chunks", draw)
        self.spoil = Mutator(draw)
        self.count = 0
        self._renew()

    def _renew(self) -> None:
        self.sender, self.hearer = Sealing(CONFIG, 0), Sealing(CONFIG, 1)
        for _ in range(2):
            self.hearer.heard(0, self.sender.offer(1))
            self.sender.heard(1, self.hearer.offer(0))

    def make(self) -> bytes:
        first, second = self.sender.seal(1, b"a header of a chunk", self.draw.randbytes(64))
        match self.draw.randrange(6):
            case 0:
                pass
            case 1:
                second = self.spoil.cut(second, (first,))
            case _:
                first = self.spoil.cut(first, (second,))[:60_000]
        return LENGTH.pack(len(first)) + first + second

    def feed(self, made: bytes) -> str:
        self.count += 1
        if self.count % RENEW_INPUTS == 0:
            self._renew()
        (length,) = LENGTH.unpack_from(made)
        first, second = made[LENGTH.size : LENGTH.size + length], made[LENGTH.size + length :]
        with timed(self):
            try:
                if self.draw.random() < 0.1:  # a peer of whom nothing was heard tells a key
                    self.hearer.heard(2, BulkOffer("sealed", first[:32], second[:32]))
                self.hearer.open_second(self.hearer.open_first(first), second)
            except FrameRefusedError as refusal:
                return refusal.code
        return ""
