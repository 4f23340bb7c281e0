"""Every key name and every event name, and nothing else.

The queue's companions carry the hash tag {task_queue}: in a Redis Cluster they share a slot, so that one script may
touch all of them. Each stream has a slot of its own.
"""

QUEUE = "task_queue"  # list: tasks waiting; LPUSH on the left, BRPOP on the right
COUNTER = "task_id_counter"  # string: INCR gives the next id
UNFINISHED = "{task_queue}:unfinished"  # zset: id -> when it was put (ms); the ledger of what is owed
LEASES = "{task_queue}:leases"  # zset: id -> when its lease ends (ms, the server's clock)
RECENT = "{task_queue}:recent"  # zset: the last ids, for lists
DEAD = "{task_queue}:dead"  # list: tasks given up on, with the reason
TOTALS = "{task_queue}:totals"  # hash: status -> how many tasks have ended so
FINISHED = "{task_queue}:finished"  # stream: id and status of the last tasks that ended, for consumer groups
AUDITED = "{task_queue}:audited"  # string, for a second: somebody has looked for lost tasks

FIXED = (QUEUE, COUNTER, UNFINISHED, LEASES, RECENT, DEAD, FINISHED, TOTALS)  # all other keys expire

CANCEL_CHANNEL = "task_queue:cancel"  # PubSub: the id of a task that is to be cancelled
LLM_RATE = "llm_rate"  # RedisRateLimiter: the calls of all workers to one LLM, llm_rate:<seconds>s:<model>


def record(task_id: str) -> str:
    """Return the key of a task's record, a hash: data, status, attempts, owner, worker, token, timestamps, result."""
    return f"{{task_queue}}:task:{task_id}"


def owned(owner: str) -> str:
    """Return the key of an owner's last tasks, a zset: id -> when it was put (ms)."""
    return f"{{task_queue}}:owned:{owner}"


def stream(task_id: str) -> str:
    """Return the key of a task's stream of events."""
    return f"task_logs:{task_id}"


STEP, STEP_END = ("key", "digest"), ("error", "nothing_happened", "is_result")  # fields that log.step() writes

# Event name -> its own fields, beside `event` and `timestamp`, which every entry has.
EVENTS: dict[str, tuple[str, ...]] = {
    "started": ("worker", "attempt"),
    "processing": ("step",),
    "chain_of_thought": ("step", "prompt", "thought"),
    "llm_delta": ("text",),
    "llm_call": ("model", "status", *STEP, "safe_to_repeat"),
    "llm_response": ("model", "response", "calls", "usage", "status", "duration_ms", *STEP, *STEP_END, "replaces"),
    "tool_usage": (
        *("call_id", "tool", "action", "status", "arguments", "result", "duration_ms"),
        *(*STEP, "safe_to_repeat", *STEP_END),
    ),
    "progress": ("percent", "step"),
    "input_required": ("question", "options", "expires_at", "number", *STEP, "step"),
    "input_received": ("answer", "by", *STEP, "step"),
    "steered": ("text", "by", "key"),
    "rate_limited": ("limit", "wait_ms"),
    "error": ("error", "error_type", "will_retry"),
    "worker_lost": ("worker",),
    "resumed": ("steps", "reason"),
    "in_doubt": ("step", "reason"),
    "completed": ("result", "duration_ms"),
    "failed": ("error", "attempts"),
    "cancelled": ("reason",),
}

TERMINAL = frozenset({"completed", "failed", "cancelled"})  # exactly one of them ends a stream; a status too
