"""What a run needs that is not the run: settings, checkpoints, ranks, metrics, plots."""
