"""Prepares text as bins of uint16 tokens, and reads them for training."""
