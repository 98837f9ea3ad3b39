"""Sealed chunks: two workers that agreed read each other; whoever else tries gets nothing, and words of its own."""

import sys
from dataclasses import replace

import pytest
from holdfast.daemon.shell import sealing
from holdfast.daemon.shell.bulk import sealing_of
from holdfast.daemon.shell.sealing import Sealing
from holdfast.protocol import limits
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.frames import BulkOffer, FrameRefusedError
from hypothesis import given
from hypothesis import strategies as st

NODES = tuple(NodeConfig(name=name, host="127.0.0.1", port=7400 + i, domain=name) for i, name in enumerate("abc"))
CONFIG = ClusterConfig(cluster_name="lab", nodes=NODES, parity=1, keys_dir="/keys", bulk_mode="sealed")
PAYLOAD = bytes(range(256)) * 16


def introduce(*pairs: tuple[int, Sealing]) -> None:
    """Let all hear each other until each knows that it was heard."""
    for _ in range(2):
        for me, mine in pairs:
            for other, theirs in pairs:
                if other != me:
                    theirs.heard(me, mine.offer(other))


def pair(config: ClusterConfig = CONFIG) -> tuple[Sealing, Sealing]:
    a, b = Sealing(config, 0), Sealing(config, 1)
    introduce((0, a), (1, b))
    return a, b


def read(receiver: Sealing, frames: list[bytes]) -> tuple[int, bytes, bytes]:
    opening = receiver.open_first(frames[0])
    return opening.node, opening.header, receiver.open_second(opening, frames[1])


def refusal(receiver: Sealing, frames: list[bytes]) -> FrameRefusedError:
    with pytest.raises(FrameRefusedError) as caught:
        read(receiver, frames)
    return caught.value


def test_what_one_seals_the_other_reads_and_nobody_sees_it_on_the_way() -> None:
    a, b = pair()
    there, back = a.seal(1, b"header", PAYLOAD), b.seal(0, b"other", PAYLOAD)
    assert read(b, there) == (0, b"header", PAYLOAD)
    assert read(a, back) == (1, b"other", PAYLOAD)
    assert len(there[1]) == len(PAYLOAD) + sealing.TAG_BYTES
    for frames in (there, back):
        assert not any(PAYLOAD[:16] in frame or b"header" in frame or b"other" in frame for frame in frames)


def test_it_waits_until_the_other_says_that_it_has_the_key() -> None:
    a, b = Sealing(CONFIG, 0), Sealing(CONFIG, 1)
    a.heard(1, b.offer(0))  # b has not heard a yet
    assert not a.is_ready(1)
    b.heard(0, a.offer(1))
    a.heard(1, b.offer(0))
    assert a.is_ready(1)
    a.heard(1, Sealing(CONFIG, 1).offer(0))  # another worker of b's: it begins anew
    assert not a.is_ready(1)
    assert not a.is_ready(2)


def test_the_same_bytes_are_never_sealed_alike() -> None:
    a, b = pair()
    c = Sealing(CONFIG, 2)
    introduce((0, a), (1, b), (2, c))
    sealed = [a.seal(node, b"header", PAYLOAD) for node in (1, 1, 2, 2)]
    assert len({frames[0] for frames in sealed}) == len({frames[1] for frames in sealed}) == 4
    counts = [int.from_bytes(frames[0][3:11], "big") for frames in sealed]
    assert counts == [1, 2, 3, 4]  # one count for all peers


def test_a_peers_key_that_comes_and_goes_brings_no_count_back() -> None:
    """A late message of a worker that ended makes its key the one in force again: neither side may begin anew."""
    a, b = pair()
    first = a.seal(1, b"header", PAYLOAD)
    read(b, first)
    late, again = Sealing(CONFIG, 1), b.offer(0)
    a.heard(1, late.offer(0))
    a.heard(1, again)
    second = a.seal(1, b"header", PAYLOAD)
    assert second != first
    old_offer = a.offer(1)
    b.heard(0, Sealing(CONFIG, 0).offer(1))
    b.heard(0, old_offer)
    assert refusal(b, first).code == "replayed"
    assert read(b, second) == (0, b"header", PAYLOAD)


def test_lives_kept_are_bounded() -> None:
    a, _ = pair()
    for _ in range(20):
        a.heard(1, Sealing(CONFIG, 1).offer(0))
    assert len(a._agreed[1]) == limits.SEALED_LIVES_KEPT


def test_a_replayed_chunk_is_refused() -> None:
    a, b = pair()
    frames = a.seal(1, b"header", PAYLOAD)
    read(b, frames)
    again = refusal(b, frames)
    assert again.code == "replayed"
    assert "expected a count above 1 from node a, found 1: replayed or out of order" in again.text


def test_chunks_out_of_order_are_refused_and_lost_ones_are_not_missed() -> None:
    a, b = pair()
    first, lost, third = (a.seal(1, f"{number}".encode(), PAYLOAD) for number in range(3))
    assert read(b, first)[1] == b"0"
    assert read(b, third)[1] == b"2"
    assert refusal(b, lost).code == "replayed"


@given(bit=st.integers(min_value=0), second=st.booleans())
def test_a_bit_flipped_anywhere_is_refused(bit: int, second: bool) -> None:
    a, b = pair()
    frames = a.seal(1, b"header", PAYLOAD)
    changed = bytearray(frames[second])
    bit %= len(changed) * 8
    changed[bit // 8] ^= 1 << (bit % 8)
    frames[second] = bytes(changed)
    refused = refusal(b, frames)
    if second:
        assert refused.code == "changed"
        assert "changed on the way" in refused.text
    else:
        assert refused.code in {"malformed", "key", "forged", "replayed"}
        assert read(b, a.seal(1, b"next", PAYLOAD))[1] == b"next"  # what was refused used no count up


@given(kept=st.integers(min_value=0, max_value=60))
def test_half_a_header_is_refused(kept: int) -> None:
    a, b = pair()
    frames = a.seal(1, b"header", PAYLOAD)
    kept = min(kept, len(frames[0]) - 1)
    assert refusal(b, [frames[0][:kept], frames[1]]).code in {"malformed", "forged"}


def test_half_a_payload_and_one_of_another_chunk_are_refused() -> None:
    a, b = pair()
    frames = [a.seal(1, b"header", PAYLOAD) for _ in range(3)]
    assert refusal(b, [frames[0][0], frames[0][1][:-1]]).code == "changed"
    assert refusal(b, [frames[1][0], frames[2][1]]).code == "changed"


def test_a_header_buys_one_try() -> None:
    """Whoever repeats a good header before a payload of his own makes nobody decrypt twice."""
    a, b = pair()
    frames = a.seal(1, b"header", PAYLOAD)
    assert refusal(b, [frames[0], bytes(len(frames[1]))]).code == "changed"
    assert refusal(b, frames).code == "replayed"


def test_strangers_are_refused_by_name() -> None:
    a, b = pair()
    nobody = Sealing(CONFIG, 2)
    nobody.heard(1, BulkOffer("sealed", b.public, nobody.public))  # it claims to be heard; b never heard of it
    unheard = refusal(b, nobody.seal(1, b"header", PAYLOAD))
    assert (unheard.code, unheard.text) == ("key", "no key is agreed with node c: a stranger, or too early")
    impostor = Sealing(CONFIG, 0)  # another key under a node's number
    impostor.heard(1, BulkOffer("sealed", b.public, impostor.public))
    assert "found that of nobody" in refusal(b, impostor.seal(1, b"header", PAYLOAD)).text
    frames = a.seal(1, b"header", PAYLOAD)
    beyond = frames[0][:1] + (77).to_bytes(2, "big") + frames[0][3:]
    assert "node index 77, which is not ours" in refusal(b, [beyond, frames[1]]).text
    assert refusal(b, [bytes(600), PAYLOAD]).code == "malformed"


def test_an_earlier_life_is_told_from_a_stranger() -> None:
    a, b = pair()
    frames = a.seal(1, b"header", PAYLOAD)
    b.heard(0, Sealing(CONFIG, 0).offer(1))
    assert "found that of one of its earlier lives" in refusal(b, frames).text


@pytest.mark.parametrize(
    "other", [replace(CONFIG, cluster_name="elsewhere"), replace(CONFIG, epoch=2)], ids=["cluster", "epoch"]
)
def test_keys_belong_to_a_cluster_and_epoch(other: ClusterConfig) -> None:
    a, b = Sealing(CONFIG, 0), Sealing(other, 1)
    introduce((0, a), (1, b))
    assert refusal(b, a.seal(1, b"header", PAYLOAD)).code == "key"


def test_each_direction_has_a_secret_of_its_own() -> None:
    a, _ = pair()
    sent = a.seal(1, b"header", PAYLOAD)
    mirrored = sent[0][:1] + (1).to_bytes(2, "big") + sent[0][3:]  # given back to a, as if b had sent it
    assert refusal(a, [mirrored, sent[1]]).code == "key"


def test_a_key_serves_so_many_chunks_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEALED_PER_KEY_CHUNKS", 4)
    a, b = pair()
    for number in range(40):
        assert read(b, a.seal(1, f"{number}".encode(), PAYLOAD))[1] == f"{number}".encode()
    for secret in (a._agreed[1][0].outgoing, b._agreed[0][0].incoming):
        assert sorted(secret.ciphers) == [9, 10]


@pytest.mark.parametrize("key", [b"", b"short", bytes(32)], ids=["none", "short", "zero"])
def test_a_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(FrameRefusedError, match="the key of node 1 that seals chunks is none"):
        Sealing(CONFIG, 0).heard(1, BulkOffer("sealed", key))


def test_without_its_package_sealing_is_refused_and_digests_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "holdfast.daemon.shell.sealing", None)
    with pytest.raises(
        OperatorError, match=r"security.bulk: expected the package cryptography.*holdfast\[sealed\]"
    ) as refused:
        sealing_of(CONFIG, 0)
    assert refused.value.exit_code is ExitCode.USAGE
    assert sealing_of(replace(CONFIG, bulk_mode="digest"), 0) is None
