"""Durable state in SQLite: mailboxes and keys. What is here survives a power cut."""
