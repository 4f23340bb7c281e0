"""What every script does around its main(): logging, and one clear line instead of a traceback."""

import logging
import os
import sys
from collections.abc import Callable

from ailf.messaging.redis import REDIS_ERRORS, RedisMessagingError, embedded, explain


def run(main: Callable[[], int]) -> int:
    """Call main() and return an exit code: its own, 1 where Redis cannot serve, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # whoever read our output has enough of it (`… | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except RedisMessagingError as error:
        print(error, file=sys.stderr)
    except REDIS_ERRORS as error:
        print(explain(error, os.environ.get("REDIS_URL") or f"redis://localhost:{embedded.PORT}"), file=sys.stderr)
    return 1
