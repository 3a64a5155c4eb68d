"""Runnable examples, the demo, its small models and its data."""
