"""Pure functions of tensors: nearest code, gradient estimators, k-means, sums over codes and over ranks."""
