"""Training data, from a URL to examples that can be trained on, with the data doctor between.

    sources ─> fetch ─> rows ─> formats ─> chat ─> tokens ─> prepare ─> prepared
    what is    down-    one     messages   text    ids and   doctor,    Arrow files for
    meant      load     form    or text    + spans labels    split      the trainer

The floor is light: pyarrow, tokenizers, jinja2 and httpx are imported where they are used.
"""
