"""The work of `benchmarks/buffer.py` by others: Redis with its append-only file, and a Ray queue.

`python benchmarks/buffer_peers.py redis-always|redis-everysec|ray NUM_GROUPS GROUP_BYTES` prints groups per second as
JSON, or ends with one sentence when the peer is not installed. Redis does the buffer's work in its own scripts: leases
within a bound, each group stored once, batches, contents kept until they are committed; it does not look into the
groups. A Ray queue does none of that and keeps nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

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
redis.call('HSET', 'contents', ARGV[1], ARGV[2])
redis.call('RPUSH', 'ready', ARGV[1])
return 'stored'
"""
BATCH = """
if redis.call('LLEN', 'ready') < tonumber(ARGV[1]) then return {} end
local ids = redis.call('LPOP', 'ready', ARGV[1])
redis.call('RPUSH', 'used', unpack(ids))
return redis.call('HMGET', 'contents', unpack(ids))
"""
COMMIT = """
redis.call('HDEL', 'contents', unpack(redis.call('LRANGE', 'used', 0, -1)))
return redis.call('DEL', 'used')
"""


def produce_for_redis(path: str, num_bytes: int) -> None:
    import redis

    group, client = os.urandom(num_bytes), redis.Redis(unix_socket_path=path)
    lease, deliver = client.register_script(LEASE), client.register_script(DELIVER)
    client.script_load(DELIVER)
    while True:
        ids = lease(args=[MOST_OUTSTANDING, PIPELINE, time.time() + 120])
        pipeline = client.pipeline(transaction=False)
        for occurrence in ids:
            pipeline.evalsha(deliver.sha, 0, occurrence, group)
        assert set(pipeline.execute()) <= {b"stored"}
        if not ids:
            time.sleep(0.0005)


def measure_redis(fsync: str, num_groups: int, num_bytes: int) -> float:
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
        producer = multiprocessing.get_context("spawn").Process(target=produce_for_redis, args=(path, num_bytes))
        producer.start()
        try:
            return consume_from_redis(client, num_groups)
        finally:
            producer.kill()
            producer.join()
            server.terminate()
            server.wait()


def patient(redis: Any) -> Any:
    """Retries until the server has started."""
    return redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 100)


def consume_from_redis(client: Any, num_groups: int) -> float:
    next_batch, commit = client.register_script(BATCH), client.register_script(COMMIT)
    taken, begin, batch = 0, time.perf_counter(), 0
    while taken < num_groups:
        groups = next_batch(args=[GROUPS_PER_BATCH])
        if not groups:
            time.sleep(0.0005)
            continue
        batch += 1
        if batch % COMMIT_EVERY == 0:
            commit()
        if batch <= WARM_UP_BATCHES:
            begin = time.perf_counter()
        else:
            taken += len(groups)
    return taken / (time.perf_counter() - begin)


def measure_ray(num_groups: int, num_bytes: int) -> float:
    try:
        import ray
        from ray.util.queue import Queue
    except ImportError:
        sys.exit("Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    queue = Queue(maxsize=MOST_OUTSTANDING)

    @ray.remote(num_cpus=0)
    def produce(queue: Any) -> None:
        group = os.urandom(num_bytes)
        while True:
            queue.put(group)

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
    peer, num_groups, num_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if peer == "ray":
        rate = measure_ray(num_groups, num_bytes)
    else:
        rate = measure_redis(peer.removeprefix("redis-"), num_groups, num_bytes)
    print(json.dumps(rate))


if __name__ == "__main__":
    main()
