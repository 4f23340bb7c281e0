"""Figures for Prometheus: of the queue, asked when they are scraped, and of this process's watchers."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from task_streams import TaskQueue, keys
from task_streams.claims import parse_element

from .hub import Hub

MOST_LEASES = 10_000  # whose tasks are looked at, to tell those that run from those that rest
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # seconds


class QueueCollector(Collector):
    """Asks Redis for what it counts. While Redis is away a scrape fails, which Prometheus tells by `up`."""

    def __init__(self, queue: TaskQueue) -> None:
        self.queue = queue

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        with self.queue.redis.pipeline(transaction=False) as pipe:
            pipe.llen(keys.QUEUE)
            pipe.zcard(keys.UNFINISHED)
            pipe.zrange(keys.UNFINISHED, 0, 0, withscores=True)
            pipe.zrange(keys.LEASES, 0, MOST_LEASES - 1)
            pipe.llen(keys.DEAD)
            pipe.hgetall(keys.TOTALS)
            waiting, unfinished, oldest, leased, dead, totals = pipe.execute()
            for task_id in leased:
                pipe.hget(keys.record(task_id), "status")
            statuses = pipe.execute()
        running = statuses.count("running")
        age = seconds_since(oldest[0][1]) if oldest else 0.0
        yield GaugeMetricFamily("task_queue_length", "Elements of the list: tasks waiting", waiting)
        yield GaugeMetricFamily("task_queue_unfinished", "Tasks that were put and have not ended", unfinished)
        yield GaugeMetricFamily("task_queue_oldest_age_seconds", "Age of the oldest task that has not ended", age)
        waited = "Age of the task that is popped next; 0 where none waits, or one that was pushed by hand"
        yield GaugeMetricFamily("task_queue_oldest_waiting_age_seconds", waited, self.oldest_waiting_age())
        yield GaugeMetricFamily("task_queue_running", "Tasks that a worker holds", running)
        yield GaugeMetricFamily("task_queue_resting", "Tasks that rest until their next attempt", len(leased) - running)
        yield GaugeMetricFamily("task_queue_dead", "Dead letters", dead)
        ended = CounterMetricFamily("tasks_ended", "Tasks that have ended, by outcome", labels=["outcome"])
        for outcome in sorted(keys.TERMINAL):
            ended.add_metric([outcome], int(totals.get(outcome, 0)))
        yield ended

    def oldest_waiting_age(self) -> float:
        try:
            [task] = map(parse_element, self.queue.next_elements(1))
        except ValueError:  # the list is empty, or that element is malformed
            return 0.0
        put_at = self.queue.redis.zscore(keys.UNFINISHED, task.id)
        return seconds_since(put_at) if put_at else 0.0


def seconds_since(ms: float) -> float:
    return max(0.0, time.time() - ms / 1000)


class Metrics:
    """What GET /metrics answers."""

    def __init__(self, queue: TaskQueue, hub: Hub) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(QueueCollector(queue))
        self.events = Counter("dashboard_events", "Events brought from Redis", registry=self.registry)
        self.lag = Histogram(
            "dashboard_lag_seconds", "From an event's XADD until this process has it", buckets=LAG_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        watchers = Gauge("dashboard_watchers", "Connections that watch tasks", registry=self.registry)
        watchers.set_function(lambda: len(hub.all_watchers))
        streams = Gauge("dashboard_streams", "Streams that somebody watches", registry=self.registry)
        streams.set_function(lambda: len(hub.watchers))
        hub.on_event = self.observe

    def observe(self, entry_id: str) -> None:
        """Count one event that a reader has brought."""
        self.events.inc()
        self.lag.observe(max(0.0, time.time() - int(entry_id.partition("-")[0]) / 1000))

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format. Raises redis-py's errors."""
        return generate_latest(self.registry)
