"""Hugging Face Llama folders, read and written."""
