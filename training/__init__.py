"""Training of MoPE predictors: data, router, experts, calibration, evaluation (extra `train`)."""
