"""Stage III: what are the features worth? Linear probes, multi-view consistency and correspondence."""
