"""Fair scheduling by predicted length: pure Python, no engine, no clock, no randomness."""
