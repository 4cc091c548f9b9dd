"""A package, because some wheels put their own `tests` into site-packages, which spawned processes would import."""
