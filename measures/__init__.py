"""Measures of a model: how well it copies, where its heads attend, and how it uses its context."""
