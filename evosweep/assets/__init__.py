"""Files from elsewhere: the cache folder and what a package index carries inside its wheels."""
