"""The networks of the paper, each with its configuration, and how their weights are stored and found."""
