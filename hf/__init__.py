"""Reads and writes Llama folders in Hugging Face's format."""
