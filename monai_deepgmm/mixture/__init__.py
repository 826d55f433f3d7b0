"""The mathematics of mixtures: densities, EM and its relatives, the bias field, as functions of tensors."""
