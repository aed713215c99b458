"""`mope profile`: measures a running LLM server and writes a profile of how long its steps take."""
