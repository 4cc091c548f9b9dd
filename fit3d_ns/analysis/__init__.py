"""Pure functions on feature maps: PCA, clusters, similarity, consistency between views and in time, pictures."""
