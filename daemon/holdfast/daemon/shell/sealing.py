"""Sealed chunks: which keys this worker and a peer share, and frames that only these two can make and read.

Covers the bulk mode `sealed` without its sockets. Each worker makes an X25519 key pair for its life and tells the
public half on the control plane, which is under CURVE and bound to the node's own key: whoever is let in there is whom
a chunk is sealed for, and nobody else. Each direction of a pair has a secret of its own (HKDF-SHA256 of what both
computed, bound to cluster, epoch, nodes and both public keys), and a new AES-256 key every `SEALED_PER_KEY_CHUNKS`.

A sealed chunk is two frames. The first: form, sender, count and the secret's id in the clear, then the chunk's header,
sealed with these as associated data. The second: the payload, sealed with the whole first frame as associated data.
The count is one for all that a worker ever seals, so a nonce never comes twice under a key. A receiver takes higher
counts only: what is repeated or out of order is refused before anything is decrypted. A stranger costs it no more than
a look at the first frame.

Threads: `heard` and `offer` on the loop's thread; sealing and opening on the bulk plane's.
"""

import hashlib
import itertools
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from holdfast.protocol import limits
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.frames import BulkOffer, FrameRefusedError

TAG_BYTES = 16  # what sealing adds to a frame
_FORMAT = 1
_CLEAR = struct.Struct(">BHQ8s")  # format, sender, count, id of the secret
_NONCE = struct.Struct(">IQ")  # which frame, count
_HEADER_FRAME, _PAYLOAD_FRAME = 0, 1
_CIPHERS_KEPT = 2  # of one direction: the key in use, and the one before or after it


@dataclass(slots=True)
class Secret:
    """What seals one direction between two workers.

    Attributes:
        shared: what both sides computed.
        bound_to: cluster, epoch, sender, receiver and their public keys.
        id: names it in the clear.
    """

    shared: bytes
    bound_to: bytes
    id: bytes = field(init=False)
    ciphers: dict[int, AESGCM] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = hashlib.sha256(self.bound_to).digest()[:8]

    def cipher(self, count: int) -> AESGCM:
        """The key that a chunk of this count is sealed with."""
        turn = count // limits.SEALED_PER_KEY_CHUNKS
        return self.ciphers.get(turn) or self._derive(turn)

    def used(self, count: int, cipher: AESGCM) -> None:
        """A chunk of this count was good: its key is worth keeping."""
        turn = count // limits.SEALED_PER_KEY_CHUNKS
        if turn not in self.ciphers:
            self.ciphers = dict(itertools.islice({turn: cipher, **self.ciphers}.items(), _CIPHERS_KEPT))

    def _derive(self, turn: int) -> AESGCM:
        info = b"holdfast sealed chunks" + turn.to_bytes(8, "big")
        return AESGCM(HKDF(SHA256(), length=32, salt=self.bound_to, info=info).derive(self.shared))


@dataclass(slots=True)
class Agreed:
    """What this worker has agreed with one life of a peer.

    Attributes:
        public: the peer's public key.
        outgoing, incoming: the secrets of both directions.
        confirmed: whether the peer says that it has our public key.
        count: the highest that came from it.
    """

    public: bytes
    outgoing: Secret
    incoming: Secret
    confirmed: bool = False
    count: int = 0


@dataclass(frozen=True, slots=True)
class Opening:
    """A chunk of which the first frame was good."""

    node: int
    count: int
    header: bytes
    cipher: AESGCM
    first_frame: bytes


class Sealing:
    """The keys of this worker's life, and what seals and opens under them."""

    added_bytes = TAG_BYTES  # what sealing adds to a payload

    def __init__(self, config: ClusterConfig, node: int) -> None:
        self._cluster, self._epoch, self._node = config.cluster_name, config.epoch, node
        self._names = [peer.name for peer in config.nodes]
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()
        self._agreed: dict[int, tuple[Agreed, ...]] = {}  # the life in force first
        self._counts = itertools.count(1)

    # --- agreeing, on the loop's thread ---

    def offer(self, node: int) -> BulkOffer:
        """What every message to a node says of sealing."""
        known = self._agreed.get(node)
        return BulkOffer("sealed", self.public, known[0].public if known else b"")

    def heard(self, node: int, offer: BulkOffer) -> None:
        """What a checked message says of sealing, from whom the core takes for the node.

        Raises:
            FrameRefusedError: its key is none.
        """
        lives = self._agreed.get(node, ())
        if not lives or lives[0].public != offer.key:
            life = next((life for life in lives if life.public == offer.key), None) or self._agree(node, offer.key)
            others = tuple(other for other in lives if other is not life)
            self._agreed[node] = lives = (life, *others)[: limits.SEALED_LIVES_KEPT]
        lives[0].confirmed = offer.heard == self.public

    def _agree(self, node: int, public: bytes) -> Agreed:
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise FrameRefusedError("bulk", f"the key of node {node} that seals chunks is none: {error}") from error

        def secret(sender: tuple[int, bytes], receiver: tuple[int, bytes]) -> Secret:
            numbers = struct.pack(">QHH", self._epoch, sender[0], receiver[0])
            return Secret(shared, numbers + sender[1] + receiver[1] + self._cluster.encode())

        me, peer = (self._node, self.public), (node, public)
        return Agreed(public, outgoing=secret(me, peer), incoming=secret(peer, me))

    # --- the bulk plane's thread ---

    def is_ready(self, node: int) -> bool:
        """Whether a node can open what is sealed for it now."""
        known = self._agreed.get(node)
        return known is not None and known[0].confirmed

    def seal(self, node: int, header: bytes, payload: bytes | memoryview) -> list[bytes]:
        """The two frames of a chunk, for a node that is ready."""
        secret, count = self._agreed[node][0].outgoing, next(self._counts)
        cipher = secret.cipher(count)
        secret.used(count, cipher)
        clear = _CLEAR.pack(_FORMAT, self._node, count, secret.id)
        first = clear + cipher.encrypt(_NONCE.pack(_HEADER_FRAME, count), header, clear)
        return [first, cipher.encrypt(_NONCE.pack(_PAYLOAD_FRAME, count), payload, first)]

    def open_first(self, frame: bytes) -> Opening:
        """Open the first frame of a chunk. It buys one try at its payload: its count is used from now on.

        Raises:
            FrameRefusedError: from a stranger, replayed, changed, or under another key.
        """
        if not _CLEAR.size + TAG_BYTES < len(frame) <= _CLEAR.size + TAG_BYTES + limits.BULK_HEADER_BYTES_MAX:
            raise FrameRefusedError("malformed", f"expected a sealed header, found {len(frame)} bytes")
        clear = frame[: _CLEAR.size]
        form, node, count, secret_id = _CLEAR.unpack(clear)
        if form != _FORMAT:
            raise FrameRefusedError("malformed", f"expected a sealed header of form {_FORMAT}, found form {form}")
        lives = self._agreed.get(node)
        if lives is None:
            raise FrameRefusedError("key", f"no key is agreed with {self._name_of(node)}: a stranger, or too early")
        life = lives[0]
        if secret_id != life.incoming.id:
            whose = "one of its earlier lives" if any(secret_id == old.incoming.id for old in lives) else "nobody"
            text = f"expected the key agreed with {self._name_of(node)}, found that of {whose}"
            raise FrameRefusedError("key", text)
        if count <= life.count:
            text = f"expected a count above {life.count} from {self._name_of(node)}, found {count}"
            raise FrameRefusedError("replayed", f"{text}: replayed or out of order")
        cipher = life.incoming.cipher(count)
        try:
            header = cipher.decrypt(_NONCE.pack(_HEADER_FRAME, count), frame[_CLEAR.size :], clear)
        except InvalidTag:
            text = f"a header from {self._name_of(node)} is not what was sealed: forged, or changed on the way"
            raise FrameRefusedError("forged", text) from None
        life.count = count
        life.incoming.used(count, cipher)
        return Opening(node, count, header, cipher, frame)

    def open_second(self, opening: Opening, frame: bytes | memoryview) -> bytes:
        """Open the payload that belongs to a first frame.

        Raises:
            FrameRefusedError: it was changed, or belongs to another.
        """
        try:
            return opening.cipher.decrypt(_NONCE.pack(_PAYLOAD_FRAME, opening.count), frame, opening.first_frame)
        except InvalidTag:
            text = f"the bytes of a chunk from {self._name_of(opening.node)} are not what was sealed"
            raise FrameRefusedError("changed", f"{text}: changed on the way, or of another chunk") from None

    def _name_of(self, node: int) -> str:
        return f"node {self._names[node]}" if node < len(self._names) else f"node index {node}, which is not ours"
