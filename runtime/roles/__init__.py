"""What a run's processes do, as plain classes: build networks, sample, score, learn. Knows no algorithm, no Ray and no loop."""
