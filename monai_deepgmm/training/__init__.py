"""One network for a cohort: what it is trained on, how, and the bundle that it becomes."""
