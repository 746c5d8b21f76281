"""Durable workflows: deterministic code, replayed from its history."""
