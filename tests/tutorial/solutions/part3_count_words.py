"""A solution of part 3's exercise."""

from task_streams import PermanentFailure, Task, TaskLog


async def handle(task: Task, log: TaskLog) -> dict[str, int]:
    """Count the words of task.data["payload"]["text"], line by line."""
    text = task.data.get("payload", {}).get("text")
    if not isinstance(text, str):
        raise PermanentFailure("the payload has no text")
    total = 0
    for number, line in enumerate(text.splitlines(), start=1):
        words = len(line.split())
        await log.add("processing", step=f"line {number}: {words} words")
        total += words
    return {"words": total}
