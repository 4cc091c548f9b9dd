"""A package, because some wheels leave a `tests` of their own in site-packages, which processes would import instead."""
