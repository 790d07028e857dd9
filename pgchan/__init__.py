"""pgchan: durable runs and named, resumable channels on PostgreSQL alone."""
from pgchan.aio import AsyncClient
__all__ = ["AsyncClient"]
