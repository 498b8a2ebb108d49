"""Models that no plugin knows: a preset read from a model's own files, without its weights and without running its code.

architecture.py         the numbers, from config.json and the headers of the weights
safetensors_header.py   what a safetensors file says that it holds
files.py                what was read of a model, and the preset that it makes
folder.py, hub.py       the readers: a folder on this machine, and a hub
presets.py              names in a workspace, and the registry that knows the models behind them
"""
