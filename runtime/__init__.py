"""Checkpoints, process groups, optimizers, logging, validation and plots of training runs."""
