r"""Exercise of part 3: a consumer of your own.

Check:   python -m pytest tutorial/exercises/test_part3_count_words.py
Run it:  PYTHONPATH=. python tutorial/exercises/part3_count_words.py, and in another terminal
         python producer.py --type count_words --payload '{"text": "one two\nthree"}'
"""

from task_streams import Task, TaskLog, run_worker


async def handle(task: Task, log: TaskLog) -> dict[str, int]:
    """Count the words of task.data["payload"]["text"], line by line.

    Add one entry for each line: event `processing`, with a `step` such as "line 2: 5 words". Return {"words": 7}.
    If the payload has no text that is a str, the task can never succeed: raise PermanentFailure.
    """
    raise NotImplementedError("your code: await log.add(…) for each line, as handle() of consumer.py does it")


if __name__ == "__main__":
    raise SystemExit(run_worker(handle))
