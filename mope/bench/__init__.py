"""`mope bench`: latency, throughput, start and memory of saved predictors on real prompts, side by side."""
