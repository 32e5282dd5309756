"""One run: launch, the loop, and its folder, signals and trackers. Knows no algorithm and no Ray."""
