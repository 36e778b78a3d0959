"""The model's ops: `eager` defines each in plain torch."""
