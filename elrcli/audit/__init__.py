"""Finding wrong labels: evidence, scores, calibration, the report, and applying decisions."""
