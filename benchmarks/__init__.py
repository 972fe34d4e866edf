"""What measures speed; never part of the test run."""
