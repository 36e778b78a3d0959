"""What bench.py times: training steps, the time to copy, the kernels, the preparation of data."""
