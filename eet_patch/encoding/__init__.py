"""The step level of encoders: all layers of a call, over the real tokens alone."""
