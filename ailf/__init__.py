"""Agent building blocks. Today: messaging (ailf.messaging.redis)."""
