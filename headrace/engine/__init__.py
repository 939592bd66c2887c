"""Requests, plans, batches: from prompts to tokens, without text."""
