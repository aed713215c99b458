"""Export of trained predictors to other runtimes."""
