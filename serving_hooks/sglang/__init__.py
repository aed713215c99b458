"""The hook for SGLang: found through its entry point `sglang.srt.plugins`, chosen by `--schedule-policy equinox`.

Importing it loads neither SGLang nor a predictor.
"""
