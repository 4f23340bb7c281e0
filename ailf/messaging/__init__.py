"""Messaging between agents. Today: on Redis (ailf.messaging.redis)."""
