"""The settings of ailf.messaging.redis, where other settings are looked for."""

from ailf.messaging.redis.config import RedisConfig

__all__ = ["RedisConfig"]
