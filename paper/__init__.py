"""What is measured over several runs: statistics and the paper's figures."""
