"""The HTTP face that all runtimes share: ``/chat`` in KAITO's form, health, metrics, the API key, limits."""
