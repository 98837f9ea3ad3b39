"""Every named limit of the conversation between processes, with its unit and its reason.

Relations between limits are asserted at the end, so that a change which breaks one fails at import.
"""

PROTOCOL_VERSION = 1  # raised when an old peer could misread a message; peers of another version are refused by name

CONTROL_FRAME_BYTES_MAX = 1 << 20  # a layout of 32,768 ranks fits; what is larger is refused before it is decoded
STATUS_BYTES_MAX = CONTROL_FRAME_BYTES_MAX - (64 << 10)  # rows of nodes are left out beyond: 1,600 of one job fit
DIGESTS_PER_MESSAGE_MAX = 4096  # 32 KiB of digests: one message never delays a heartbeat for long
BULK_HEADER_BYTES_MAX = 512  # job name, ids and a tag
BULK_KEY_BYTES = 32  # an X25519 public key
SEALED_PER_KEY_CHUNKS = 1 << 16  # of 16 MiB they keep AES-GCM's margin at what TLS asks for (2^-57)
SEALED_LIVES_KEPT = 4  # of a peer, whose chunks are not taken twice, should its key come and go
WORLD_SIZE_MAX = 32768  # ranks of one job; bounded by the layout's message size
NODE_COUNT_MAX = 4096  # nodes of one cluster; bounded by the collector's heartbeat load
JOB_COUNT_MAX = 16  # jobs on one cluster at once; each has its own slots and credits
STEP_MAX = 1 << 62  # fits a signed 64-bit integer everywhere
TIME_S_MAX = 1e10  # of any time that is told: three hundred years; what is longer, or no number, is refused
AGE_S_MAX = 1e9  # that is believed of what others tell, so that it can grow here and still be told
STEP_S_MIN = 1e-6  # of a training step; what is shorter was not measured
TEXT_CHARS_MAX = 4096  # reasons and names inside messages

FORGOTTEN_KEPT = 64  # names of jobs that a node remembers to have forgotten: word of them may still be on its way
SLOTS_COUNT_MAX = 64  # of one job on one node: so many of its snapshots can be held, be open, or have facts at once
PAUSES_KEPT_COUNT = 8  # questions what to restore for which a node may commit nothing of one job at once
GIVEN_UP_KEPT = 8  # given-up snapshots repeated in heartbeats; slots bound how many can be open
LAYOUTS_KEPT = 4  # layouts of a job that a node remembers: the newest plan and those of snapshots still held

GROUP_CHUNKS_MAX = 1 << 22  # data chunks of one group in one snapshot: 4 TiB with the default chunk, 32 MiB of table
CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 16 << 20
CHUNK_CREDITS = 4  # chunks sent to one peer and not yet acknowledged, per snapshot; 2 to 8 measured flat
REBUILD_RETRY_S = 5.0  # between two tries of a rebuild that could not go on, as long as it is worth it
CHUNK_RETRIES_MAX = 5  # sendings of one chunk that failed its digest or its deadline before the snapshot is given up
SCRUB_BATCH_CHUNKS = 16  # resting chunks re-read in one go: a repair never waits longer for its turn
AGREEMENT_STRIPES_MAX = 32  # stripes compared at once: bounds the 256 bytes per chunk that are kept
REPAIR_RETRY_S = 2.0  # between two tries to repair a chunk whose stripe lacks too many others
READ_RANGE_BYTES_MAX = 64 << 20  # one read of a client: bounds the memory lent for it
RANGES_PER_CLIENT_COUNT_MAX = 2  # one is copied while the next is fetched
RANGE_COUNT_MAX = 16  # on one node, over all clients: with the above, the memory that reads may take in all
SUMS_OPEN_BYTES = 32 << 20  # chunks asked for and not yet here, per reader or rebuild; survivors hold k - 1 times that
SUM_CHUNKS_MIN = 4  # the same in chunks, where chunks are large
SUM_CHUNKS_MAX = 64  # the same in chunks, where they are small
SUMS_HELD_COUNT_MAX = 1024  # sums in which one node has a part, for all who asked; more are refused and asked for again
SUMS_PER_MESSAGE_COUNT_MAX = 64  # parts of sums ordered by one message
SUM_TRIES_COUNT_MAX = 16  # plans for one chunk before it counts as not to be had
GROUP_NODES_COUNT_MAX = 255  # members of one group: the code has no more
ESTATES_HELD_COUNT_MAX = 2  # of one job on one node: one in force, and its successor until all heirs have that
MIX_CHUNKS_MAX = 127  # of one node in one mix, and what it gathers: an engine adds up 255 in one pass
SUMS_FIRST_CHUNKS = 8  # under way at first, one more with each that comes: the first ones don't wait behind the rest
SUM_TERMS_COUNT_MAX = 255  # chunks that one node gathers for one sum: those of a stripe but its own
SUM_PATIENCE_S = 3.0  # how long a part waits for what it gathers; longer than a dead peer goes unnoticed
SUM_PATIENCE_WANTED_S = 4.0  # how long the node that wants it waits: who gathers in vain knows whom to blame, so longer
SUSPECT_S = 10.0  # how long a node that let a sum down is asked only where there is no other
DRILL_STRIPES = 4  # sampled by a periodic drill on each node; the stripes of all nodes and drills differ
DRILL_STRIPES_MAX = 4096  # that an operator may ask for at once; each moves a chunk of every member
DRILL_PATTERNS = 4  # sets of lost members tried per stripe
DRILL_COLUMNS = 16  # columns that the independent witness computes per pattern; it does a few thousand per second
DRILL_FIRST_S = 10.0  # from the first commit that a worker sees to its first drill
RECORD_PHASES_KEPT = 32  # of one recovery; a rebuild that fails again and again must not grow its file for ever
DIGEST_BATCH_CHUNKS = 32  # chunks digested in one go, by all threads; sending starts before the last one is digested

HEARTBEAT_S = 0.5
OWN_STALL_S = 1.0  # a worker that saw no event for so long, its own clock included, stood still itself
VIEW_GRACE_S = 1.5  # three heartbeats after a node was first heard, all have had the time to tell that they heard it
PEER_DEADLINE_S = 2.5  # five heartbeats: a peer not heard for so long is down
LAST_WORDS_S = 0.25  # a peer that is down is up again once it speaks for so long: half a heartbeat; last words don't
CHUNK_DEADLINE_S = 10.0  # a chunk not acknowledged for so long is sent again
PROTECT_STALL_S = 60.0  # a snapshot whose protection has not moved for so long is given up
HEAR_ALL_S = 3.0  # how long the collector waits for live nodes before it decides what to restore
COMMIT_PAUSE_S = 15.0  # how long a node that was asked what to restore commits nothing, waiting for the decision
DENY_AFTER_S = 6.0  # how long a replacement denies nothing that its predecessor may have stated and others committed on
RESTORES_TOLD_COUNT = 3  # lives of a job that begin from one step without a newer commit, before it is told so
COPY_RETRY_S = 5.0  # after a durable copy failed; twice as long after each further one
COPY_RETRY_S_MAX = 300.0  # a full disk is emptied by somebody some time; by then copies go on within minutes
COPY_DEADLINE_S = 3600.0  # a durable copy that has not ended after so long is given up: its directory hangs
COPY_LINGER_S = 1.5  # three heartbeats: within so long a node asked to stop hears whether the collector copies
RESTORES_COUNT_MAX = 1000  # lives beyond this are not counted: an attempt may be numbered by the time instead
JOIN_S = 3.0  # how long a node that just started waits for a lower collector before it takes the part itself
CADENCE_AHEAD_S = 1.5  # how far ahead another cadence is announced: three heartbeats, so that all ranks hear in time
ALLOCATE_DEADLINE_S = 120.0  # populating memory: slow kernels do 2 GiB/s
REFUSAL_PAUSE_S = 10.0  # between two log lines on strangers refused for the same reason

TRACE_SPANS_KEPT = 4096  # that a node remembers: over a hundred snapshots of eight ranks; they fit in one frame
TRACE_SPAN_BYTES_MAX = 240  # of one of them in a frame: names, three numbers and a note
TRACE_NOTE_CHARS_MAX = 80  # how a stage ended, if not well
TRACE_PAUSE_S = 30.0  # nothing of a stage happened for so long: what comes then is another time through it
TRACE_PATIENCE_S = 2.0  # how long a node that is asked what it remembers is waited for
TRACE_ASKS_COUNT_MAX = 256  # such questions open on one node

CLIENT_COUNT_MAX = 256  # trainers and commands attached to one daemon
CLIENT_HELLO_S = 5.0  # a connection that has not introduced itself for so long is closed

REMOTE_PIECE_BYTES_MAX = 1 << 20  # of a shard in one message to or from a trainer that can't map it: ZeroMQ's best size
REMOTE_CREDITS = 4  # such pieces under way for one trainer, each way: bounds what either side holds beside the arena
REMOTE_HEADER_BYTES_MAX = 512  # a job's name, numbers and a digest; a message of words or bytes is a frame of its own
REMOTE_CLIENT_COUNT_MAX = 128  # trainers over the network of one daemon; the others' places stay theirs
REMOTE_BEAT_S = 0.5  # between two signs of the gate's life, which also show it who has gone
REMOTE_PATIENCE_S = 10.0  # without any progress of bytes, a link counts as dead; as long as a chunk between nodes has
TRAINER_KEYS_COUNT_MAX = 1024  # key files of trainers that a daemon reads

SHARD_DIGESTS_COUNT_MAX = 1 << 16  # of a shard that its reader verifies; the daemon verifies larger ones

LEDGER_BYTES = 8 << 20  # room for one copy of the ledger; two copies are held

assert AGE_S_MAX * 2 < TIME_S_MAX
assert SHARD_DIGESTS_COUNT_MAX * 8 < CONTROL_FRAME_BYTES_MAX
assert CHUNK_BYTES_MIN < CHUNK_BYTES_MAX
assert REMOTE_PIECE_BYTES_MAX <= CONTROL_FRAME_BYTES_MAX
assert REMOTE_CLIENT_COUNT_MAX < CLIENT_COUNT_MAX
assert REMOTE_BEAT_S * 4 < REMOTE_PATIENCE_S
assert DIGESTS_PER_MESSAGE_MAX * 8 < CONTROL_FRAME_BYTES_MAX
assert WORLD_SIZE_MAX * 16 < CONTROL_FRAME_BYTES_MAX < LEDGER_BYTES
assert HEARTBEAT_S * 3 <= CADENCE_AHEAD_S
assert HEARTBEAT_S * 2 < PEER_DEADLINE_S <= HEAR_ALL_S
assert LAST_WORDS_S < HEARTBEAT_S
assert HEAR_ALL_S + PEER_DEADLINE_S < COMMIT_PAUSE_S
assert OWN_STALL_S < PEER_DEADLINE_S
assert PEER_DEADLINE_S + 4 * HEARTBEAT_S < DENY_AFTER_S
assert CHUNK_DEADLINE_S * 2 < PROTECT_STALL_S
assert AGREEMENT_STRIPES_MAX * 256 * 4 < CONTROL_FRAME_BYTES_MAX
assert RANGES_PER_CLIENT_COUNT_MAX <= RANGE_COUNT_MAX
assert PEER_DEADLINE_S < SUM_PATIENCE_S < SUM_PATIENCE_WANTED_S
assert SUM_CHUNKS_MIN <= SUMS_FIRST_CHUNKS <= SUM_CHUNKS_MAX
assert SUMS_PER_MESSAGE_COUNT_MAX * SUM_TERMS_COUNT_MAX * 32 < CONTROL_FRAME_BYTES_MAX
assert TRACE_SPANS_KEPT * TRACE_SPAN_BYTES_MAX < CONTROL_FRAME_BYTES_MAX
assert 2 * MIX_CHUNKS_MAX <= GROUP_NODES_COUNT_MAX
assert SUM_CHUNKS_MIN * CHUNK_BYTES_MAX <= READ_RANGE_BYTES_MAX
