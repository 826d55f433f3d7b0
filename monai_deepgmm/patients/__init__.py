"""Which files belong to which patient."""
