"""What is measured over runs: onset, statistics, figures."""
