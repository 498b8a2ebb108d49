"""``kaito new``: a complete package of a plugin, as somebody else would publish it.

package.py      names, and the files of a package from templates
described.py    a preset as readable Python, and what could not be known of it
tiny_model.py   the model of a preset that has none yet; copied into the package as its script
templates/      what is written: plain text with ``$name``; ``dot-`` begins a hidden file, ``MODULE`` is the package's folder
"""
