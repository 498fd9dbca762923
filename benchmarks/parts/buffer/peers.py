"""The same work as in `benchmarks/buffer.py` with other systems: Redis with its append-only file, and a Ray queue.

`python benchmarks/parts/buffer/peers.py redis-always|redis-everysec|ray NUM_GROUPS` reads the two frames of a group
from standard input and prints groups per second as JSON. It ends with one sentence when the system is not installed.

Redis does the buffer's work in Lua scripts: leases up to a bound, every group stored once, batches, contents kept until
they are committed. Redis cannot decode groups, so the consumer checks and decodes them, as the buffer and the learner
do. The Ray queue does none of this and stores nothing on disk.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The root of the project comes first, because a file in this folder has the name of a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import msgpack

from buffer.transport.packed_group import check_group, read_group_header

GROUPS_PER_BATCH = 32
COMMIT_EVERY = 4
PIPELINE = 32
MOST_OUTSTANDING = 128
WARM_UP_BATCHES = 6


LEASE = """
local free = ARGV[1] - redis.call('ZCARD', 'leases') - redis.call('LLEN', 'ready')
local ids = {}
for i = 1, math.min(free, ARGV[2]) do
    ids[i] = redis.call('INCR', 'issued')
    redis.call('ZADD', 'leases', ARGV[3], ids[i])
end
return ids
"""
DELIVER = """
if redis.call('ZREM', 'leases', ARGV[1]) == 0 then return 'late' end
redis.call('HSET', 'headers', ARGV[1], ARGV[2])
redis.call('HSET', 'arrays', ARGV[1], ARGV[3])
redis.call('RPUSH', 'ready', ARGV[1])
return 'stored'
"""
BATCH = """
if redis.call('LLEN', 'ready') < tonumber(ARGV[1]) then return {} end
local ids = redis.call('LPOP', 'ready', ARGV[1])
redis.call('RPUSH', 'used', unpack(ids))
return {redis.call('HMGET', 'headers', unpack(ids)), redis.call('HMGET', 'arrays', unpack(ids))}
"""
COMMIT = """
local ids = redis.call('LRANGE', 'used', 0, -1)
redis.call('HDEL', 'headers', unpack(ids))
redis.call('HDEL', 'arrays', unpack(ids))
return redis.call('DEL', 'used')
"""


def produce_for_redis(path: str, group: list[bytes]) -> None:
    import redis

    fields, arrays = msgpack.unpackb(group[0]), group[1]
    client = redis.Redis(unix_socket_path=path)
    lease, deliver = client.register_script(LEASE), client.register_script(DELIVER)
    client.script_load(DELIVER)
    while True:
        ids = lease(args=[MOST_OUTSTANDING, PIPELINE, time.time() + 120])
        pipeline = client.pipeline(transaction=False)
        for occurrence in ids:
            fields[0] = f"{occurrence}.0"
            pipeline.evalsha(deliver.sha, 0, occurrence, msgpack.packb(fields), arrays)
        assert set(pipeline.execute()) <= {b"stored"}
        if not ids:
            time.sleep(0.0005)


def measure_redis(fsync: str, num_groups: int, group: list[bytes]) -> float:
    try:
        import redis
    except ImportError:
        sys.exit("the Python client of Redis is not installed")
    if not shutil.which("redis-server"):
        sys.exit("redis-server is not installed")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = f"{folder}/socket"
        settings = ["--port", "0", "--unixsocket", path, "--dir", folder, "--save", "", "--appendonly", "yes"]
        command = ["redis-server", *settings, "--appendfsync", fsync]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis(unix_socket_path=path, retry_on_error=[redis.ConnectionError], retry=patient(redis))
        client.ping()
        producer = multiprocessing.get_context("spawn").Process(target=produce_for_redis, args=(path, group))
        producer.start()
        try:
            return consume_from_redis(client, num_groups)
        finally:
            producer.kill()
            producer.join()
            server.terminate()
            server.wait()


def patient(redis: Any) -> Any:
    """A retry policy that waits until the server has started."""
    return redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 100)


def consume_from_redis(client: Any, num_groups: int) -> float:
    next_batch, commit = client.register_script(BATCH), client.register_script(COMMIT)
    taken, begin, batch = 0, time.perf_counter(), 0
    while taken < num_groups:
        groups = next_batch(args=[GROUPS_PER_BATCH])
        if not groups:
            time.sleep(0.0005)
            continue
        for header, arrays in zip(*groups, strict=True):
            check_group(read_group_header(header, arrays))
        batch += 1
        if batch % COMMIT_EVERY == 0:
            commit()
        if batch <= WARM_UP_BATCHES:
            begin = time.perf_counter()
        else:
            taken += len(groups[0])
    return taken / (time.perf_counter() - begin)


def measure_ray(num_groups: int, group: list[bytes]) -> float:
    try:
        import ray
        from ray.util.queue import Queue
    except ImportError:
        sys.exit("Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    queue = Queue(maxsize=MOST_OUTSTANDING)

    @ray.remote(num_cpus=0)
    def produce(queue: Any) -> None:
        contents = b"".join(group)
        while True:
            queue.put(contents)

    produce.remote(queue)
    taken, begin = -WARM_UP_BATCHES * GROUPS_PER_BATCH, time.perf_counter()
    while taken < num_groups:
        if taken <= 0:
            begin = time.perf_counter()
        queue.get()
        taken += 1
    rate = taken / (time.perf_counter() - begin)
    ray.shutdown()
    return rate


def main() -> None:
    peer, num_groups = sys.argv[1], int(sys.argv[2])
    group = msgpack.unpackb(sys.stdin.buffer.read())
    if peer == "ray":
        rate = measure_ray(num_groups, group)
    else:
        rate = measure_redis(peer.removeprefix("redis-"), num_groups, group)
    print(json.dumps(rate))


if __name__ == "__main__":
    main()
