"""One run: launch, the loop, its folder, signals and trackers. Knows no algorithm and no Ray."""
