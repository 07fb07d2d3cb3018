"""The page on `/`: static files of this package, and the headers that they go out with."""
