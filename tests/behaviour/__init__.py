"""The one behavioural suite: every backend against the dense float64 oracle of `flexjax.testing`."""
